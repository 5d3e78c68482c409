"""Checkpoints with code of different revisions: each runs and saves its own code, in one process and in any order."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files

import modeling_sparse_moe_vlm
from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor
from modeling_sparse_moe_vlm.registered.code_revisions import warn_of_other_code
from tests.support.models import make_inputs, make_model
from tests.support.processors import make_processor, make_speaking_model

pytestmark = pytest.mark.newest

PACKAGE = Path(modeling_sparse_moe_vlm.__file__).parent
# Files that only the processor needs. They are saved with it.
OF_THE_PROCESSOR = {
    "chat_template",
    "conversation_checks",
    "control_tokens",
    "image_reading",
    "image_tiles",
    "native_sizes",
    "processing_sparse_moe_vlm",
    "processor_arguments",
    "video_decoding",
    "video_reading",
}
# Files that only upcycled models need.
OF_UPCYCLED = {
    "configuration_upcycled",
    "modeling_upcycled",
    "modeling_upcycled_classification",
    "upcycled_layers",
    "upcycled_plans",
}
OF_UPCYCLED_RETRIEVAL = {"configuration_upcycled_retrieval", "modeling_upcycled_retrieval"}
# Files that only retrieval models need.
OF_RETRIEVAL = {
    "configuration_retrieval",
    "contrastive",
    "modeling_retrieval",
    "retrieval_config",
    "retrieval_head",
    "sentence_transformers_files",
}

# Loads the checkpoints in the given order, then uses and saves each. `factors.json` contains the factor by which the
# code of each checkpoint multiplies the logits.
SCRIPT = """
import importlib.abc, json, sys
from pathlib import Path

root, installed, *paths = sys.argv[1:]
if installed == "absent":
    class Blocker(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "modeling_sparse_moe_vlm":
                raise ModuleNotFoundError(f"{name} is not installed")
    sys.meta_path.insert(0, Blocker())
else:
    sys.path.insert(0, installed)

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
root = Path(root)
inputs, expected = load_file(root / "inputs.safetensors"), load_file(root / "expected.safetensors")["logits"]
factors = json.loads((root / "factors.json").read_text())
loaded = {}
for path in paths:
    name, _, revision = path.partition("@")
    of_code = {"code_revision": revision} if revision else {}
    trust = {"trust_remote_code": True} | ({"revision": revision} if revision else {})
    config = AutoConfig.from_pretrained(name, **trust)
    loaded[path] = (
        config,
        AutoModelForImageTextToText.from_pretrained(name, **trust).eval(),
        AutoModelForCausalLM.from_config(config, trust_remote_code=True, **of_code).eval(),
        AutoModel.from_pretrained(name, **trust).eval(),
        AutoProcessor.from_pretrained(name, **trust),
    )
for number, path in enumerate(paths):
    config, model, made, base, processor = loaded[path]
    factor = factors[path]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, factor * expected)
        made.load_state_dict(model.state_dict())
        torch.testing.assert_close(made(**inputs).logits, factor * expected)
    assert config.num_parameters() == model.num_parameters()
    assert config.text_config.num_parameters() == sum(
        p.numel() for n, p in model.named_parameters() if "language_model" in n or "lm_head" in n
    )
    for part in (config, model, processor):
        assert type(part).__module__.startswith("transformers_modules."), type(part)
    assert sys.modules[type(processor).__module__].REVISION == factor
    for name, part in (("model", model), ("base", base), ("config", config), ("text_config", config.text_config)):
        part.save_pretrained(root / "saved" / f"{number}-{name}")
    processor.save_pretrained(root / "saved" / f"{number}-model")
assert len({type(config) for config, *_ in loaded.values()}) == len(paths)
assert "modeling_sparse_moe_vlm" not in sys.modules
"""


def make_revision(folder: Path, factor: int) -> Path:
    """Saves a checkpoint whose code differs from the package's only in the last file of the model and the processor."""
    torch.manual_seed(0)
    make_speaking_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    head = folder / "language_head.py"
    code = head.read_text()
    assert code.count("logits = self.lm_head(") == 1
    head.write_text(code.replace("logits = self.lm_head(", f"logits = {factor} * self.lm_head("))
    processing = folder / "processing_sparse_moe_vlm.py"
    processing.write_text(processing.read_text() + f"\nREVISION = {factor}\n")
    return folder


