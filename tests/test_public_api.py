"""The public API: names, signatures, cheap imports, and the imports of the files of the model."""

import ast
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import modeling_sparse_moe_vlm
from modeling_sparse_moe_vlm import (
    SparseMoeVlmForCausalLM,
    SparseMoeVlmForConditionalGeneration,
    SparseMoeVlmModel,
    SparseMoeVlmProcessor,
    SparseMoeVlmTextModel,
)
from modeling_sparse_moe_vlm.cache_name import CACHE_NAME

PACKAGE = Path(modeling_sparse_moe_vlm.__file__).parent
ROOT = PACKAGE.parent
MODEL_FILES = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")

NAMES = [
    "SparseMoeFusion",
    "SparseMoeVlmConfig",
    "SparseMoeVlmForCausalLM",
    "SparseMoeVlmForConditionalGeneration",
    "SparseMoeVlmForImageTextRetrieval",
    "SparseMoeVlmModel",
    "SparseMoeVlmPreTrainedModel",
    "SparseMoeVlmProcessor",
    "SparseMoeVlmRetrievalConfig",
    "SparseMoeVlmTextConfig",
    "SparseMoeVlmTextModel",
]
TEXT_INPUTS = ["input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "mm_token_type_ids"]
IMAGE_INPUTS = [
    "input_ids",
    "pixel_values",
    *TEXT_INPUTS[1:],
    "mm_encoder_outputs",
    "modality_values",
    "pixel_values_videos",
    "image_grid_thw",
]
STEERING = ["output_modality_weights", "modality_priors", "modality_guidance"]
HEAD_INPUTS = ["labels", "use_cache", "output_router_logits", *STEERING, "logits_to_keep", "kwargs"]
SIGNATURES = {
    SparseMoeVlmTextModel.forward: [*TEXT_INPUTS, "use_cache", *STEERING, "kwargs"],
    SparseMoeVlmModel.forward: [*IMAGE_INPUTS, "kwargs"],
    SparseMoeVlmForCausalLM.forward: [*TEXT_INPUTS, *HEAD_INPUTS],
    SparseMoeVlmForConditionalGeneration.forward: [*IMAGE_INPUTS, *HEAD_INPUTS],
    SparseMoeVlmModel.get_image_features: ["pixel_values", "image_grid_thw", "kwargs"],
    SparseMoeVlmForConditionalGeneration.get_image_features: ["pixel_values", "image_grid_thw", "kwargs"],
    SparseMoeVlmProcessor.__init__: [
        "image_processor",
        "tokenizer",
        "image_seq_length",
        "chat_template",
        "image_token",
        "min_tiles",
        "max_tiles",
        "max_image_tokens",
        "do_pad",
        "row_separator",
        "video_token",
        "max_frames",
        "video_fps",
        "video_temporal_pooling",
        "image_sizing",
        "patch_size",
        "merge_size",
        "min_image_tokens",
    ],
}


def test_exported_names():
    assert sorted(modeling_sparse_moe_vlm.__all__) == NAMES
    for name in NAMES:
        assert getattr(modeling_sparse_moe_vlm, name).__name__ == name
        assert getattr(modeling_sparse_moe_vlm, name).__doc__
    assert re.fullmatch(r"\d+\.\d+\.\d+", modeling_sparse_moe_vlm.__version__)


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signatures(function):
    parameters = inspect.signature(function).parameters
    names = ["self", *SIGNATURES[function]]
    if "past_key_values" in names and CACHE_NAME != "past_key_values":
        names.insert(-1, CACHE_NAME)
    assert list(parameters) == names
    for name, parameter in parameters.items():
        if name not in ("self", "pixel_values", "kwargs"):
            assert parameter.default is not inspect.Parameter.empty, name


@pytest.mark.newest  # older releases import scikit-learn, where it is installed, which imports pandas
def test_importing_the_package_imports_no_tools():
    code = "import sys, modeling_sparse_moe_vlm; print(*sys.modules)"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    loaded = set(result.stdout.split())
    assert {"transformers", "modeling_sparse_moe_vlm.experts"} <= loaded
    assert "modeling_sparse_moe_vlm.toolbox" not in loaded
    tools = {"datasets", "evaluate", "matplotlib", "pandas", "peft", "pyarrow", "tensorboard", "trl"}
    assert not loaded & tools


# ------------------------------------------------------------------------------------------------ files of the model


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_model_files_import_only_files_that_are_saved_with_them(path):
    """Every checkpoint includes them, so they import only torch, transformers, the standard library and each other."""
    tree = ast.parse(path.read_text())
    siblings = {other.stem for other in MODEL_FILES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module.partition(".")[0]]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, "only `from .sibling import …` is copied with a checkpoint"
            assert node.module in siblings, f"{node.module} is not a file beside {path.name}"
            continue
        else:
            continue
        for module in modules:
            # Transformers passes over imports below a condition such as `if is_av_available():`.
            if module in get_imports(path):
                assert module in {"torch", "transformers"} | set(sys.stdlib_module_names), module
            else:
                assert module == "av"


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_model_files_work_with_the_import_scanner_of_transformers(path):
    """Transformers finds imports with a regular expression, which also matches in docstrings."""
    text = path.read_text()
    found = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE))
    found |= set(re.findall(r"^\s*import\s+\.(\S+)\s*$", text, flags=re.MULTILINE))
    tree = ast.parse(text)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
    assert found == imported
    # Transformers does not check imports inside `try`, so users would not learn that a package is missing.
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Try) and _has_import(node)]
    assert len(text.splitlines()) < 600


