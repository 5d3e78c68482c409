"""`pipeline("image-text-to-text")` with a checkpoint: chats, batches and plain prompts."""

import pytest
import torch
from transformers import AutoProcessor, pipeline

from tests.support.processors import assistant, make_image, make_processor, make_speaking_model, user

# For comparisons, every row must generate the same number of tokens, without sampling.
KWARGS = {"generate_kwargs": {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    make_speaking_model().save_pretrained(path)
    make_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["registered", "remote code"])
def pipe(request, folder):
    return pipeline("image-text-to-text", model=str(folder), trust_remote_code=request.param == "remote code")


def expected_answer(pipe, messages) -> str:
    inputs = pipe.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    output = pipe.model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    return pipe.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_where_the_code_comes_from(pipe, folder):
    processor = AutoProcessor.from_pretrained(folder)
    assert type(pipe.processor).__name__ == type(processor).__name__
    assert type(pipe.model).__name__ == "SparseMoeVlmForConditionalGeneration"


def test_chat(pipe):
    messages = [user(make_image(0), "What is <image> here?", make_image(1))]
    expected = expected_answer(pipe, messages)
    output = pipe(text=messages, **KWARGS)
    assert output[0]["generated_text"][:-1] == messages
    assert output[0]["generated_text"][-1] == {"role": "assistant", "content": expected}
    assert pipe(text=messages, return_full_text=False, **KWARGS)[0]["generated_text"] == expected


def test_several_chats(pipe):
    chats = [[user(make_image(0), "What?")], [user("A question without an image")], [user(make_image(1))]]
    outputs = pipe(text=chats, return_full_text=False, **KWARGS)
    assert [output[0]["generated_text"] for output in outputs] == [expected_answer(pipe, chat) for chat in chats]


def test_chats_in_a_batch(pipe):
    """The pipeline can only batch chats with the same kinds of inputs."""
    chats = [[user(make_image(0), "What?")], [user(make_image(1), "A longer question")], [user(make_image(2))]]
    outputs = pipe(text=chats, return_full_text=False, batch_size=3, **KWARGS)
    assert [output[0]["generated_text"] for output in outputs] == [expected_answer(pipe, chat) for chat in chats]


def test_continuing_an_answer(pipe):
    messages = [user(make_image(), "What?"), assistant("A c")]
    answer = pipe(text=messages, return_full_text=False, **KWARGS)[0]["generated_text"]
    assert isinstance(answer, str)
    assert pipe(text=messages, **KWARGS)[0]["generated_text"][-1]["content"][0]["text"].startswith("A c")


def test_plain_prompts(pipe):
    image = make_image()
    text = "<image> the cat"
    inputs = pipe.processor(text=text, images=image, return_tensors="pt")
    output = pipe.model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    new = pipe.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    alone = pipe(images=image, text=text, **KWARGS)
    assert alone[0]["generated_text"].endswith(new)
    both = pipe(images=[image, make_image(1)], text=[text, "<image>"], **KWARGS)
    assert len(both) == 2
    assert str(both[0]).count(new) == 1
    assert pipe(text="the cat", **KWARGS)[0]["generated_text"].startswith("the cat")


def test_precision(folder):
    half = pipeline("image-text-to-text", model=str(folder), dtype=torch.bfloat16)
    assert half.model.dtype is torch.bfloat16
    assert isinstance(half(text=[user(make_image(), "What?")], **KWARGS)[0]["generated_text"], list)
