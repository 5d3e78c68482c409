"""Presets and recipes are found in a clone and in an installed package."""

import re

import pytest

from modeling_sparse_moe_vlm.toolbox import shipped_files
from modeling_sparse_moe_vlm.toolbox.shipped_files import find_preset, shipped_presets, shipped_root, working_root
from tests.support.processes import ROOT

pytestmark = pytest.mark.newest


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Makes a package that is installed like a wheel."""
    package = tmp_path / "site-packages/modeling_sparse_moe_vlm"
    for path in ("training/b.yaml", "training/a.yaml", "training/a.json", "models/m.json", "lora/l.yaml"):
        (package / "configuration" / path).parent.mkdir(parents=True, exist_ok=True)
        (package / "configuration" / path).touch()
    monkeypatch.setattr(shipped_files, "PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    return package


def test_in_a_clone():
    assert shipped_files.PACKAGE == ROOT / "modeling_sparse_moe_vlm"
    assert shipped_root() == working_root() == ROOT
    recipes = {
        name: ROOT / f"configuration/training/{name}.yaml"
        for name in (
            "captioning",
            "demo",
            "easy_vqa",
            "finetune",
            "quickstart",
            "retrieval",
            "stamps_captioning",
            "stamps_retrieval",
            "tiles",
        )
    }
    assert shipped_presets("training") == recipes
    assert list(shipped_presets("lora")) == ["all", "attention", "experts", "finetune", "image_experts"]
    assert list(shipped_presets("models")) == ["large", "small", "tiny"]


def test_in_a_wheel(wheel, tmp_path):
    assert shipped_root() == wheel
    assert working_root() == tmp_path
    assert shipped_presets("training") == {name: wheel / f"configuration/training/{name}.yaml" for name in "ab"}
    assert shipped_presets("models") == {"m": wheel / "configuration/models/m.json"}
    assert shipped_presets("lora") == {"l": wheel / "configuration/lora/l.yaml"}


def test_a_path_has_precedence_over_a_name(wheel, tmp_path):
    assert find_preset("a", "training") == wheel / "configuration/training/a.yaml"
    assert find_preset("configuration/training/a.yaml", "training") == wheel / "configuration/training/a.yaml"
    (tmp_path / "a").mkdir()
    assert find_preset("a", "training") == wheel / "configuration/training/a.yaml", "a folder is not a recipe"
    (tmp_path / "b").touch()
    assert str(find_preset("b", "training")) == "b"
    assert find_preset(str(tmp_path / "b"), "lora") == tmp_path / "b"


@pytest.mark.parametrize("name", ["l", "a.yaml", "training/a.yaml", ""])
def test_the_error_names_a_missing_file(wheel, name):
    message = re.escape(f"there is no file {name!r}: pass a path, or one of the names a, b.")
    with pytest.raises(FileNotFoundError, match=message):
        find_preset(name, "training")
