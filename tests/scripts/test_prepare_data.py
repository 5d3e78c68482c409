"""Scripts that write public data sets as JSONL files."""

import importlib.util
import json

import pytest
from PIL import Image

from modeling_sparse_moe_vlm.toolbox.data import load_rows
from modeling_sparse_moe_vlm.toolbox.training.recipes import load_recipe
from tests.scripts.conftest import SCRIPTS
from tests.support.processes import ROOT


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"data/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["prepare", *map(str, arguments)])
    script.main()


def lines(path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_easy_vqa(tmp_path, monkeypatch, capsys):
    package = tmp_path / "installed/easy_vqa"
    for split, color in (("train", "red"), ("test", "teal")):
        (package / f"data/{split}/images").mkdir(parents=True)
        Image.new("RGB", (64, 64), color).save(package / f"data/{split}/images/7.png")
        questions = [["what color is the shape?", color, 7], ["is there a circle?", "no", 7]]
        (package / f"data/{split}/questions.json").write_text(json.dumps(questions))
    (package / "__init__.py").write_text("")
    script = load_script("prepare_easy_vqa")
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match="2"):
            run(script, monkeypatch, "--output", tmp_path / "absent")
    assert "the package is not installed: run `pip install easy-vqa==1.0`" in capsys.readouterr().err
    assert not (tmp_path / "absent").exists()

    monkeypatch.syspath_prepend(str(package.parent))
    run(script, monkeypatch, "--output", tmp_path / "rows")
    assert lines(tmp_path / "rows/test.jsonl") == [
        {"image": str(package / "data/test/images/7.png"), "question": question, "answer": answer}
        for question, answer in (("what color is the shape?", "teal"), ("is there a circle?", "no"))
    ]
    for name, answers in (("train", [["red"], ["no"]]), ("train_what", [["red"]])):
        rows = load_rows(tmp_path / f"rows/{name}.jsonl", "vqa")
        assert [row["references"] for row in rows] == answers
    assert f"{tmp_path / 'rows/train.jsonl'}: 2 rows" in capsys.readouterr().out


def test_stamps(tmp_path, monkeypatch, capsys):
    stamps = tmp_path / "stamps"
    (stamps / "animals").mkdir(parents=True)
    for number in range(20):  # two stamps for each of ten captions
        # Half transparent: on white, what is behind shows through.
        Image.new("RGBA", (40, 10 + number), (0, 0, 255, 0 if number % 2 else 255)).save(
            stamps / f"animals/{number:02}.png"
        )
        caption = f"An animal {number // 2}." if number % 2 else f"an ANIMAL {number // 2}."
        (stamps / f"animals/{number:02}.txt").write_text(f"{caption}\nde.utf8=Ein Tier\n", encoding="utf-8")
    Image.new("RGB", (8, 8)).save(stamps / "no_caption.png")
    (stamps / "empty.txt").write_text("\nde.utf8=Ein Tier\n")
    Image.new("RGB", (8, 8)).save(stamps / "empty.png")

    script = load_script("prepare_tuxpaint_stamps")
    output = tmp_path / "rows"
    run(script, monkeypatch, "--stamps", stamps, "--output", output, "--size", 16)
    train, test = lines(output / "train.jsonl"), lines(output / "test.jsonl")
    assert (len(train), len(test)) == (18, 2), "a tenth of the captions, with all of their images"
    assert len({row["caption"].lower() for row in test}) == 1
    assert not {row["caption"].lower() for row in test} & {row["caption"].lower() for row in train}
    assert {row["image"] for row in train + test} == {f"images/animals/{number:02}.png" for number in range(20)}
    opaque, transparent = (Image.open(output / f"images/animals/0{number}.png") for number in range(2))
    assert (opaque.size, opaque.mode) == ((16, 16), "RGB")
    assert [opaque.getpixel((8, y)) for y in (0, 8, 15)] == [(255, 255, 255), (0, 0, 255), (255, 255, 255)]
    assert transparent.getcolors() == [(256, (255, 255, 255))]
    assert len(load_rows(output / "train.jsonl", "captions")) == 18

    with pytest.raises(SystemExit, match="2"):
        run(script, monkeypatch, "--stamps", tmp_path / "rows/images/none", "--output", tmp_path / "absent")
    assert "contains no stamps: install tuxpaint-stamps-default, or pass --stamps" in capsys.readouterr().err
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    ("recipe", "script"),
    [
        ("easy_vqa", "prepare_easy_vqa"),
        ("stamps_captioning", "prepare_tuxpaint_stamps"),
        ("stamps_retrieval", "prepare_tuxpaint_stamps"),
    ],
)
def test_recipes_read_what_the_scripts_write(recipe, script):
    path = ROOT / f"configuration/training/{recipe}.yaml"
    text = path.read_text()
    assert f"scripts/data/{script}.py\n" in text
    folder = f"outputs/{script.removeprefix('prepare_')}"
    assert f'"{folder}"' in (SCRIPTS / f"data/{script}.py").read_text()
    assert load_recipe(path).data == {"train": f"{folder}/train.jsonl", "eval": f"{folder}/test.jsonl"}
    stages = [stage["data"] for stage in load_recipe(path).stages if "data" in stage]
    assert stages == ([{"train": f"{folder}/train_what.jsonl"}] if recipe == "easy_vqa" else [])
