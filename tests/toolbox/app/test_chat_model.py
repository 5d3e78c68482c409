"""`ChatModel`: its prompts, its answers, and the figures of every answer."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_sparse_moe_vlm.toolbox.app import ChatModel, Settings
from modeling_sparse_moe_vlm.toolbox.app.answers import NO_ATTENTION, NO_EXPERTS, NO_IMAGE
from modeling_sparse_moe_vlm.toolbox.app.loading import read_attention_matrices
from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config
from modeling_sparse_moe_vlm.toolbox.expert_lora.adapted_layer import FactoredExpertsLayer
from modeling_sparse_moe_vlm.toolbox.modality_weights.explanation import explain
from tests.support.in_tree_models import TEXT
from tests.support.in_tree_moe import randomise
from tests.support.processors import (
    VOCAB_SIZE,
    assistant,
    make_image,
    make_processor,
    make_speaking_model,
    make_tokenizer,
    speak_printably,
    user,
)
from tests.support.upcycled import make_speaking
from tests.toolbox.upcycling.test_processors import make_llava_processor

QUESTION = [user(make_image(), "Where is the cat?")]
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"


def make_chat(**options) -> ChatModel:
    model = make_speaking_model(**options)
    speak_printably(model)
    read_attention_matrices(model)
    return ChatModel(model, make_processor())


def make_language_chat(template: str | None = TEMPLATE) -> ChatModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT | {"vocab_size": VOCAB_SIZE})).eval()
    speak_printably(model)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return ChatModel(model, tokenizer)


class LlavaChat(ChatModel):
    """A LLaVA with our processor, whose modality ids it does not accept."""

    def _inputs(self, messages, images):
        inputs = super()._inputs(messages, images)
        del inputs["mm_token_type_ids"]
        return inputs


@pytest.fixture(scope="module")
def chat() -> ChatModel:
    return make_chat()


def test_as_explained():
    """The figures equal those of `explain`, which requests all attention matrices in another forward pass."""
    chat = make_chat()
    ours = chat.answer(QUESTION, Settings(max_new_tokens=32))
    theirs = explain(chat.model, chat.processor, make_image(), "Where is the cat?")
    assert ours.text == "".join(theirs.words).strip()
    assert " ".join(ours.words) == " ".join(ours.text.split())
    assert len(ours.words) > 1
    np.testing.assert_allclose(ours.heat[0], theirs.looked.numpy(), rtol=1e-3)
    np.testing.assert_array_equal(ours.experts[0], theirs.experts.numpy())
    assert ours.layers == [0, 1]
    assert ours.groups == [[("joint", 4)]] * 2
    assert (ours.alpha_note, ours.heat_note, ours.experts_note) == ("", "", "")


def test_alpha_of_a_word_is_the_mean_of_its_tokens():
    chat = make_chat()
    answer = chat.answer(QUESTION, Settings(max_new_tokens=32))
    theirs = explain(chat.model, chat.processor, make_image(), "Where is the cat?")
    for ours, of_tokens in ((answer.alpha, theirs.alpha), (answer.count_free_alpha, theirs.count_free_alpha)):
        by_word: list[list[float]] = []
        for piece, value in zip(theirs.words, of_tokens.tolist()):
            if not by_word or piece[0].isspace():
                by_word.append([])
            by_word[-1].append(value)
        assert len({len(values) for values in by_word}) > 1
        np.testing.assert_allclose(ours, [np.mean(values) for values in by_word], rtol=1e-4)


def test_several_images_in_several_turns(chat):
    """Each image has its own tokens and experts, and the heat of all images sums to 1."""
    first, second, third = (make_image(seed) for seed in range(3))
    messages = [user(first, second, "Which is larger?"), assistant("the cat"), user("and this?", third)]
    answer = chat.answer(messages, Settings(max_new_tokens=6))
    assert [cells.shape for cells in answer.heat] == [(2, 2)] * 3
    assert sum(cells.sum() for cells in answer.heat) == pytest.approx(1.0)
    assert all(cells.min() > 0 for cells in answer.heat)
    assert len({cells.tobytes() for cells in answer.heat}) == 3
    assert [cells.shape for cells in answer.experts] == [(2, 2, 2)] * 3


def test_sliders_move_the_numbers(chat):
    plain, more, guided = (
        chat.answer(QUESTION, Settings(max_new_tokens=1, **options))
        for options in ({}, {"image_prior": 4.0}, {"guidance": 1.0})
    )
    assert more.alpha[0] > plain.alpha[0] + 0.05
    assert guided.alpha[0] != plain.alpha[0]


def test_settings():
    assert Settings().steering == {}
    assert Settings().decoding == {"max_new_tokens": 128, "do_sample": False}
    settings = Settings(image_prior=0.5, guidance=1.5, max_new_tokens=3, temperature=0.7)
    assert settings.steering == {"modality_priors": {"image": 0.5}, "modality_guidance": 1.5}
    assert settings.decoding == {"max_new_tokens": 3, "do_sample": True, "temperature": 0.7}


def test_without_images(chat):
    answer = chat.answer([user("Where is the cat?")], Settings(max_new_tokens=4))
    assert answer.text
    assert answer.alpha == answer.heat == answer.experts == []
    assert answer.alpha_note == "There is no image in the conversation: all attention is on the text."
    assert answer.heat_note == answer.experts_note == NO_IMAGE


def test_a_model_of_another_type(chat):
    """Pixel values have the dtype of the model."""
    model = make_chat().model.to(torch.bfloat16)
    assert ChatModel(model, chat.processor).answer(QUESTION, Settings(max_new_tokens=2)).heat


def test_an_answer_has_no_spaces_around_it(chat, monkeypatch):
    monkeypatch.setattr(chat, "_decode", lambda tokens: " a cat\n")
    assert chat.answer(QUESTION, Settings(max_new_tokens=1)).text == "a cat"


def test_an_empty_answer():
    chat = make_chat()
    config = chat.model.generation_config
    config.suppress_tokens = None
    config.forced_eos_token_id = config.eos_token_id = 2
    answer = chat.answer(QUESTION, Settings(max_new_tokens=1))
    assert (answer.text, answer.words) == ("", [])
    assert answer.alpha_note == answer.heat_note == answer.experts_note == "The answer is empty."


def test_matrices_that_are_not_known():
    """They are not known without eager attention. Our own models compute them on request."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = LlavaConfig(
        text_config=TEXT | {"model_type": "llama", "vocab_size": VOCAB_SIZE}, vision_config=vision,
        image_token_index=3, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    speak_printably(model)
    chat = LlavaChat(model, make_processor())
    answer = chat.answer(QUESTION, Settings(max_new_tokens=4))
    assert answer.heat_note == NO_ATTENTION
    assert answer.experts_note == NO_EXPERTS
    assert len(answer.alpha) == len(answer.words) > 0
    read_attention_matrices(model)
    answer = chat.answer(QUESTION, Settings(max_new_tokens=4))
    assert answer.heat[0].sum() == pytest.approx(1.0)
    assert answer.heat_note == ""