def _has_import(tree: ast.AST) -> bool:
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))


def test_transformers_can_read_the_annotations_of_the_model():
    """`from __future__ import annotations` would turn the `config:` annotations into strings."""
    assert "from __future__ import annotations" not in (PACKAGE / "modeling_sparse_moe_vlm.py").read_text()
    for name in ("SparseMoeVlmPreTrainedModel", "SparseMoeVlmForConditionalGeneration", "SparseMoeVlmModel"):
        cls = getattr(modeling_sparse_moe_vlm, name)
        assert cls.config_class is modeling_sparse_moe_vlm.SparseMoeVlmConfig
    for cls in (SparseMoeVlmTextModel, SparseMoeVlmForCausalLM):
        assert cls.config_class is modeling_sparse_moe_vlm.SparseMoeVlmTextConfig


def test_the_wheel_contains_only_the_package(tmp_path):
    """Folders such as `configuration`, `scripts` and `tests` must not become top-level packages."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("building needs setuptools")
    source = tmp_path / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in ("modeling_sparse_moe_vlm", "configuration", "scripts", "tests"):
            shutil.copytree(path, source / path.name, ignore=ignored)
        elif path.is_file():
            shutil.copy(path, source)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"modeling_sparse_moe_vlm"}
    expected = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert expected <= set(names)
    shipped = {
        "py.typed",
        "model_card.md",
        "LICENSE",
        *(path.relative_to(ROOT).as_posix() for path in _files("configuration")),
    }
    assert {f"modeling_sparse_moe_vlm/{name}" for name in shipped} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


def _files(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*") if path.is_file()]


def test_the_command_loads_classes_on_first_use():
    program = """
import sys
sys.argv = ["/usr/bin/sparse-moe-vlm", "--help"]
import modeling_sparse_moe_vlm
assert "torch" not in sys.modules
from modeling_sparse_moe_vlm import SparseMoeVlmConfig
from transformers import AutoConfig
assert AutoConfig.for_model("sparse_moe_vlm").__class__ is SparseMoeVlmConfig
assert all(hasattr(modeling_sparse_moe_vlm, name) for name in modeling_sparse_moe_vlm.__all__)
modeling_sparse_moe_vlm.nothing
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.endswith("AttributeError: module 'modeling_sparse_moe_vlm' has no attribute 'nothing'\n")
