"""`explain` draws an explanation and prints its values."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig

from modeling_sparse_moe_vlm.toolbox.commands.main import main
from modeling_sparse_moe_vlm.toolbox.demo import scenes
from modeling_sparse_moe_vlm.toolbox.modality_weights.explanation import explain
from tests.support.processors import make_image


@pytest.fixture(scope="module")
def model_folder(trained):
    return trained[0] / "model"


def explanation_of(folder, image, question):
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    return explain(model, processor, image, question)


def test_of_a_held_out_scene(model_folder, run_verb, tmp_path):
    row = scenes("test", 4, cell_size=16)[3]
    expected = explanation_of(model_folder, row["image"], row["question"])
    by_word = ", ".join(
        f"{word.strip()} {alpha:.2f}" for word, alpha in zip(expected.words, expected.alpha.tolist(), strict=True)
    )
    path = tmp_path / "explanation.png"
    arguments = ["explain", "--model", model_folder, "--scene", 3, "--output", path]
    assert run_verb(*arguments) == (f"{row['question']} {''.join(expected.words)}\nalpha by word: {by_word}\n{path}\n")
    assert np.asarray(Image.open(path)).std() > 10
    assert json.loads(run_verb(*arguments, "--json")) == {
        "question": row["question"],
        "answer": "".join(expected.words),
        "words": expected.words,
        "output": str(path),
        "alpha": expected.alpha.tolist(),
        "count_free_alpha": expected.count_free_alpha.tolist(),
    }


def test_of_a_given_image(model_folder, run_verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_image(width=32, height=32).convert("RGBA").save("image.png")
    expected = explanation_of(model_folder, make_image(width=32, height=32), "Why?")
    printed = run_verb("explain", "--model", model_folder, "--image", "image.png", "--question", "Why?", "--json")
    assert json.loads(printed)["alpha"] == expected.alpha.tolist()
    assert (tmp_path / "explanation.png").exists()


def test_models_of_other_classes_are_refused(tmp_path, capsys):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["explain", "--model", str(tmp_path)])
    assert f"{tmp_path} is a model of type 'llama'; this needs 'sparse_moe_vlm'." in capsys.readouterr().err
