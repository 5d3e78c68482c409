"""The blind baseline guesses from the questions only, and its guesses also hold for new questions."""

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
    """Returns the accuracy of guessing the most frequent training answer to the same kind of question."""
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


def test_a_table_made_by_hand():
    """Answers to the same question help in kind `c`, where they differ, but not in `d`, where most are "no"."""
    train = rows(
        *[(f"c{number}?", f"answer {number}", "c") for number in range(4) for _ in range(8)],
        *[("often", "no", "d")] * 5,
        *[("seldom", "yes", "d")] * 2,
        *[("other", "no", "d")] * 3,
    )
    guess = BlindBaseline(train)
    assert guess.most_frequent == "answer 0"
    assert guess.most_frequent_of_kind == {"c": "answer 0", "d": "no"}
    assert [guess.answer(f"c{number}?", "c") for number in range(4)] == [f"answer {number}" for number in range(4)]
    assert guess.answer("seldom", "d") == "no"
    assert guess.answer("c9?", "c") == "answer 0"
    test = rows(("c1?", "Answer 1.", "c"), ("c2?", "answer 0", "c"), ("new", "answer 0", "c"), ("seldom", "yes", "d"))
    assert blind_baseline(train, test) == {
        "overall": {"blind": 50.0, "most_frequent_answer": 50.0},
        "c": {"blind": pytest.approx(200 / 3), "most_frequent_answer": pytest.approx(200 / 3)},
        "d": {"blind": 0.0, "most_frequent_answer": 0.0},
    }


@pytest.mark.parametrize(("times", "expected"), [(4, "mode"), (5, "own")])
def test_how_much_gain_is_clear(times, expected):
    """All n held-back rows gain. The gain is clear if n is more than 2 √n, that is, more than four."""
    seen_twice = [(f"b{number}?", "mode", "kind") for number in range(10) for _ in range(2)]
    train = rows(*[("a?", "own", "kind")] * times, *seen_twice)
    assert BlindBaseline(train).answer("a?", "kind") == expected


def test_the_least_count_is_the_one_that_gains_most():
    """Questions seen twice lose and questions seen eight times gain, so only the latter keep their answers."""
    rare = [(f"rare {number}?", answer, "kind") for number in range(10) for answer in ("odd", "mode")]
    often = [(f"often {number}?", f"own {number}", "kind") for number in range(4) for _ in range(8)]
    guess = BlindBaseline(rows(*rare, *often, *[(f"{number}", "mode", "kind") for number in range(40)]))
    assert {guess.answer(f"rare {number}?", "kind") for number in range(10)} == {"mode"}
    assert [guess.answer(f"often {number}?", "kind") for number in range(4)] == [f"own {number}" for number in range(4)]


def test_no_rows():
    with pytest.raises(ValueError, match="`train` has no rows"):
        BlindBaseline(rows(("a?", "b", "c")).select([]))
    assert blind_baseline(rows(("a?", "b", "c")), rows(("a?", "b", "c")).select([])) == {}


def test_rare_questions_get_the_answer_of_their_kind():
    """The most frequent of two answers is luck, but frequent questions with known answers keep them."""
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
