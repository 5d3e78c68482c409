"""The Auto classes, `pipeline` and every way to generate, with our models and upcycled ones from checkpoints."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from tests.support.models import TINY_DECODER
from tests.support.processors import VOCAB_SIZE, make_image, user

pytestmark = pytest.mark.newest

KINDS = ["ours", "upcycled"]
LENGTH = 6
GREEDY = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None}
TOKENIZED = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture(scope="module", params=KINDS)
def loaded(request, checkpoints):
    folder = checkpoints[request.param]
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    return folder, model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def new_tokens(model, inputs, **options) -> list[int]:
    return model.generate(**inputs, **GREEDY | options)[0, inputs["input_ids"].shape[1] :].tolist()


def test_auto_classes(loaded):
    folder, model, processor = loaded
    inputs = processor.apply_chat_template([user(make_image(), "What?")], **TOKENIZED)
    expected = new_tokens(model, inputs)
    again = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(again) is type(model)
    assert new_tokens(again, inputs) == expected


def test_pipeline(loaded):
    folder, model, processor = loaded
    pipe = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    options = {"generate_kwargs": GREEDY, "return_full_text": False}
    chats = [[user(make_image(0), "What?")], [user(make_image(1), "A longer question?")], [user(make_image(2))]]
    answers = [
        processor.decode(new_tokens(model, processor.apply_chat_template(chat, **TOKENIZED)), skip_special_tokens=True)
        for chat in chats
    ]
    assert len(set(answers)) == len(chats)
    for size in (1, 3):
        outputs = pipe(text=chats, batch_size=size, **options)
        assert [output[0]["generated_text"] for output in outputs] == answers
    inputs = processor(text="<image> the cat", images=make_image(), return_tensors="pt")
    plain = processor.decode(new_tokens(model, inputs), skip_special_tokens=True)
    assert pipe(text="<image> the cat", images=make_image(), **options)[0]["generated_text"].endswith(plain)


def foreign_draft_model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    draft = LlamaForCausalLM(LlamaConfig(**TINY_DECODER | {"vocab_size": VOCAB_SIZE})).eval()
    draft.generation_config.eos_token_id = None
    return draft


def test_every_way_to_generate_gives_the_greedy_answer(loaded):
    _, model, processor = loaded
    inputs = processor.apply_chat_template([user(make_image(), "the cat and the image of the cat")], **TOKENIZED)
    expected = new_tokens(model, inputs)
    without = processor.apply_chat_template([user(make_image(1), "the cat and the image of the cat")], **TOKENIZED)
    assert new_tokens(model, without) != expected, "the answer depends on the image"
    for options in (
        {"assistant_model": foreign_draft_model()},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ):
        assert new_tokens(model, inputs, **options) == expected, options


def test_beams_with_a_static_cache(loaded):
    _, model, processor = loaded
    inputs = processor.apply_chat_template([user(make_image(), "What?")], **TOKENIZED)
    expected = new_tokens(model, inputs, num_beams=3)
    assert new_tokens(model, inputs, num_beams=3, cache_implementation="static") == expected


def test_compiled_with_a_static_cache(loaded):
    _, model, processor = loaded
    inputs = processor.apply_chat_template([user(make_image(), "What?")], **TOKENIZED)
    expected = new_tokens(model, inputs)
    forward = model.forward
    model.forward = torch.compile(forward, backend="eager")
    try:
        assert new_tokens(model, inputs, cache_implementation="static") == expected
    finally:
        model.forward = forward


@pytest.mark.parametrize("kind", ["our_text", "upcycled_text"])
def test_models_of_text(kind, checkpoints):
    inputs = {"input_ids": torch.tensor([[40, 41, 42, 43]])}
    models = [
        auto_class.from_pretrained(checkpoints[kind], trust_remote_code=True)
        for auto_class in (AutoModelForCausalLM, AutoModelForMultimodalLM)
    ]
    assert new_tokens(models[0], inputs) == new_tokens(models[1], inputs)