def test_tokens_that_do_not_form_a_grid(chat, monkeypatch):
    monkeypatch.setattr(type(chat), "_is_image", lambda self, inputs: np.arange(inputs["input_ids"].shape[1]) < 6)
    answer = chat.answer(QUESTION, Settings(max_new_tokens=4))
    message = "It is not known which tokens cover which part of the image: 6 image tokens do not form a square."
    assert answer.heat_note == answer.experts_note == message
    assert answer.alpha


class Parts(ChatModel):
    """Splits image tokens of given prompts into grids."""

    def __init__(self, prompts, **processor):
        self.model = SimpleNamespace(config=SimpleNamespace(model_type="a", image_token_id=3, get_text_config=dict))
        self.processor = SimpleNamespace(**processor)
        self.prompts = prompts

    def _inputs(self, messages, images):
        (message,) = messages
        assert message == {"role": "user", "content": [{"type": "image", "image": images[0]}]}
        return {"input_ids": torch.tensor([self.prompts[images[0].size]])}


def test_shapes_of_the_image_processor():
    """They are rows and columns of patches. Qwen-VL merges squares of patches into tokens."""
    chat = Parts({}, image_processor=SimpleNamespace(merge_size=2))
    inputs = {
        "input_ids": torch.tensor([[3] * 6 + [1] + [3] * 2]),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 4]]),
    }
    first, second = chat._grids(inputs, [Image.new("RGB", (6, 4)), Image.new("RGB", (4, 2))])
    assert first.positions.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert second.positions.tolist() == [[7, 8]]


def test_the_processor_knows_how_tiles_are_arranged():
    """An image of 10 × 17 pixels has 2 × 3 tiles, although 1 × 6 or 3 × 2 would be possible."""
    grids = {(17, 10): (2, 3), (3, 9): (6, 1)}
    chat = Parts(
        {size: [1] + [3] * 7 for size in grids},
        image_seq_length=1,
        tile_grid=lambda height, width: grids[width, height],
    )
    inputs = {"input_ids": torch.tensor([[1] + [3] * 7 + [1] + [3] * 7])}
    first, second = chat._grids(inputs, [Image.new("RGB", size) for size in grids])
    assert first.positions.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert first.overview.tolist() == [[7]]
    assert second.positions.tolist() == [[9], [10], [11], [12], [13], [14]]


@pytest.mark.parametrize("name", ["image_seq_length", "image_seq_len"])
def test_images_with_different_numbers_of_tiles(name):
    """The tokens of each image are counted in a separate prompt."""
    chat = Parts({(2, 1): [1, 3, 3, 3], (1, 1): [1, 3, 3]}, **{name: 1})
    inputs = {"input_ids": torch.tensor([[1, 3, 3, 3, 3, 3]])}
    first, second = chat._grids(inputs, [Image.new("RGB", (2, 1)), Image.new("RGB", (1, 1))])
    assert first.positions.tolist() == [[1, 2]]
    assert first.overview.tolist() == [[3]]
    assert second.positions.tolist() == [[4]]
    assert second.overview.tolist() == [[5]]