def as_on_the_hub(cache: Path, name: str, commit: str, folder: Path) -> None:
    """Copies a folder to the cache of the Hub, as the newest revision of its repository."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir(exist_ok=True)
    folder.rename(repository / "snapshots" / commit)


def code_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def run(root: Path, installed: str, *paths: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {
        "HF_MODULES_CACHE": str(root / "modules"),
        "HF_HUB_CACHE": str(root / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-I", "-c", SCRIPT, str(root), installed, *paths]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture
def root(tmp_path):
    inputs = make_inputs()
    save_file(inputs, tmp_path / "inputs.safetensors")
    with torch.no_grad():
        save_file({"logits": make_speaking_model()(**inputs).logits}, tmp_path / "expected.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("installed", "order"), [("absent", (0, 1)), (str(PACKAGE.parent), (1, 0))], ids=["absent", "importable"]
)
def test_folders_of_one_name(root, installed, order):
    paths = [str(make_revision(root / run_name / "model", factor)) for run_name, factor in (("one", 2), ("two", 3))]
    (root / "factors.json").write_text(json.dumps(dict(zip(paths, (2, 3), strict=True))))
    code = [code_of(Path(path)) for path in paths]
    run(root, installed, *(paths[i] for i in order))
    for number, i in enumerate(order):
        check_saved(root / "saved", number, code[i])


def test_two_revisions_of_a_repository_and_another(root):
    folders = [make_revision(root / f"made-{factor}", factor) for factor in (2, 3, 4)]
    code = [code_of(folder) for folder in folders]
    commits = [character * 40 for character in "abc"]
    for name, commit, folder in zip(("team/model", "team/model", "model"), commits, folders, strict=True):
        as_on_the_hub(root / "hub", name, commit, folder)
    paths = [f"team/model@{commits[0]}", "team/model", "model"]
    (root / "factors.json").write_text(json.dumps(dict(zip(paths, (2, 3, 4), strict=True))))
    run(root, "absent", *paths)
    for number in range(3):
        check_saved(root / "saved", number, code[number])


def test_the_imported_package_runs_unless_classes_are_asked_for(tmp_path, caplog, monkeypatch):
    """Transformers prefers registered classes over the code of a checkpoint. A warning says so."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder, inputs = make_revision(tmp_path / "model", 2), make_inputs()
    for trust in ({}, {"trust_remote_code": True}):
        caplog.clear()
        model = AutoModelForImageTextToText.from_pretrained(folder, **trust).eval()
        assert type(model) is SparseMoeVlmForConditionalGeneration
        assert type(AutoProcessor.from_pretrained(folder, **trust)) is SparseMoeVlmProcessor
        messages = [record.getMessage() for record in caplog.records if "differs from the code" in record.getMessage()]
        assert len(messages) == len(trust)
    assert f"The code of {folder} differs from the code in {PACKAGE} (language_head.py), and" in messages[0]
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/language_head.py").read_text() == (PACKAGE / "language_head.py").read_text()

    name = f"modeling_sparse_moe_vlm.{type(model).__name__}"
    assert f"get_class_from_dynamic_module('{name}', '{folder}').from_pretrained('{folder}')" in messages[0]
    own = get_class_from_dynamic_module(name, folder).from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(own(**inputs).logits, 2 * model(**inputs).logits)
    own.save_pretrained(tmp_path / "own")
    of_model = {name: text for name, text in code_of(folder).items() if Path(name).stem not in OF_THE_PROCESSOR}
    assert code_of(tmp_path / "own") == of_model
    processor = get_class_from_dynamic_module("processing_sparse_moe_vlm.SparseMoeVlmProcessor", folder)
    assert sys.modules[type(processor.from_pretrained(folder)).__module__].REVISION == 2


def test_no_warning_if_the_code_does_not_differ_or_is_missing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    make_model().save_pretrained(tmp_path / "same")
    (tmp_path / "same" / "train.py").write_text("a script of the user's")
    make_model().save_pretrained(tmp_path / "bare")
    for path in (tmp_path / "bare").glob("*.py"):
        path.unlink()
    for name in ("same", "bare"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / name, trust_remote_code=True)
    assert "differs from the code" not in caplog.text


def test_files_of_a_repository_in_the_cache_are_compared(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for commit, factor in (("a" * 40, 2), ("b" * 40, 3)):
        as_on_the_hub(tmp_path, "team/model", commit, make_revision(tmp_path / "made", factor))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--team--model" / "snapshots" / ("a" * 40)
    (snapshot / "language_head.py").write_text((PACKAGE / "language_head.py").read_text())
    warn_of_other_code(SparseMoeVlmForConditionalGeneration, "team/model", "a" * 40)
    warn_of_other_code(SparseMoeVlmForConditionalGeneration, "team/other")
    assert "differs from the code" not in caplog.text
    warn_of_other_code(SparseMoeVlmForConditionalGeneration, "team/model")
    assert "The code of team/model differs from the code in" in caplog.text


@pytest.mark.parametrize("start", ["configuration", "modeling"])
def test_configurations_are_saved_with_all_files_of_the_model(start):
    """Transformers identifies a revision by its files, so both entry files need the same ones to share classes."""
    entry = PACKAGE / f"{start}_sparse_moe_vlm.py"
    files = {Path(path).stem for path in get_relative_import_files(entry)}
    others = {"__init__", "fusion", *OF_THE_PROCESSOR, *OF_UPCYCLED, *OF_UPCYCLED_RETRIEVAL}
    assert files == {path.stem for path in PACKAGE.glob("*.py")} - others - OF_RETRIEVAL
    of_retrieval = {Path(path).stem for path in get_relative_import_files(PACKAGE / f"{start}_retrieval.py")}
    assert of_retrieval == {path.stem for path in PACKAGE.glob("*.py")} - others


def test_upcycled_models_are_saved_without_our_architecture():
    of_model, of_config = (
        {Path(path).stem for path in get_relative_import_files(PACKAGE / f"{start}_upcycled.py")}
        for start in ("modeling", "configuration")
    )
    assert of_model == of_config >= OF_UPCYCLED | {"experts", "routing", "losses"}
    assert not of_model & {"configuration_sparse_moe_vlm", "modeling_sparse_moe_vlm", "attention", "decoder_layer"}


def check_saved(saved: Path, number: int, code: dict[str, str]) -> None:
    """Checks that the code is that of its own revision, and that `auto_map` refers to it."""
    assert code_of(saved / f"{number}-model") == code
    of_model = {name: text for name, text in code.items() if Path(name).stem not in OF_THE_PROCESSOR}
    for name in ("model", "base", "config", "text_config"):
        folder = saved / f"{number}-{name}"
        assert code_of(folder) == (code if name == "model" else of_model)
        classes = json.loads((folder / "config.json").read_text())["auto_map"]
        assert len(classes) == (4 if name == "text_config" else 5)
        assert {value.partition(".")[0] + ".py" for value in classes.values()} <= set(of_model), classes
