"""Evaluation on rows of own data: answers, batches, resuming, the blind baseline and intervals."""

import json
import os
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset

from modeling_sparse_moe_vlm.toolbox.data import load_rows
from modeling_sparse_moe_vlm.toolbox.evaluation import Evaluation, evaluate_rows, generate_answers, own_data
from modeling_sparse_moe_vlm.toolbox.evaluation.own_data import (
    confidence_intervals,
    most_frequent_reference,
    result_table,
    without_images,
)
from modeling_sparse_moe_vlm.toolbox.evaluation.prediction_files import fingerprint_of_model, fingerprint_of_rows
from tests.support.processors import assistant, make_image, make_processor, make_speaking_model, speak_printably, user

METRICS = ["exact_match", "vqa_accuracy", "bleu"]
TOKENS = 4


@pytest.fixture(scope="module")
def model():
    return speak_printably(make_speaking_model())


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def rows():
    """Rows whose right answers are known below: the questions have 3, 9, 6 and 1 characters."""
    questions = ["cat", "the mat..", "sat on", "x"]
    images = [make_image(0), None, make_image(1), make_image(2)]
    return load_rows(
        Dataset.from_list(
            [
                {"question": question, "answers": ["no", "no"], "image": image}
                for question, image in zip(questions, images, strict=True)
            ]
        )
    )


@pytest.fixture
def batches(monkeypatch):
    """Records the rows of each batch, which is still answered."""
    recorded = []
    answer = own_data.answer_batch

    def record(model, processor, batch, **kwargs):
        assert kwargs == {"max_new_tokens": TOKENS}
        assert not model.training
        recorded.append((list(batch), [len(row["images"]) for row in batch.values()]))
        return answer(model, processor, batch, **kwargs)

    monkeypatch.setattr(own_data, "answer_batch", record)
    return recorded


def evaluate(model, processor, rows, folder, **kwargs) -> Evaluation:
    return evaluate_rows(model, processor, rows, METRICS, folder, batch_size=2, max_new_tokens=TOKENS, **kwargs)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_predictions_and_scores(model, processor, rows, tmp_path, batches, monkeypatch):
    model.train()
    alone = [generate_answers(model, processor, [row], max_new_tokens=TOKENS)[0] for row in rows]
    blind = [generate_answers(model, processor, [without_images(row)], max_new_tokens=TOKENS)[0] for row in rows]
    assert len(set(alone)) == 4
    assert all(blind[n] != alone[n] for n in (0, 2, 3))
    result = evaluate(model, processor, rows, tmp_path / "out")
    assert model.training
    model.eval()
    # Rows with images first, then by the length of the texts. The blind baseline only answers rows with images again.
    assert batches == [([2, 0], [1, 1]), ([3, 1], [1, 0]), ([2, 0], [0, 0]), ([3], [0])]
    assert lines(tmp_path / "out") == [
        {"source": "the dataset", "row": n, "question": question, "prediction": alone[n]}
        | ({} if n == 1 else {"prediction_without_images": blind[n]})
        | {"references": ["no", "no"], "scores": {"exact_match": 0.0, "vqa_accuracy": 0.0}}
        for n, question in enumerate(["cat", "the mat..", "sat on", "x"])
    ]
    assert result.scores == {"exact_match": 0, "vqa_accuracy": 0, "bleu": 0}
    assert result.intervals == {"exact_match": (0, 0), "vqa_accuracy": (0, 0)}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.jsonl", "run.json"]

    right = [alone[0], alone[1], "no", "no"]
    known = rows.remove_columns("references").add_column("references", [[text, "no"] for text in right])
    for n, own in enumerate(blind):
        assert own not in right or n == 1
    result = evaluate(model, processor, list(known), tmp_path / "out")
    assert result.scores["exact_match"] == 50
    assert result.scores["vqa_accuracy"] == 25
    assert result.blind["exact_match"] == 25  # the row without an image
    assert [line["scores"]["exact_match"] for line in lines(tmp_path / "out")] == [100, 100, 0, 0]
    assert result.as_dict()["intervals"]["exact_match"] == [0, 100]


