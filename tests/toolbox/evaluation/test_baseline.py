"""What can be guessed from questions alone: no more is claimed than holds for questions that training did not ask."""

import random

import datasets
import pytest
from datasets import Dataset

from modeling_sparse_moe_vlm.toolbox.demo import scenes
from modeling_sparse_moe_vlm.toolbox.evaluation import BlindBaseline, blind_baseline


def rows(*texts: tuple[str, str, str]) -> Dataset:
    return Dataset.from_list(
        [{"question": question, "answer": answer, "kind": kind} for question, answer, kind in texts]
    )


def accuracy(guesses: list[str], test: Dataset) -> float:
    return 100 * sum(guess == answer for guess, answer in zip(guesses, test["answer"], strict=True)) / len(test)


def accuracy_of_kind(train: Dataset, test: Dataset) -> float:
    """That of the answer that training saw most often for the kind of question."""
    by_kind = BlindBaseline(train).most_frequent_of_kind
    return accuracy([by_kind[kind] for kind in test["kind"]], test)


def test_falls_back_from_question_to_kind_to_all():
    train = rows(*[("a?", "x", "one")] * 12, *[("b?", "y", "two")] * 20, *[("c?", "z", "one")] * 14)
    guess = BlindBaseline(train)
    assert [guess.answer("a?", "one"), guess.answer("?", "one"), guess.answer("?", "three")] == ["x", "z", "y"]
    test = rows(("a?", "X.", "one"), ("?", "z", "one"), ("?", "y", "three"), ("b?", "other", "two"))
    assert blind_baseline(train, test) == {
        "overall": {"blind": 75, "most_frequent_answer": 25},
        "one": {"blind": 100, "most_frequent_answer": 50},
        "three": {"blind": 100, "most_frequent_answer": 100},
        "two": {"blind": 0, "most_frequent_answer": 0},
    }


def test_rare_questions_get_the_answer_of_their_kind():
    """The most frequent of two answers is luck; frequent questions whose answers are known keep their own."""
    rng = random.Random(0)
    rare = [(f"rare {number // 2}?", rng.choice(["yes", "yes", "no"]), "kind") for number in range(400)]
    often = [(f"often {number % 4}?", "no", "kind") for number in range(60)]
    guess = BlindBaseline(rows(*rare, *often))
    assert {guess.answer(question, "kind") for question, _, _ in rare} == {"yes"}
    assert {guess.answer(question, "kind") for question, _, _ in often} == {"no"}


def test_questions_that_settle_the_answer_keep_it_even_if_rare():
    texts = [(f"which {number // 2}?", f"answer {number // 2}", "kind") for number in range(100)]
    test = rows(*texts)
    guess = BlindBaseline(rows(*texts, *[("?", "mode", "kind")] * 10))
    assert accuracy([guess.answer(question, "kind") for question in test["question"]], test) == 100


@pytest.mark.parametrize("num_train", [44, 220, 1100, 4400])
def test_not_worse_than_the_answer_of_the_kind_on_scenes(num_train):
    datasets.disable_progress_bars()
    test = scenes("test", 3300, cell_size=8)
    for seed in range(2):
        train = scenes("train", num_train, seed=seed, cell_size=8)
        blind = blind_baseline(train, test)["overall"]["blind"]
        assert blind >= accuracy_of_kind(train, test) - 0.5
