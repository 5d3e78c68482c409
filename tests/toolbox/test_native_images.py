"""Tools of the toolbox with images of native sizes."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLModel,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    SwinConfig,
    SwinModel,
)

from modeling_sparse_moe_vlm.toolbox.app.chat_model import ChatModel
from modeling_sparse_moe_vlm.toolbox.data import retrieval_inputs
from modeling_sparse_moe_vlm.toolbox.demo import scenes
from modeling_sparse_moe_vlm.toolbox.modality_weights.explanation import draw_explanation, explain
from modeling_sparse_moe_vlm.toolbox.retrieval import to_retrieval
from modeling_sparse_moe_vlm.toolbox.training import from_scratch
from modeling_sparse_moe_vlm.toolbox.training.processor_options import set_processor_options
from modeling_sparse_moe_vlm.toolbox.training.scenes_report import resizing_note
from modeling_sparse_moe_vlm.toolbox.upcycling import processor_from_parts, upcycle_from_parts
from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from tests.support.models import TINY_DECODER, VISION_CONFIG
from tests.support.processors import VOCAB_SIZE, make_tokenizer, speak_printably
from tests.test_native_sizes import image_of, make_native_model, make_native_processor
from tests.test_native_towers import MERGING, NAFLEX, OF_QWEN

pytestmark = pytest.mark.newest


def make_qwen() -> Qwen2VLModel:
    """Returns a whole model with a vision encoder."""
    text = {
        "vocab_size": 99,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
    }
    return Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=OF_QWEN | {"embed_dim": 32, "hidden_size": 24}))


# Vision encoders, their image processors, and the number of patches along the side of a token.
ENCODERS = {
    "siglip": (
        # 5 patches per side
        lambda: AutoModel.from_config(AutoConfig.for_model(**VISION_CONFIG | {"image_size": 20})),
        SiglipImageProcessorPil(size={"height": 16, "width": 16}),
        {"image_seq_length": 4, "merge_size": 2},
    ),
    "naflex": (
        lambda: AutoModel.from_config(AutoConfig.for_model(**NAFLEX)),
        Siglip2ImageProcessorPil(patch_size=4),
        {"image_seq_length": 4, "merge_size": 2},
    ),
    "qwen2": (make_qwen, Qwen2VLImageProcessorPil(patch_size=4), {"image_seq_length": 256, "merge_size": 2}),
    "qwen3": (
        lambda: AutoModel.from_config(AutoConfig.for_model(**MERGING["qwen3"])),
        Qwen2VLImageProcessorPil(patch_size=4),
        {"image_seq_length": 4, "merge_size": 2},
    ),
}


def make_language_model():
    torch.manual_seed(0)
    fields = TINY_DECODER | {"vocab_size": VOCAB_SIZE}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields)).eval()


@pytest.mark.parametrize("name", ENCODERS)
def test_a_model_from_parts(name):
    make_encoder, image_processor, arguments = ENCODERS[name]
    encoder, tokenizer = make_encoder().eval(), make_tokenizer()
    model = upcycle_from_parts(make_language_model(), encoder, tokenizer=tokenizer, image_sizing="native")
    assert model.config.image_arguments == {"image_sizing": "native", "patch_size": 4} | arguments
    assert model.config.pixel_shuffle_factor == (1 if name.startswith("qwen") else 2)
    assert model.config.use_deepstack is (True if name == "qwen3" else None)
    assert len(model.model.multi_modal_projector.deepstack_projectors) == (name == "qwen3")
    tower, source = model.model.vision_tower, getattr(encoder, "visual", encoder)
    assert type(tower) is type(source)
    for name, weight in source.state_dict().items():
        assert torch.equal(tower.state_dict()[name], weight)
    processor = processor_from_parts(model, tokenizer, image_processor)
    processor.max_image_tokens = 30
    inputs = processor(text="<image>!", images=image_of(20, 50), return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 12]]
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 18
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_a_model_from_parts_without_deepstack():
    parts = make_language_model(), ENCODERS["qwen3"][0]()
    model = upcycle_from_parts(*parts, tokenizer=make_tokenizer(), image_sizing="native", use_deepstack=False)
    assert model.config.use_deepstack is False


def test_encoders_that_do_not_fit():
    parts = make_language_model(), make_qwen()
    with pytest.raises(UpcyclingError, match=r'Qwen2VLModel cannot be .* set `image_sizing="native"`'):
        upcycle_from_parts(*parts, tokenizer=make_tokenizer())
    swin = SwinModel(SwinConfig(embed_dim=8, depths=[1], num_heads=[1]))
    with pytest.raises(UpcyclingError, match=r"SwinModel cannot be the vision encoder: .* merges patches from stage"):
        upcycle_from_parts(parts[0], swin, tokenizer=make_tokenizer(), image_sizing="native")


def test_explanations_have_the_grid_of_the_image(tmp_path):
    model = speak_printably(make_native_model())
    image = image_of(20, 50)
    explanation = explain(model, make_native_processor(), image, "What?")
    assert explanation.looked.shape == (3, 6)
    assert explanation.experts.shape == (2, 3, 6)
    assert explanation.looked.sum() == pytest.approx(1.0)
    draw_explanation(explanation, image, "What?", tmp_path / "explanation.png")
    assert (tmp_path / "explanation.png").stat().st_size > 1000


def test_the_page_knows_the_tokens_of_every_image(tmp_path):
    speak_printably(make_native_model()).save_pretrained(tmp_path)
    make_native_processor(row_separator="<|im_start|>").save_pretrained(tmp_path)
    chat = ChatModel.load(str(tmp_path))
    images = [image_of(16, 24), image_of(8, 8)]
    inputs = chat.processor(text="<image>a<image>", images=images, return_tensors="pt")
    first, second = chat._grids(inputs, images)
    assert first.positions.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert second.positions.tolist() == [[9]]


def test_retrieval_needs_the_prompts_of_images():
    processor = make_native_processor()
    model = to_retrieval(make_native_model(), processor)
    assert model.config.image_prompt_ids == []
    assert type(model.config)(**make_native_model().config.to_dict()).image_prompt_ids == []
    with pytest.raises(ValueError, match="`image_prompt_ids` must be empty"):
        type(model.config)(**make_native_model().config.to_dict() | {"image_prompt_ids": [3] * 4})
    images = [image_of(20, 50), image_of(16, 16)]
    inputs = retrieval_inputs(processor, images)
    with torch.no_grad():
        embeddings = model(**inputs).embeddings
        alone = model(**retrieval_inputs(processor, images[:1])).embeddings
    assert embeddings.shape[0] == 2
    torch.testing.assert_close(embeddings[:1], alone, rtol=1e-4, atol=1e-5)


def test_new_models_and_options_of_recipes():
    data = scenes("train", 4, cell_size=16)
    model, processor = from_scratch("tiny", data, vocab_size=300, config_fields={"image_sizing": "native"})
    assert (processor.image_sizing, processor.patch_size, processor.merge_size) == ("native", 16, 1)
    set_processor_options(processor, {"min_image_tokens": 4, "max_image_tokens": 20})
    assert processor.token_grid(8, 8) == (2, 2)
    assert processor.token_grid(200, 200) == (4, 4)
    assert resizing_note(model, (48, 32)) is None