def test_an_interrupted_evaluation_resumes(model, processor, rows, tmp_path, batches, monkeypatch):
    expected = evaluate(model, processor, rows, tmp_path / "whole")
    whole = lines(tmp_path / "whole")
    batches.clear()
    answer = own_data.answer_batch

    def interrupted(*arguments, **kwargs):
        if len(batches) == 3:
            raise KeyboardInterrupt
        return answer(*arguments, **kwargs)

    folder = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(own_data, "answer_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, processor, rows, folder)
    with (folder / "answers.0.jsonl").open("a") as file:
        file.write('{"number": 3, "predic')  # interrupted while it was written
    batches.clear()
    assert evaluate(model, processor, rows, folder, resume=True) == expected
    assert batches == [([3], [0])]  # only the last batch of the blind baseline is left
    assert lines(folder) == whole

    batches.clear()
    assert evaluate(model, processor, rows, folder, resume=True) == expected  # nothing is left
    assert batches == []
    evaluate(model, processor, rows, folder, blind=False)
    assert len(batches) == 2  # without `resume`, everything is answered again
    assert all("prediction_without_images" not in line for line in lines(folder))
    batches.clear()
    assert evaluate(model, processor, rows, folder, resume=True) == expected
    assert batches == [([2, 0], [0, 0]), ([3], [0])]


def test_resuming_needs_the_same_model_and_data(model, processor, rows, tmp_path):
    evaluate(model, processor, rows, tmp_path, identity={"model": "a"})
    with pytest.raises(ValueError, match=r"cannot be resumed: `model` was 'a' and is now 'b'\. Evaluate without"):
        evaluate(model, processor, rows, tmp_path, identity={"model": "b"}, resume=True)
    with pytest.raises(ValueError, match=r"cannot be resumed: `data` was '[0-9a-f]{16}' and is now '[0-9a-f]{16}'"):
        evaluate(model, processor, rows.select([0, 1, 3, 2]), tmp_path, identity={"model": "a"}, resume=True)
    with pytest.raises(ValueError, match=r"`max_new_tokens` was 4 and is now 5"):
        evaluate_rows(model, processor, rows, METRICS, tmp_path, max_new_tokens=5, resume=True, identity={"model": "a"})


def test_resuming_needs_unchanged_files(model, processor, rows, tmp_path):
    evaluate(model, processor, rows, tmp_path)
    predictions = (tmp_path / "predictions.jsonl").read_text()
    (tmp_path / "predictions.jsonl").write_text(predictions.partition("\n")[2])
    with pytest.raises(ValueError, match=r"predictions.jsonl has 3 readable lines for 4 rows: the file was changed"):
        evaluate(model, processor, rows, tmp_path, resume=True)
    (tmp_path / "predictions.jsonl").write_text(predictions)
    evaluate(model, processor, rows, tmp_path, resume=True)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json cannot be read \(.*\)\. Evaluate without `--resume`"):
        evaluate(model, processor, rows, tmp_path, resume=True)
    evaluate(model, processor, rows, tmp_path)


def test_rows_without_images_have_no_blind_baseline(model, processor, rows, tmp_path, batches):
    result = evaluate(model, processor, rows.select([1]), tmp_path)
    assert result.blind is None
    assert "blind" not in result.as_dict()
    assert batches == [([0], [0])]


def test_order_and_questions_of_conversations(model, processor, tmp_path, batches):
    """The length is that of the texts before the answer, and the question is the last one."""
    rows = [
        {"messages": [user("aa"), assistant("no"), user("b"), assistant("x" * 50)], "images": []},
        {"messages": [user("cccccc"), assistant("no")], "images": []},
        {"messages": [user("ddd"), assistant("x" * 60)], "images": []},
    ]
    evaluate(model, processor, rows, tmp_path)
    assert [numbers for numbers, _ in batches] == [[1, 0], [2]]
    assert [(line["source"], line["row"], line["question"]) for line in lines(tmp_path)] == [
        (None, None, "b"),
        (None, None, "cccccc"),
        (None, None, "ddd"),
    ]


def test_processes_share_the_batches(model, processor, rows, tmp_path, batches, monkeypatch):
    """The second of two processes answers every second batch, and leaves the scores to the first."""
    state = SimpleNamespace(process_index=1, num_processes=2, is_main_process=False, wait_for_everyone=lambda: None)
    monkeypatch.setattr(own_data, "PartialState", lambda: state)
    assert evaluate(model, processor, rows, tmp_path) is None
    assert batches == [([3, 1], [1, 0]), ([3], [0])]
    assert [path.name for path in tmp_path.iterdir()] == ["answers.1.jsonl"]
    # A process that works alone answers all rows.
    batches.clear()
    assert evaluate(model, processor, rows, tmp_path / "alone", share=False).scores["exact_match"] == 0
    assert [numbers for numbers, _ in batches] == [[2, 0], [3, 1], [2, 0], [3]]
    assert len(lines(tmp_path / "alone")) == 4


def test_fingerprints(tmp_path):
    row = {"messages": [user("q"), assistant("a")], "source": "s", "row": 0, "references": ["a", "b"]}
    others = [
        row | {"references": ["a"]},
        row | {"source": "t"},
        row | {"row": 1},
        row | {"messages": [user("p"), assistant("a")]},
        row | {"messages": [assistant("q"), user("a")]},
    ]
    assert len({fingerprint_of_rows([each]) for each in [row, *others]}) == 6
    assert fingerprint_of_rows([row, others[0]]) != fingerprint_of_rows([others[0], row])

    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"12")
    before = fingerprint_of_model(str(tmp_path))
    (tmp_path / "README.md").write_text("a card")
    assert fingerprint_of_model(str(tmp_path)) == before
    os.utime(weights, ns=(0, 0))
    changed = fingerprint_of_model(str(tmp_path))
    weights.write_bytes(b"123")
    os.utime(weights, ns=(0, 0))
    assert len({before, changed, fingerprint_of_model(str(tmp_path))}) == 3
    assert fingerprint_of_model("user/name", "abc") == "abc"


