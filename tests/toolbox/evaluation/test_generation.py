"""Answers of a model: the same in batches and one by one, without the reference, and with training modes restored."""

import pytest
import torch
from transformers import GenerationConfig

from modeling_sparse_moe_vlm.toolbox.evaluation import generate_answers
from tests.support.processors import assistant, make_image, make_processor, make_speaking_model, user

END = 2


def row(question: str, *images, answer: str = "yes") -> dict:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, assistant(answer)], "images": list(images)}


@pytest.fixture(scope="module")
def model():
    return make_speaking_model()


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture
def calls(model, monkeypatch):
    """Records the arguments of every call of `model.generate`, which still runs."""
    calls: list[dict] = []
    generate = model.generate

    def record(**kwargs):
        calls.append(kwargs | {"training": model.training, "grad": torch.is_grad_enabled()})
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", record)
    return calls


def prompts(processor, calls) -> list[str]:
    return [
        processor.decode(ids[mask.bool()])
        for call in calls
        for ids, mask in zip(call["input_ids"], call["attention_mask"], strict=True)
    ]


def test_the_model_sees_the_questions_and_not_the_answer(model, processor, calls):
    turns = [user("first?"), assistant("one"), user("second?")]
    rows = [
        row("a cat?", make_image(), answer="secret"),
        {"messages": [*turns, assistant("secret")]},
        {"messages": turns},
        {"messages": [*turns, {"role": "tool", "content": "done"}]},
    ]
    generate_answers(model, processor, rows, batch_size=2, max_new_tokens=1)
    begin, asks = (
        "<|im_start|>user\nfirst?<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n",
        "<|im_start|>assistant\n",
    )
    assert prompts(processor, calls) == [
        f"<|im_start|>user\n{'<image>' * 4}a cat?<|im_end|>\n{asks}",
        f"{begin}<|im_start|>user\nsecond?<|im_end|>\n{asks}",
        f"{begin}<|im_start|>user\nsecond?<|im_end|>\n{asks}",
        f"{begin}<|im_start|>user\nsecond?<|im_end|>\n<|im_start|>tool\ndone<|im_end|>\n{asks}",
    ]
    assert [message["content"][0]["text"] for message in rows[1]["messages"]][-1] == "secret"  # the row is unchanged


def test_batches_are_padded_on_the_left_and_in_order(model, processor, calls):
    questions = ["a" * (1 + 7 * number % 5) for number in range(5)]
    rows = [row(question, make_image(number)) for number, question in enumerate(questions)]
    answers = generate_answers(model, processor, rows, batch_size=2, max_new_tokens=3, eos_token_id=None)
    assert [len(call["input_ids"]) for call in calls] == [2, 2, 1]
    for call in calls:
        assert (call["attention_mask"][:, -1] == 1).all()
    assert prompts(processor, calls) == [
        f"<|im_start|>user\n{'<image>' * 4}{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions
    ]
    pixels = torch.cat([call["pixel_values"] for call in calls])
    expected = processor(images=[make_image(number) for number in range(5)], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, expected)
    alone = [generate_answers(model, processor, [one], max_new_tokens=3, eos_token_id=None)[0] for one in rows]
    assert answers == alone
    assert len(set(answers)) > 2
    assert generate_answers(model, processor, [], max_new_tokens=1) == []


def test_batches_answer_as_single_rows(model, processor, tmp_path):
    make_image(1).save(tmp_path / "image.png")
    rows = [row("a cat?", make_image(0)), row("the cat on the mat?"), row("a dog?", tmp_path / "image.png")]
    answers = generate_answers(model, processor, rows, batch_size=2, max_new_tokens=4)
    assert answers == [generate_answers(model, processor, [one], max_new_tokens=4)[0] for one in rows]
    assert len(set(answers)) > 1
    assert answers[2] == generate_answers(model, processor, [row("a dog?", make_image(1))], max_new_tokens=4)[0]


