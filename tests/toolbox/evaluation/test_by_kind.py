"""Scores by kind of question, and tables of these scores."""

import pytest
from datasets import Dataset

from modeling_sparse_moe_vlm.toolbox.evaluation.by_kind import example_answers, score_by_kind, score_table


def rows(*texts: tuple[str, str, str]) -> Dataset:
    return Dataset.from_list(
        [{"question": question, "answer": answer, "kind": kind, "image": None} for question, answer, kind in texts]
    )


TRAIN = rows(*[("Where?", "left", "place")] * 3, ("Where?", "right", "place"), ("Two?", "yes", "count"))
TEST = rows(("Two?", "yes", "count"), ("Where?", "left", "place"), ("Three?", "no", "count"), ("Where?", "up", "place"))
SCORES = {
    "overall": {"blind": 50.0, "most_frequent_answer": 25.0, "model": 75.0},
    "count": {"blind": 50.0, "most_frequent_answer": 50.0, "model": 50.0},
    "place": {"blind": 50.0, "most_frequent_answer": 50.0, "model": 100.0},
}


def test_scores():
    assert score_by_kind(TRAIN, TEST, ["yes", "Left.", "yes", "up"]) == SCORES


def test_answers_that_are_not_as_many_as_the_rows_are_an_error():
    with pytest.raises(ValueError, match="3 predictions for 4 references"):
        score_by_kind(TRAIN, TEST, ["yes"] * 3)


def test_table():
    assert score_table(SCORES).splitlines() == [
        "kind of question       model   blind  most frequent answer",
        "count                   50.0    50.0                  50.0",
        "place                  100.0    50.0                  50.0",
        "overall                 75.0    50.0                  25.0",
    ]


def test_examples():
    long = "x" * 60
    test = rows(("Where?", "up", "place"), (long, long, "count"), ("Where?", "left", "place"))
    lines = example_answers(TRAIN, test, ["down", long, "left"], count=2).splitlines()
    cells = [[line[:56], line[56:84], line[84:112], line[112:132], line[132:]] for line in lines]
    assert [[cell.strip() for cell in line] for line in cells] == [
        ["question", "right answer", "model", "blind", "most frequent"],
        ["Where?", "up", "down", "left", "left"],
        ["x" * 55, "x" * 27, "x" * 27, "yes", "left"],
    ]
    assert len(example_answers(TRAIN, test, ["a", "b", "c"]).splitlines()) == 4
