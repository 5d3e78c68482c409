"""A model answers: in batches as alone, with pictures of any form, and its mode of training is left as it was."""

import pytest

from modeling_sparse_moe_vlm.toolbox.evaluation import exact_match, generate_answers
from tests.support.processors import assistant, make_picture, make_processor, make_speaking_model


def row(question: str, *images) -> dict:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, assistant("yes")], "images": list(images)}


@pytest.fixture(scope="module")
def model():
    return make_speaking_model()


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def test_batches_answer_as_single_rows(model, processor, tmp_path):
    make_picture(1).save(tmp_path / "picture.png")
    rows = [row("a cat?", make_picture(0)), row("the cat on the mat?"), row("a dog?", tmp_path / "picture.png")]
    answers = generate_answers(model, processor, rows, batch_size=2, max_new_tokens=4)
    assert answers == [generate_answers(model, processor, [one], max_new_tokens=4)[0] for one in rows]
    assert len(set(answers)) > 1
    assert answers[2] == generate_answers(model, processor, [row("a dog?", make_picture(1))], max_new_tokens=4)[0]


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_training_is_restored_after_a_failure(model, processor, training):
    model.train(training)
    with pytest.raises(ValueError, match="row 2 has 0 pictures"):
        generate_answers(model, processor, [row("a?"), row("b?"), row("c?", None) | {"images": None}], batch_size=1)
    assert model.training == training
    generate_answers(model, processor, [row("a?")], max_new_tokens=1)
    assert model.training == training
    model.eval()


def test_exact_match():
    assert exact_match(["Cat.", " dog", "3"], ["cat", "dog", "2"]) == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="1 predictions for 2"):
        exact_match(["a"], ["a", "b"])