def test_answers_are_the_new_tokens_without_special_ones(model, processor, monkeypatch):
    plain = processor.tokenizer(" cat")["input_ids"]

    def generate(input_ids, **kwargs):
        new = torch.tensor([[*plain, END, 0]]).expand(len(input_ids), -1)
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert generate_answers(model, processor, [row("a?"), row("bbb?", make_image())]) == [" cat", " cat"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_new_tokens": 32, "do_sample": False}),
        ({"max_new_tokens": 5}, {"max_new_tokens": 5, "do_sample": False}),
        ({"do_sample": True, "top_k": 3}, {"max_new_tokens": 32, "do_sample": True, "top_k": 3}),
        ({"max_length": 99}, {"max_length": 99, "do_sample": False}),
        ({"generation_config": GenerationConfig(max_new_tokens=7)}, {"generation_config"}),
    ],
)
def test_arguments_of_generate(model, processor, calls, given, expected):
    """Given arguments take precedence over the defaults."""
    generate_answers(model, processor, [row("a?")], **given)
    inputs = {"input_ids", "attention_mask", "mm_token_type_ids", "training", "grad"}
    actual = {key: value for key, value in calls[0].items() if key not in inputs}
    assert (actual if isinstance(expected, dict) else set(actual)) == expected


def test_a_model_in_training_answers_without_dropout(processor, calls):
    """It also runs without gradients. Afterwards, every module is in its previous mode, even if some are frozen."""
    model = make_speaking_model(attention_dropout=0.9)
    rows = [row("a cat?", make_image(0)), row("the cat on the mat?")]
    expected = generate_answers(model, processor, rows, max_new_tokens=6, eos_token_id=None)
    model.train()
    model.model.vision_tower.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    assert generate_answers(model, processor, rows, max_new_tokens=6, eos_token_id=None) == expected
    assert {name: module.training for name, module in model.named_modules()} == before
    dropped = [
        model.generate(
            **processor(text="the cat", return_tensors="pt"), max_new_tokens=6, do_sample=False, eos_token_id=None
        ).tolist()
        for _ in range(4)
    ]
    assert any(one != dropped[0] for one in dropped), "dropout must be able to change answers"


def test_the_mode_while_generating(model, processor, calls):
    model.train()
    generate_answers(model, processor, [row("a?")], max_new_tokens=1)
    model.eval()
    assert [(call["training"], call["grad"]) for call in calls] == [(False, False)]


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_training_is_restored_after_a_failure(model, processor, training):
    model.train(training)
    with pytest.raises(ValueError, match="row 2 has 0 images"):
        generate_answers(model, processor, [row("a?"), row("b?"), row("c?", None) | {"images": None}], batch_size=1)
    assert model.training == training
    generate_answers(model, processor, [row("a?")], max_new_tokens=1)
    assert model.training == training
    model.eval()


def test_inputs_have_the_models_type(processor):
    model = make_speaking_model().bfloat16()
    seen = []
    model.generate = lambda input_ids, pixel_values, **kwargs: (seen.append(pixel_values.dtype), input_ids)[1]
    assert generate_answers(model, processor, [row("a?", make_image())]) == [""]
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a?"), row("b?"), {"messages": [assistant("yes")]}], "row 2 has nothing to answer"),
        ([row("a?"), row("b?"), {"messages": []}], "row 2: `messages` is empty"),
        ([row("a?"), row("b?"), row("c?", 5)], r"row 2 cannot be processed: images\[0\]\[0\] is not an image"),
        ([row("a?"), {"images": []}], "row 1 lacks `messages`"),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_wrong_rows_are_named(model, processor, rows, message, batch_size):
    with pytest.raises(ValueError, match=f"^{message}"):
        generate_answers(model, processor, rows, batch_size=batch_size, max_new_tokens=1)


def test_batches_of_nothing(model, processor):
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        generate_answers(model, processor, [row("a?")], batch_size=0)
