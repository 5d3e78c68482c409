"""`evaluate MODEL DATA`: scores of models on own data, cards, mistakes, and two processes."""

import argparse
import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from modeling_sparse_moe_vlm.toolbox.commands.evaluate_data import _find_split, _guesses, short_names
from modeling_sparse_moe_vlm.toolbox.data import load_rows
from modeling_sparse_moe_vlm.toolbox.data.bad_rows import SkippedRows
from tests.support.processes import ROOT, launch
from tests.support.processors import make_image, make_processor, make_speaking_model, speak_printably
from tests.support.retrieval import make_retrieval_model

QUESTIONS = ["cat?", "the mat?", "x?", "and?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, an adapter, and data: a file of questions with one bad row, and a folder of captions with splits."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = speak_printably(make_speaking_model())
    for name in ("first", "second"):
        model.save_pretrained(folder / name)
        make_processor().save_pretrained(folder / name)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    for number in range(3):
        make_image(number).save(folder / f"{number}.png")
    rows = [{"question": text, "image": f"{n}.png", "answers": ["no", "no"]} for n, text in enumerate(QUESTIONS)]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for split, caption in (("train", "a"), ("test", "b")):
        row = {"image": f"{folder}/0.png", "captions": [caption, "a cat on a mat"]}
        (folder / "captions").mkdir(exist_ok=True)
        (folder / f"captions/{split}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def predictions(folder) -> list[str]:
    return [json.loads(line)["prediction"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_models_side_by_side(folder, run_verb, tmp_path):
    out, skipped = tmp_path / "out", tmp_path / "skipped.jsonl"
    options = ["--on-bad-row", "skip", "--bad-rows", skipped, "--batch-size", "2", "--max-new-tokens", "3"]
    models = [folder / "first", folder / "second"]
    arguments = [*models, "--data", folder / "data.jsonl", *options, "--output-dir", out]
    train = ["--train-data", folder / "data.jsonl"]
    report = json.loads(run_verb("evaluate", *arguments, *train, "--json", "--update-card"))
    assert report == json.loads((out / "results.json").read_text())
    assert report["data"] == {
        "source": str(folder / "data.jsonl"),
        "split": None,
        "format": "vqa",
        "rows": 3,
        "skipped": 1,
    }
    assert report["most_frequent_answer"] == {"vqa_accuracy": 100, "exact_match": 100}
    assert list(report["models"]) == ["first", "second"]
    for model in report["models"].values():
        assert model["scores"] == model["blind"] == {"vqa_accuracy": 0, "exact_match": 0}
        assert model["intervals"] == {"vqa_accuracy": [0, 0], "exact_match": [0, 0]}
    assert json.loads(skipped.read_text())["row"] == 3
    first, second = predictions(out / "first"), predictions(out / "second")
    assert len(first) == len(second) == 3
    assert first != second
    (result, _) = ModelCard.load(folder / "first/README.md").data.eval_results
    assert (result.dataset_name, result.dataset_split, result.metric_type) == ("data", None, "vqa_accuracy")
    assert result.task_type == "visual-question-answering"

    # The model of `--model`, chosen metrics, fewer rows, no blind baseline, and as a table
    arguments = ["--model", models[0], "--data", folder / "data.jsonl", *options, "--output-dir", out]
    printed = run_verb("evaluate", *arguments, "--metrics", "anls, bleu", "--max-rows", "2", "--no-blind")
    assert printed.splitlines()[0].endswith("data.jsonl, format vqa: 2 rows, 1 skipped")
    assert printed.splitlines()[1].split() == ["model", "anls", "bleu"]
    assert len(printed.splitlines()) == 3
    assert predictions(out / "first") == first[:2]

    adapted = ["--adapter", folder / "adapter", *options, "--output-dir", tmp_path / "adapted"]
    run_verb("evaluate", models[0], folder / "data.jsonl", *adapted)
    assert predictions(tmp_path / "adapted/first") != first
    owner = json.loads((tmp_path / "adapted/first/run.json").read_text())
    assert owner["adapter"] == str(folder / "adapter")

    first_card, second_card = (ModelCard.load(model / "README.md").data for model in models)
    assert first_card.metrics == second_card.metrics == ["vqa_accuracy", "exact_match"]
    captions = [
        folder / "captions",
        "--image-root",
        folder,
        "--update-card",
        "--output-dir",
        tmp_path / "captions",
        "--json",
    ]
    report = json.loads(run_verb("evaluate", models[0], *captions))
    assert report["data"]["split"] == "test"
    assert list(report["models"]["first"]["scores"]) == ["cider", "bleu", "rouge_l"]
    result = ModelCard.load(folder / "first/README.md").data.eval_results[-1]
    assert (result.task_type, result.dataset_name, result.dataset_split) == ("image-to-text", "captions", "test")
    assert result.metric_value == round(report["models"]["first"]["scores"]["rouge_l"], 2)
    report = json.loads(run_verb("evaluate", models[0], *captions, "--split", "train", "--task", "document_vqa"))
    assert report["data"]["split"] == "train"
    assert list(report["models"]["first"]["scores"]) == ["anls", "exact_match"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["first"], "got 1 paths: pass one model and the data"),
        (["first", "second", "data.jsonl"], "got 3 paths: pass one model and the data"),
        (["--data", "data.jsonl"], "`--data` needs a model"),
        (["first", "data.jsonl"], "data.jsonl, row 3: images[0]: there is no file"),
        (["first", "data.jsonl", "--metrics", "anls,f1"], "there is no metric 'f1'"),
        (["first", "data.jsonl", "--max-rows", "0"], "`--max-rows` must be at least 1, but got 0"),
        (["first", "data.jsonl", "--batch-size", "0", "--on-bad-row", "skip"], "`batch_size` must be at least 1"),
        (["first", "captions", "--split", "none"], "has no split 'none'"),
        (["first", "second", "--data", "data.jsonl", "--adapter", "adapter"], "`--adapter` only works with one model"),
        (["missing/local/model", "data.jsonl"], "no trained model"),
        (["first", "data.jsonl", "--set", "data.num_train=1"], "`--set` only has an effect with the built-in scenes"),
        (["first", "data.jsonl", "--recipe", "demo"], "`--recipe` only has an effect with the built-in scenes"),
        (
            ["--model", "first", "--set", "training.max_steps=2"],
            "`--set training.max_steps=2`: `evaluate` only reads",
        ),
        (["data.jsonl"], "The given paths: data.jsonl."),
        (["data.jsonl", "first"], "data.jsonl is a file, not a trained model"),
        (["run", "data.jsonl"], "run is the output folder of a training: pass its model, run/model."),
        (["first", "images"], "images has no data: it needs files that end with .jsonl"),
        (["first", "data.jsonl", "--output-dir", "."], "would write the predictions into the folder of the model"),
        (["tiny", "data.jsonl"], "tiny is a file, not a trained model"),
        (["first", "data.jsonl", "--model", "second"], "got a model both as first and with `--model second`"),
        (["--model", "first", "--metrics", "anls"], "`--metrics` only has an effect with own data"),
        (["first", "data.jsonl", "--bad-rows", "a.jsonl"], "`--bad-rows` only has an effect with `--on-bad-row skip`"),
        (
            ["first", "data.jsonl", "--split", "test"],
            "`--split` only has an effect with a folder",
        ),
        (
            ["first", "data.jsonl", "--adapter", "second"],
            "second is not a PEFT adapter",
        ),
        (
            ["user/name", "data.jsonl", "--update-card"],
            "a local folder, but user/name is not a folder",
        ),
    ],
)
def test_mistakes(arguments, message, folder, run_verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "run/model").mkdir(parents=True, exist_ok=True)
    (folder / "run/model/config.json").touch()
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images/0.png").write_bytes((folder / "0.png").read_bytes())
    output = [] if {"--model", "--output-dir"} & set(arguments) else ["--output-dir", tmp_path]
    with pytest.raises(SystemExit) as ended:
        run_verb("evaluate", *arguments, *output)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_training_data_are_read_before_the_model_answers(folder, run_verb, tmp_path, capsys):
    """Rows that are skipped there are listed, too, but not counted as rows of the evaluation."""
    options = ["--output-dir", tmp_path / "out", "--max-new-tokens", "2"]
    with pytest.raises(SystemExit):
        run_verb("evaluate", folder / "first", folder / "captions", "--train-data", folder / "gone.jsonl", *options)
    assert "there is no file or folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    listed = tmp_path / "skipped.jsonl"
    options += ["--train-data", folder / "data.jsonl", "--on-bad-row", "skip", "--bad-rows", listed, "--json"]
    (tmp_path / "test.jsonl").write_text('{"question": "cat?", "answer": "no"}\n{"question": "mat?", "answer": " "}\n')
    report = json.loads(run_verb("evaluate", folder / "first", tmp_path / "test.jsonl", *options))
    assert report["data"]["skipped"] == 1
    assert report["most_frequent_answer"]["exact_match"] == 100
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(entry["source"], entry["row"]) for entry in entries] == [
        (str(tmp_path / "test.jsonl"), 1),
        (str(folder / "data.jsonl"), 3),
    ]


def test_training_data_can_have_their_own_images(folder, tmp_path):
    row = {"question": "cat?", "answer": "no"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row | {"image": "0.png"}))
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    data = {"train_data": str(tmp_path / "train.jsonl"), "format": None, "subset": None, "on_bad_row": None}
    roots = {"train_image_root": str(folder), "image_root": str(tmp_path)}
    rows = load_rows(tmp_path / "test.jsonl")
    for chosen in (roots, {"train_image_root": None, "image_root": str(folder)}):
        arguments = argparse.Namespace(**data, **chosen)
        assert _guesses(arguments, rows, ["exact_match"], SkippedRows()) == {"exact_match": 100}


