"""`train --check`: the report, its JSON, and exit codes."""

import argparse
import json

import pytest

from modeling_sparse_moe_vlm.toolbox.commands import data_options, train
from modeling_sparse_moe_vlm.toolbox.commands.main import main
from modeling_sparse_moe_vlm.toolbox.data.bad_rows import ON_BAD_ROW
from modeling_sparse_moe_vlm.toolbox.data.formats import FORMATS
from modeling_sparse_moe_vlm.toolbox.training.own_evaluation import TASKS
from tests.toolbox.data.data_files import write_image, write_lines

GOOD = {"image": "a.png", "question": "q", "answer": "a"}
BAD = GOOD | {"image": "gone.png"}


@pytest.fixture
def data(tmp_path):
    write_image(tmp_path / "a.png")
    return write_lines(tmp_path / "data.jsonl", [GOOD, BAD])


def exit_code(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *map(str, arguments)])
    return stopped.value.code


def test_good_data(run_verb, tmp_path):
    write_image(tmp_path / "images/a.png")
    path = write_lines(tmp_path / "data.jsonl", [GOOD])
    expected = [
        "format: vqa",
        "rows: 1 (1 good, 0 bad)",
        "images per row: 1: 1 row",
        "turns per row: 2: 1 row",
        "image sizes: 4×6 to 4×6 pixels",
    ]
    printed = run_verb(
        "train", "--check", path, "--image-root", tmp_path / "images", "--bad-rows", tmp_path / "bad.jsonl"
    )
    assert printed.splitlines() == expected
    assert not (tmp_path / "bad.jsonl").exists()


def test_bad_rows_have_exit_code_2(data, tmp_path, capsys):
    assert exit_code("--check", data, "--json", "--bad-rows", tmp_path / "bad.jsonl") == 2
    printed = capsys.readouterr()
    message = f"images[0]: there is no file '{tmp_path}/gone.png'."
    report = json.loads(printed.out)
    assert report["bad_rows"] == {"missing file": 1}
    assert report["examples"] == [f"{data}, row 1: {message}"]
    assert "checking: 2 rows" in printed.err
    assert json.loads((tmp_path / "bad.jsonl").read_text()) == {
        "source": str(data),
        "row": 1,
        "kind": "missing file",
        "reason": message,
    }


def test_bad_rows_that_can_be_skipped(data, run_verb, capsys):
    assert run_verb("train", "--check", data, "--on-bad-row", "skip").splitlines()[-2] == "bad rows: 1 × missing file"
    write_lines(data, [BAD])
    assert exit_code("--check", data, "--on-bad-row", "skip") == 2
    assert capsys.readouterr().err.endswith("error: all rows are bad.\n")


def test_mistakes(data, capsys):
    assert exit_code("--check", data, "--format", "vqaa") == 2
    assert "error: `format` must be one of messages, " in capsys.readouterr().err
    assert exit_code("--check", data, "--format", "messages") == 2  # all rows are bad
    assert "bad rows: 2 × missing field" in capsys.readouterr().out
    assert exit_code("--check", data.parent, "--split", "test") == 2
    assert "has no split 'test'" in capsys.readouterr().err
    assert exit_code("--check", "gone.jsonl", "--subset", "a") == 2
    assert "error: there is no file or folder 'gone.jsonl'." in capsys.readouterr().err
    for option in (
        ["--format", "vqa"],
        ["--image-root", "a"],
        ["--split", "b"],
        ["--subset", "b"],
    ):
        assert exit_code(*option) == 2
        error = f"error: `{option[0]}` only has an effect with `--check DATA` or `--data DATA`.\n"
        assert capsys.readouterr().err == error
    for option in (["--eval-data", "a"], ["--eval-split", "b"], ["--task", "vqa"]):
        assert exit_code(*option) == 2
        assert capsys.readouterr().err == f"error: `{option[0]}` only has an effect with `--data DATA`.\n"
    for given in ([], ["--data", "d"]):
        assert exit_code("--bad-rows", "c", *given) == 2
        assert capsys.readouterr().err == "error: `--bad-rows` only has an effect with `--check DATA`.\n"
    for option in (
        ["--data", data],
        ["--eval-data", data],
        ["--eval-split", "test"],
        ["--task", "vqa"],
        ["--model", "tiny"],
        ["--recipe", "finetune"],
        ["--set", "training.max_steps=1"],
        ["--output-dir", "a"],
        ["--resume"],
    ):
        assert exit_code("--check", data, *option) == 2
        error = f"error: `--check` and `{option[0]}` cannot be combined: `--check` trains nothing.\n"
        assert capsys.readouterr().err == error


def test_names_are_those_of_the_data_package():
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    (policy,) = [action for action in parser._actions if action.dest == "on_bad_row"]
    assert tuple(FORMATS) == train.FORMAT_NAMES
    assert tuple(TASKS) == data_options.TASK_NAMES
    assert policy.choices == ON_BAD_ROW