def test_upcycled_models(tmp_path):
    speak_printably(make_speaking("llava", "isolated", num_experts=4)).save_pretrained(tmp_path)
    make_llava_processor().save_pretrained(tmp_path)
    chat = ChatModel.load(str(tmp_path))
    messages = [user(make_image(), make_image(1), "Where is the cat?")]
    answer = chat.answer(messages, Settings(max_new_tokens=6))
    assert answer.groups == [[("text", 2), ("image", 2)]] * 2
    assert {int(expert) for cells in answer.experts for expert in cells.flat} <= {2, 3}, "experts of images"
    assert sum(cells.sum() for cells in answer.heat) == pytest.approx(1.0)
    steered = chat.answer(messages, Settings(image_prior=4.0, max_new_tokens=6))
    assert steered.alpha[0] > answer.alpha[0] + 0.05


# ---------------------------------------------------------------- language models


def test_language_models():
    chat = make_language_chat()
    assert not chat.reads_images
    answer = chat.answer([user("the cat")], Settings(max_new_tokens=4))
    inputs = chat.tokenizer("user: the cat\n", return_tensors="pt", return_token_type_ids=False)
    expected = chat.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.text == chat.tokenizer.decode(expected).strip()
    with pytest.raises(ValueError, match="reads only text: remove the images"):
        chat.answer(QUESTION)


def test_a_model_without_a_chat_template_continues_the_text():
    chat = make_language_chat(None)
    answer = chat.answer([user("the cat"), assistant("sat"), user("on")], Settings(max_new_tokens=4))
    inputs = chat.tokenizer("the cat\nsat\non", return_tensors="pt", return_token_type_ids=False)
    expected = chat.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.text == chat.tokenizer.decode(expected).strip()


def test_a_processor_without_a_chat_template(chat, monkeypatch):
    monkeypatch.setattr(chat.processor, "chat_template", None)
    answer = chat.answer([user(make_image(), make_image(1), "the cat")], Settings(max_new_tokens=4))
    assert [cells.shape for cells in answer.heat] == [(2, 2)] * 2


# ---------------------------------------------------------------- mistakes


def test_too_long():
    chat = make_chat(max_position_embeddings=40)
    length = chat._inputs(QUESTION, [])["input_ids"].shape[1]
    chat.answer(QUESTION, Settings(max_new_tokens=40 - length))
    message = f"it has {length} tokens, and with up to {41 - length} new tokens it exceeds the 40 tokens"
    with pytest.raises(ValueError, match=message):
        chat.answer(QUESTION, Settings(max_new_tokens=41 - length))
    assert chat.answer([user("the cat")], Settings(max_new_tokens=2)).text, "it still answers"


def test_text_that_cannot_be_encoded(chat):
    with pytest.raises(ValueError, match="message"):
        chat.answer([user("\ud800")])


def test_one_answer_at_a_time(chat):
    """A second thread waits for the first one."""
    running, most = [], []

    def on_text(piece: str) -> None:
        running.append(threading.get_ident())
        most.append(len(set(running)))

    def ask() -> None:
        chat.answer(QUESTION, Settings(max_new_tokens=8), on_text)
        running.clear()

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with a model, an adapter of its experts and an adapter of its attention."""
    folder = tmp_path_factory.mktemp("saved")
    chat = make_chat()
    chat.model.save_pretrained(folder / "model")
    chat.processor.save_pretrained(folder / "model")
    configs = {
        "experts": lambda model: expert_lora_config(model, r=2),
        "attention": lambda model: LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    }
    for seed, (name, config) in enumerate(configs.items()):
        model = make_chat().model
        adapted = randomise(get_peft_model(model, config(model)), seed)
        adapted.save_pretrained(folder / name)
    return folder


def test_adapters(saved):
    plain = ChatModel.load(str(saved / "model"))
    assert plain.adapters == ["none"]
    chat = ChatModel.load(
        str(saved / "model"), {"of-experts": str(saved / "experts"), "of-attention": str(saved / "attention")}
    )
    assert chat.adapters == ["none", "of-experts", "of-attention"]
    assert any(isinstance(module, FactoredExpertsLayer) for module in chat.model.modules()), "they run factored"
    names = ["none", "of-experts", "of-attention", "none", "of-experts"]
    answers = [chat.answer(QUESTION, Settings(name, max_new_tokens=6)) for name in names]
    alphas = [answer.alpha for answer in answers]
    assert alphas[0] == alphas[3] == plain.answer(QUESTION, Settings(max_new_tokens=6)).alpha
    assert alphas[1] == alphas[4]
    assert len({str(alpha) for alpha in alphas}) == 3
    assert all(answer.heat and answer.experts for answer in answers)
    with pytest.raises(ValueError, match="no adapter 'other': choose one of none, of-experts, of-attention"):
        chat.answer(QUESTION, Settings("other"))


def test_an_image_is_read_upright(tmp_path):
    from modeling_sparse_moe_vlm.toolbox.app.chat_model import read_image

    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    read = read_image(str(tmp_path / "a.png"))
    assert (read.mode, read.size) == ("RGB", (2, 4))
    assert read.getpixel((0, 0)) == (255, 255, 255)
