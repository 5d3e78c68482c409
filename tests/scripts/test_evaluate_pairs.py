"""`evaluate MODEL DATA` for retrieval models: figures, files, cards and mistakes."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from modeling_sparse_moe_vlm.toolbox.commands.evaluate_data import write_report
from modeling_sparse_moe_vlm.toolbox.commands.evaluate_pairs import recall_table
from modeling_sparse_moe_vlm.toolbox.data import load_pairs
from modeling_sparse_moe_vlm.toolbox.evaluation import evaluate_retrieval
from tests.support.processors import make_image, make_processor, make_speaking_model
from tests.support.retrieval import make_retrieval_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two retrieval models, a model that answers, an adapter, and pairs: a file with a bad row, and a folder."""
    folder = tmp_path_factory.mktemp("pairs")
    model = make_retrieval_model()
    for name in ("first", "second"):
        model.save_pretrained(folder / name)
        make_processor().save_pretrained(folder / name)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(-2)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    make_speaking_model().save_pretrained(folder / "answers")
    make_processor().save_pretrained(folder / "answers")
    rows = []
    for number in range(7):
        make_image(number).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "captions": [f"the cat {'sat ' * (number + i)}mat" for i in (0, 3)]})
    rows.append({"image": "1.png", "caption": "on the mat", "image_id": "b"})
    rows.append({"image": "1.png", "caption": "and the cat", "image_id": "b"})
    (folder / "good.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rows.insert(2, {"image": "gone.png", "caption": "a"})
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "splits").mkdir()
    for split, number in (("train", 3), ("test", 4)):
        lines = [json.dumps(row | {"image": f"{folder}/{row['image']}"}) for row in rows[3 : 3 + number]]
        (folder / f"splits/{split}.jsonl").write_text("\n".join(lines))
    return folder


def test_models_side_by_side(folder, run_verb, tmp_path):
    out, skipped = tmp_path / "out", tmp_path / "skipped.jsonl"
    options = ["--on-bad-row", "skip", "--bad-rows", skipped, "--batch-size", "4", "--output-dir", out]
    skipped.write_text("old")
    models = [folder / "first", folder / "second"]
    arguments = [*models, "--data", folder / "data.jsonl", *options, "--task", "retrieval", "--update-card"]
    report = json.loads(run_verb("evaluate", *arguments, "--json"))
    assert report == json.loads((out / "results.json").read_text())
    assert report["data"] == {
        "source": str(folder / "data.jsonl"),
        "split": None,
        "rows": 9,
        "images": 8,
        "captions": 16,
        "skipped": 1,
    }
    assert json.loads(skipped.read_text())["row"] == 2
    rows = load_pairs(folder / "good.jsonl")
    for name in ("first", "second"):
        model = AutoModel.from_pretrained(folder / name)
        expected = evaluate_retrieval(model, make_processor(), rows)
        assert report["models"][name] == {"scores": pytest.approx(expected)}
        entries = [json.loads(line) for line in (out / name / "ranks.jsonl").read_text().splitlines()]
        assert [(entry["row"], entry["captions"]) for entry in entries] == [
            (n if n < 2 else n + 1, row["captions"])
            for n, row in enumerate(rows.remove_columns(["images", "negatives"]))
        ]
        assert entries[0].keys() == {"source", "row", "captions", "image_to_text", "text_to_image"}
        assert [len(entry["text_to_image"]) for entry in entries] == [2] * 7 + [1, 1]
        assert entries[7]["image_to_text"] == entries[8]["image_to_text"]  # of the same image
        found = [rank for entry in entries for rank in entry["text_to_image"]]
        assert 100 * sum(rank == 1 for rank in found) / 16 == pytest.approx(expected["text_to_image/recall@1"])
        found = [entry["image_to_text"] for entry in entries[:8]]
        assert 100 * sum(rank <= 5 for rank in found) / 8 == pytest.approx(expected["image_to_text/recall@5"])
        results = ModelCard.load(folder / name / "README.md").data.eval_results
        assert {(r.task_type, r.dataset_name, r.dataset_split, r.metric_type, r.metric_value) for r in results} == {
            ("image-text-retrieval", "data", None, metric, round(value, 2)) for metric, value in expected.items()
        }
    assert report["models"]["first"] != report["models"]["second"]

    # A folder with splits, fewer rows, an adapter, and as a table
    arguments = [folder / "second", folder / "splits", "--output-dir", tmp_path / "adapted"]
    plain = run_verb("evaluate", *arguments)
    assert plain.splitlines()[0].endswith("splits, split test, images with captions: 4 rows, 0 skipped")
    assert plain.splitlines()[1].split() == ["model", "direction", "recall@1", "recall@5", "recall@10", "median_rank"]
    assert [line.split()[:2] for line in plain.splitlines()[2:]] == [
        ["second", "image_to_text"],
        ["second", "text_to_image"],
    ]
    adapted = run_verb("evaluate", *arguments, "--adapter", folder / "adapter")
    assert adapted != plain
    fewer = run_verb("evaluate", *arguments, "--split", "train", "--max-rows", "2")
    assert fewer.splitlines()[0].endswith("split train, images with captions: 2 rows, 0 skipped")


def test_table():
    scores = {
        f"{way}/{name}": 1.0 for way in ("image_to_text", "text_to_image") for name in ("recall@1", "median_rank")
    }
    assert recall_table({"mine": scores | {"text_to_image/median_rank": 12.5}}).splitlines() == [
        "model  direction      recall@1  median_rank",
        "mine   image_to_text  1.00      1.00",
        "mine   text_to_image  1.00      12.50",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["first", "answers", "second", "--data", "data.jsonl"],
            "retrieval models (first, second) and models that generate answers (answers) have different metrics",
        ),
        (["answers", "data.jsonl", "--task", "retrieval"], "`--task retrieval` needs a retrieval model, but answers"),
        (["first", "data.jsonl", "--task", "vqa"], "`--task vqa` needs a model that generates answers, but first"),
        (["first", "data.jsonl", "--metrics", "anls"], "`--metrics` has no effect on retrieval models"),
        (["first", "data.jsonl", "--no-blind"], "`--no-blind` has no effect on retrieval models"),
        (["first", "data.jsonl", "--max-new-tokens", "3"], "`--max-new-tokens` has no effect on retrieval models"),
        (["first", "data.jsonl", "--resume"], "`--resume` has no effect on retrieval models"),
        (["first", "data.jsonl", "--train-data", "data.jsonl"], "`--train-data` has no effect on retrieval models"),
        (["first", "data.jsonl", "--format", "captions"], "`--format` has no effect on retrieval models"),
        (["first", "data.jsonl"], "data.jsonl, row 2: images[0]: there is no file"),
        (["first", "good.jsonl", "--batch-size", "0"], "`batch_size` must be at least 1, got 0"),
        (["first", "splits", "--split", "dev"], "has no split 'dev'"),
        (["--model", "first"], "first is a retrieval model (of type 'sparse_moe_vlm_retrieval')"),
    ],
)
def test_mistakes(arguments, message, folder, run_verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        run_verb("evaluate", *arguments, *([] if arguments[0] == "--model" else ["--output-dir", tmp_path]))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_report(tmp_path, capsys):
    """Where the files are is printed to stderr, because stdout may have to be JSON."""
    write_report(tmp_path, {"a": 1})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"Wrote the scores and the results of each row to {tmp_path}.\n"
