"""The model at the start of training: its tokens, its image processor and its settings of generation."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import AutoConfig, LlamaConfig, SiglipImageProcessorPil

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor
from modeling_sparse_moe_vlm.toolbox.training import models
from modeling_sparse_moe_vlm.toolbox.training.models import (
    from_checkpoint,
    from_our_checkpoint,
    from_scratch,
    load_config,
)
from tests.support.processes import ROOT
from tests.support.processors import make_processor, make_speaking_model
from tests.support.upcycled import make_speaking

PRESET = str(ROOT / "configuration/models/tiny.json")
SIDE = 32  # size of the preset's images
COLOURS = [(255, 0, 51), (0, 0, 102)]


def plain_image(colour, side: int = 8) -> PILImage.Image:
    return PILImage.new("RGB", (side, side), colour)


@pytest.fixture(scope="module")
def fresh():
    rows = [{"question": "zebra?", "answer": "quagga", "image": plain_image(colour)} for colour in COLOURS] * 2
    features = Features({"question": Value("string"), "answer": Value("string"), "image": Image()})
    return from_scratch(PRESET, Dataset.from_list(rows, features=features), vocab_size=280)


def test_models_of_videos():
    """If the decoder has the modality, there is a token for videos, and the processor takes them."""
    fields = {"text_config": {"modalities": ["text", "image", "video"], "expert_groups": "hybrid"}}
    rows = [{"messages": [{"role": "user", "content": "zebra"}], "images": []}]
    model, processor = from_scratch(PRESET, rows, vocab_size=270, config_fields=fields | {"video_temporal_pooling": 2})
    assert len(processor.tokenizer) <= 270
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert processor.tokenizer.convert_ids_to_tokens(model.config.video_token_id) == processor.video_token == "<video>"
    assert processor.video_temporal_pooling == 2
    assert model.generation_config.suppress_tokens == [model.config.image_token_id, model.config.video_token_id]
    inputs = processor(text="<video>a", videos=np.zeros((3, 8, 8, 3), np.uint8), return_tensors="pt")
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    assert from_scratch(PRESET, rows, vocab_size=270)[1].video_token is None
    with pytest.raises(ValueError, match="`video_token_id` of the configuration is set by the tokenizer"):
        from_scratch(PRESET, rows, config_fields={"video_token_id": 5})


def test_the_configuration_has_the_tokens_of_the_tokenizer(fresh):
    model, processor = fresh
    config = model.config
    assert (config.image_token_id, config.text_config.pad_token_id, config.text_config.eos_token_id) == (1, 0, 3)
    tokens = processor.tokenizer.convert_ids_to_tokens([0, 1, 2, 3])
    assert tokens == ["<pad>", "<image>", "<|im_start|>", "<|im_end|>"]
    assert config.text_config.vocab_size == len(processor.tokenizer) < 280, "all of the few texts are merged"
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer)


def test_the_tokenizer_knows_questions_and_answers_and_the_line_between(fresh):
    tokenizer = fresh[1].tokenizer
    assert len(tokenizer.tokenize("zebra")) == len(tokenizer.tokenize("quagga")) == 1
    assert len(tokenizer.tokenize("gnu")) == 3


def test_size_of_the_vocabulary():
    rows = [{"question": "some words", "answer": "more words", "image": plain_image("red")}]
    examples = Dataset.from_list(
        rows, features=Features({**dict.fromkeys(("question", "answer"), Value("string")), "image": Image()})
    )
    assert len(from_scratch(PRESET, examples, vocab_size=262)[1].tokenizer) == 262


def test_presets_by_name_in_any_folder(fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_list(
        [{"question": "zebra?", "answer": "quagga", "image": plain_image(COLOURS[0])}],
        features=Features({"question": Value("string"), "answer": Value("string"), "image": Image()}),
    )
    for name in ("tiny", "configuration/models/tiny.json"):
        config = from_scratch(name, rows, vocab_size=280)[0].config
        assert config.vision_config.to_dict() == fresh[0].config.vision_config.to_dict()
    with pytest.raises(ValueError, match=r"name of a preset \(large, small, tiny\), but got 'tny'"):
        from_scratch("tny", rows)


FIELDS = {"pixel_shuffle_factor": 2, "vision_config": {"image_size": 64, "patch_size": 8, "num_hidden_layers": 2}}


def test_fields_of_the_configuration(fresh):
    examples = [{"question": "zebra?", "answer": "quagga", "image": plain_image(colour)} for colour in COLOURS]
    features = Features({"question": Value("string"), "answer": Value("string"), "image": Image()})
    model, processor = from_scratch(
        PRESET, Dataset.from_list(examples, features=features), vocab_size=280, config_fields=FIELDS
    )
    expected = fresh[0].config.to_dict()
    expected["pixel_shuffle_factor"] = 2
    expected["vision_config"] |= FIELDS["vision_config"]
    assert model.config.to_dict() == expected
    assert processor.image_seq_length == 16  # 8 by 8 patches, of which 2 by 2 become a token
    assert processor.image_processor.size == {"height": 64, "width": 64}
    assert len(model.model.vision_tower.encoder.layers) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pixel_shufle": 2}, "has no field `pixel_shufle`"),
        ({"text_config": {"num_expert": 2}}, r"has no field `text_config\.num_expert`"),
        ({"vision_config": 64}, "`vision_config` of the configuration must be a mapping, got 64"),
        ({"text_config": {"vocab_size": 9}}, r"`text_config\.vocab_size` of the configuration is set by the tokenizer"),
        ({"image_token_id": 9}, "`image_token_id` of the configuration is set by the tokenizer"),
        ({"text_config": {"num_experts": 0}}, "num_experts"),
    ],
)
def test_wrong_fields_of_the_configuration(fields, message):
    rows = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "images": []}]
    with pytest.raises(ValueError, match=message):
        from_scratch(PRESET, Dataset.from_list(rows), vocab_size=280, config_fields=fields)


def test_everything_else_is_as_in_the_preset(fresh):
    preset, config = AutoConfig.from_pretrained(PRESET), fresh[0].config
    changed = {"vocab_size", "pad_token_id", "eos_token_id"}
    ours, its = (
        {key: value for key, value in of.text_config.to_dict().items() if key not in changed} for of in (config, preset)
    )
    assert ours == its
    assert config.vision_config.to_dict() == preset.vision_config.to_dict()
    assert config.image_seq_length == preset.image_seq_length == fresh[1].image_seq_length


def test_generation_ends_and_never_generates_an_image(fresh):
    generation = fresh[0].generation_config
    assert (generation.eos_token_id, generation.pad_token_id, generation.suppress_tokens) == (3, 0, [1])


def test_images_are_normalised_by_the_statistics_of_each_channel(fresh):
    image_processor = fresh[1].image_processor
    assert dict(image_processor.size) == {"height": SIDE, "width": SIDE}
    spread = (4 * SIDE * SIDE / (4 * SIDE * SIDE - 1)) ** 0.5  # of a sample
    assert image_processor.image_mean == pytest.approx([0.5, 0.0, 0.3], abs=1e-6)
    # A constant channel is not divided by zero.
    assert image_processor.image_std == pytest.approx([0.5 * spread, 1e-3, 0.1 * spread], rel=1e-4)
    pixels = image_processor([plain_image(COLOURS[0])], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE)
    torch.testing.assert_close(pixels[0, :, 5, 7], torch.tensor([1.0, 0.0, -1.0]), atol=1e-3, rtol=0)


def test_a_new_model_normalises_its_images():
    """Includes transparent images (as white) and grey 16-bit images. Channels that hardly vary are not amplified."""
    red = PILImage.new("RGB", (8, 8), (255, 0, 51))
    images = [red, red, PILImage.new("RGBA", (8, 8), (0, 0, 0, 0)), PILImage.new("I;16", (8, 8), 51 * 257)]
    columns = {"question": ["what?"] * 4, "answer": ["red"] * 4}
    rows = Dataset.from_dict(columns | {"image": range(4)}).with_transform(
        lambda batch: {key: [images[i] for i in value] if key == "image" else value for key, value in batch.items()}
    )
    _, processor = from_scratch(PRESET, rows, vocab_size=300)
    by_channel = np.array([[1, 1, 1, 0.2], [0, 0, 1, 0.2], [0.2, 0.2, 1, 0.2]])
    assert processor.image_processor.image_mean == pytest.approx(by_channel.mean(axis=1).tolist(), abs=1e-6)
    assert processor.image_processor.image_std == pytest.approx(by_channel.std(axis=1).tolist(), rel=1e-3)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    assert pixels.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(pixels.std(dim=(0, 2, 3)), torch.ones(3), rtol=0, atol=1e-3)

    _, processor = from_scratch(PRESET, rows.select([0, 1]), vocab_size=300)
    assert processor.image_processor.image_mean == pytest.approx([1, 0, 0.2], abs=1e-6)
    assert processor.image_processor.image_std == pytest.approx([1e-3] * 3)


@pytest.mark.parametrize(
    ("number", "looked_at"), [(3, range(3)), (7, range(7)), (8, range(0, 8, 2)), (9, range(0, 9, 2))]
)
def test_many_images_are_sampled_evenly(monkeypatch, number, looked_at):
    monkeypatch.setattr(models, "NUM_IMAGES_LOOKED_AT", 4)
    shades = [10 * index for index in range(number)]
    examples = [{"image": plain_image((shade,) * 3)} for shade in shades]
    mean, _ = models._pixel_statistics(examples, SiglipImageProcessorPil(size={"height": 4, "width": 4}))
    assert mean == pytest.approx([sum(shades[i] for i in looked_at) / len(looked_at) / 255] * 3, abs=1e-5)


def test_our_checkpoints_are_loaded_in_evaluation_mode(tmp_path):
    model = make_speaking_model().train()
    model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    for load in (from_our_checkpoint, from_checkpoint):
        loaded, processor = load(str(tmp_path))
        assert type(loaded) is SparseMoeVlmForConditionalGeneration
        assert type(processor) is SparseMoeVlmProcessor
        assert not loaded.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_checkpoints_of_other_classes_are_refused_if_ours_is_needed(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} is a model of type 'llama'; this needs 'sparse_moe_vlm'"):
        from_our_checkpoint(str(tmp_path))


def test_checkpoints_with_experts(tmp_path):
    """Ours and upcycled ones load without `trust_remote_code`."""
    upcycled, processor = make_speaking(), make_processor()
    for name, model in (("ours", make_speaking_model()), ("upcycled", upcycled)):
        model.train().save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        loaded, its = from_checkpoint(str(tmp_path / name))
        assert type(loaded) is type(model)
        assert type(its) is SparseMoeVlmProcessor
        assert not any(module.training for module in loaded.modules())
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_configurations_by_name_file_and_folder(tmp_path):
    tiny = load_config("tiny")
    assert tiny.to_dict() == load_config(PRESET).to_dict()
    assert (
        tiny.text_config.hidden_size
        == json.loads((ROOT / "configuration/models/tiny.json").read_text())["text_config"]["hidden_size"]
    )
    LlamaConfig(hidden_size=64).save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).hidden_size == 64