def test_errors(model, processor, rows, tmp_path):
    with pytest.raises(ValueError, match=r"^there are no rows to evaluate\.$"):
        evaluate(model, processor, [], tmp_path)
    for name in ("batch_size", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            evaluate_rows(model, processor, rows, METRICS, tmp_path, **{name: 0})
    row = {"messages": [user("a"), assistant("b"), user("c")], "images": [], "source": "my.jsonl", "row": 7}
    with pytest.raises(ValueError, match=re.escape("my.jsonl, row 7: the last message must be from the assistant")):
        evaluate(model, processor, [row], tmp_path)


def test_without_images():
    image = {"type": "image"}
    row = {
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": "a"}, image]}, assistant("b")],
        "images": [1, 2],
        "row": 3,
    }
    assert without_images(row) == {"messages": [user("a"), assistant("b")], "images": [], "row": 3}
    only_image = {"messages": [{"role": "user", "content": [image]}, {"role": "assistant", "content": "b"}]}
    assert without_images(only_image)["messages"] == [user(""), {"role": "assistant", "content": "b"}]


def test_most_frequent_reference():
    rows = [{"messages": [user("q"), assistant(text)], "references": ["z"]} for text in "abb"]
    assert most_frequent_reference(rows) == "b"


def test_confidence_intervals():
    """The mean of n values of 0 or 100 has the standard deviation 50 / √n."""
    rows = [{"a": 100.0 * (n % 2), "b": 7.0} for n in range(400)]
    intervals = confidence_intervals(rows)
    assert intervals["a"] == pytest.approx((50 - 1.96 * 2.5, 50 + 1.96 * 2.5), abs=0.5)
    assert intervals["b"] == (7, 7)
    assert confidence_intervals(rows) == intervals


def test_table():
    results = {
        "mine": Evaluation({"anls": 50.123, "bleu": 7.0}, {"anls": 1.0, "bleu": 2.0}, {"anls": (40.0, 60.0)}),
        "other": Evaluation({"anls": 1.0, "bleu": 2.0}),
    }
    assert result_table(results, {"anls": 3.0, "bleu": 4.0}).splitlines() == [
        "model                 anls                  bleu",
        "mine                  50.12 [40.00, 60.00]  7.00",
        "mine, without images  1.00                  2.00",
        "other                 1.00                  2.00",
        "most frequent answer  3.00                  4.00",
    ]
    assert "most frequent" not in result_table(results)