def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/model").mkdir(parents=True)
    names = ["run/model", "other/model", "user/name", "user/name", "b/user/name"]
    assert short_names(names) == {
        "run/model": "model",
        "other/model": "other-model",
        "user/name": "name",
        "b/user/name": "user-name",
    }


@pytest.mark.parametrize(
    ("splits", "named", "expected"),
    [
        (["train"], None, "train"),
        (["train", "validation"], None, "validation"),
        (["train", "validation", "test"], None, "test"),
        (["train", "test"], "train", "train"),
    ],
)
def test_split(splits, named, expected, tmp_path):
    for split in splits:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}))
    arguments = argparse.Namespace(split=named, subset=None, image_root=None, format=None)
    assert _find_split(arguments, str(tmp_path)) == (expected, "vqa")
    with pytest.raises(ValueError, match="has no split 'dev'"):
        _find_split(argparse.Namespace(**vars(arguments) | {"split": "dev"}), str(tmp_path))


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(folder, run_verb, tmp_path):
    arguments = ["evaluate", folder / "first", folder / "data.jsonl", "--on-bad-row", "skip", "--batch-size", "1"]
    arguments = [str(argument) for argument in [*arguments, "--max-new-tokens", "3", "--output-dir"]]
    expected = run_verb(*arguments, str(tmp_path / "one"))
    make_retrieval_model().save_pretrained(folder / "retrieval")
    make_processor().save_pretrained(folder / "retrieval")
    pairs = [{"image": f"{n}.png", "captions": ["the cat", f"mat {n}"]} for n in range(3)]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in pairs))
    of_pairs = ["evaluate", str(folder / "retrieval"), str(folder / "pairs.jsonl"), "--batch-size", "1"]
    expected_ranks = run_verb(*of_pairs, "--output-dir", str(tmp_path / "one-ranks"))
    program = f"""
    import sys
    from modeling_sparse_moe_vlm.toolbox.commands.main import main

    main({[*arguments, str(tmp_path / "two")]!r})
    main({[*of_pairs, "--output-dir", str(tmp_path / "two-ranks")]!r})
    """
    result = launch(ROOT / "configuration/accelerate/ddp.yaml", program, tmp_path, "--cpu", "--num_processes", "2")
    assert result.returncode == 0, result.stderr
    assert expected.strip() in result.stdout
    assert result.stdout.count("data.jsonl, format vqa: 3 rows, 1 skipped") == 1
    files = [tmp_path / name / "first/predictions.jsonl" for name in ("one", "two")]
    assert files[0].read_text() == files[1].read_text()
    assert "recall@1" in expected_ranks
    assert expected_ranks.strip() in result.stdout
    files = [tmp_path / name / "retrieval/ranks.jsonl" for name in ("one-ranks", "two-ranks")]
    assert files[0].read_text() == files[1].read_text()
