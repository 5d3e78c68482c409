"""The code in checkpoints is safe to review: few files, which define classes and register names, and nothing else."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import modeling_sparse_moe_vlm
from modeling_sparse_moe_vlm import registered
from modeling_sparse_moe_vlm.toolbox.retrieval import to_retrieval
from tests.support.models import make_model
from tests.support.processors import make_processor, make_speaking_model, make_tokenizer
from tests.support.retrieval import make_retrieval_model
from tests.support.upcycled import make_few_experts

pytestmark = pytest.mark.newest

PACKAGE = Path(modeling_sparse_moe_vlm.__file__).parent

# ------------------------------------------------------------------------------------------------ files by checkpoint

EXPERTS = {
    "cache_name",
    "capacity",
    "checkpoint_conversion",
    "checkpoint_integrity",
    "checks",
    "continuous_batching",
    "expert_groups",
    "expert_shards",
    "experts",
    "experts_config",
    "experts_host",
    "experts_validation",
    "fused_head",
    "kept_names",
    "lora_targets",
    "losses",
    "parallel_plans",
    "quantization",
    "routing",
    "token_modalities",
}
UPCYCLED = EXPERTS | {
    "configuration_upcycled",
    "modeling_upcycled",
    "modeling_upcycled_classification",
    "upcycled_layers",
    "upcycled_plans",
}
OURS = EXPERTS | {
    "attention",
    "attention_parts",
    "attention_plan",
    "attention_runs",
    "cached_modalities",
    "config_validation",
    "configuration_sparse_moe_vlm",
    "connector",
    "decoder_layer",
    "deepstack",
    "distributed_attention",
    "image_generation",
    "image_patches",
    "input_checks",
    "language_head",
    "modality_encoder",
    "modeling_sparse_moe_vlm",
    "native_encoding",
    "native_towers",
    "normalization",
    "outputs",
    "parameters",
    "pretrained",
    "steering",
    "versions",
    "visible_keys",
    "vision_tower",
    "visual_features",
}
PROCESSOR = {
    *("processing_sparse_moe_vlm", "control_tokens", "image_reading", "image_tiles", "processor_arguments", "versions"),
    *("chat_template", "conversation_checks", "native_sizes", "video_decoding", "video_reading"),
}
HEAD = {"contrastive", "outputs", "retrieval_config", "retrieval_head", "sentence_transformers_files", "versions"}
FILES = {
    "ours": OURS | PROCESSOR,
    "text": OURS,
    "retrieval": OURS | PROCESSOR | HEAD | {"configuration_retrieval", "modeling_retrieval"},
    "upcycled": UPCYCLED,
    "upcycled_retrieval": UPCYCLED | HEAD | {"configuration_upcycled_retrieval", "modeling_upcycled_retrieval"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_speaking_model().save_pretrained(folder / "ours")
    make_processor().save_pretrained(folder / "ours")
    registered.SparseMoeVlmForCausalLM(make_model().config.text_config).save_pretrained(folder / "text")
    make_retrieval_model().save_pretrained(folder / "retrieval")
    make_processor().save_pretrained(folder / "retrieval")
    upcycled = make_few_experts("qwen3_vl")
    upcycled.save_pretrained(folder / "upcycled")
    to_retrieval(upcycled, make_tokenizer()).save_pretrained(folder / "upcycled_retrieval")
    return folder


@pytest.mark.parametrize("kind", FILES)
def test_files_of_a_checkpoint(kind, folder):
    assert {path.stem for path in (folder / kind).glob("*.py")} == FILES[kind]
    for path in (folder / kind).glob("*.py"):
        assert path.read_bytes() == (PACKAGE / path.name).read_bytes()


# ------------------------------------------------------------------------------------------------ what the code does

# Imports the classes in `auto_map` of each checkpoint twice. The first time, torch and Transformers import what they
# need. The second time, every event comes from the files themselves. Prints what they did, and which files were loaded.
AUDIT = r"""
import builtins, importlib, json, os, resource, sys, threading, types
from pathlib import Path

sys.dont_write_bytecode = True
import torch, transformers
from transformers import conversion_mapping, masking_utils, modeling_utils
from transformers.integrations import moe
from transformers.models.auto import auto_factory, configuration_auto, feature_extraction_auto, image_processing_auto
from transformers.models.auto import modeling_auto, processing_auto, tokenization_auto

report = {}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Modules of the standard library that run generated code to define classes, or evaluate annotations.
DEFINERS = {importlib.util.find_spec(name).origin for name in ("collections", "dataclasses", "typing")}
HARMLESS = {"builtins.id", "sys._getframe", "sys._getframemodulename", "object.__getattr__", "object.__setattr__"}
watched, found, imported = None, set(), set()


def audit(event, arguments):
    if watched is None or event in HARMLESS or threading.current_thread() is not threading.main_thread():
        return
    frame = sys._getframe(1)
    caller = frame.f_code.co_filename
    if event == "import":
        if arguments[0].startswith(watched[0]):
            return
    elif event == "open":
        path, _, flags = arguments
        if not flags & WRITES and os.fspath(path).startswith(watched[1]):
            return
    elif event == "os.listdir" and os.fspath(arguments[0]) == watched[1]:
        return
    elif event in ("compile", "exec") and (caller.startswith("<frozen importlib") or caller in DEFINERS):
        return
    found.add(f"{event} {str(arguments)[:200]} in {caller}:{frame.f_lineno}")


def import_module(name, globals=None, locals=None, fromlist=(), level=0, *, original=builtins.__import__):
    if watched is not None and level == 0 and (globals or {}).get("__name__", "").startswith(watched[0]):
        imported.add(name)
    return original(name, globals, locals, fromlist, level)


def load(name, folder):
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    for file in ("config.json", "processor_config.json"):
        if (folder / file).exists():
            for value in json.loads((folder / file).read_text())["auto_map"].values():
                module, _, class_name = value.rpartition(".")
                getattr(importlib.import_module(f"{name}.{module}"), class_name)


def state():
    tables = [
        vars(module)[name]
        for module in (modeling_auto, configuration_auto)
        for name in vars(module)
        if name.endswith("NAMES")
    ]
    mappings = [
        mapping._extra_content
        for module in (modeling_auto, configuration_auto, processing_auto, tokenization_auto, image_processing_auto)
        for mapping in vars(module).values()
        if hasattr(mapping, "_extra_content")
    ]
    functions = [
        modeling_utils.ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, moe.ALL_EXPERTS_FUNCTIONS,
        transformers.activations.ACT2FN, transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS,
        conversion_mapping._checkpoint_conversion_mapping_cache,
    ]
    tables += [*mappings, *functions]
    entries = {(number, key): str(value) for number, table in enumerate(tables) for key, value in dict(table).items()}
    process = (
        dict(os.environ), list(sys.path), list(sys.meta_path), list(sys.path_hooks), torch.get_default_dtype(),
        torch.get_rng_state().sum().item(), torch.get_num_threads(), torch.is_grad_enabled(), os.getcwd(),
        threading.active_count(), sys.excepthook, builtins.open, builtins.print, len(__import__("warnings").filters),
    )
    return entries, process


conversion_mapping.get_checkpoint_conversion_mapping("llama")  # builds the table
builtins.__import__ = import_module
sys.addaudithook(audit)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
for kind, path in json.loads(sys.argv[1]).items():
    folder = Path(path)
    entries, process = state()
    try:
        load(f"first_{kind}", folder)
        new, after = state()
        watched, found, imported = (f"second_{kind}", str(folder)), set(), set()
        load(f"second_{kind}", folder)
    except Exception as error:
        found.add(f"{type(error).__name__}: {error}")
    finally:
        watched = None
    loaded = {name.rpartition(".")[2] for name in sys.modules if name.startswith(f"second_{kind}.")}
    report[kind] = {
        "found": sorted(found),
        "imported": sorted(imported),
        "loaded": sorted(loaded),
        "registered": sorted({str(value) for name, value in new.items() if entries.get(name) != value}),
        "process is unchanged": after == process,
    }
print(json.dumps(report))
"""


def audit(folders: dict[str, Path], cwd: Path) -> dict[str, dict]:
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(cwd / "none"), "OMP_NUM_THREADS": "1"}
    paths = json.dumps({kind: str(path) for kind, path in folders.items()})
    result = subprocess.run(
        [sys.executable, "-I", "-c", AUDIT, paths], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


# Modules of the standard library that the files may import.
STANDARD_LIBRARY = {
    *(
        "__future__",
        "base64",
        "collections",
        "contextlib",
        "contextvars",
        "copy",
        "dataclasses",
        "difflib",
        "functools",
    ),
    *("inspect", "io", "itertools", "json", "math", "os", "pathlib", "re", "sys", "threading", "types", "typing"),
    *("warnings", "weakref"),
}
ALLOWED = STANDARD_LIBRARY | {"torch", "transformers"}
REGISTERED = {
    "ours": ["SparseMoeVlmForCausalLM", "SparseMoeVlmForConditionalGeneration"],
    "upcycled": ["UpcycledQwen3VLForConditionalGeneration"],
}

# What each line does that the audit must report, or the module that it must not import.
HOSTILE = {
    "open('written', 'w')": "open ('written', 'w'",
    "open('/etc/hostname')": "open ('/etc/hostname', 'r'",
    "__import__('pathlib').Path('made').mkdir(exist_ok=True)": "os.mkdir",
    "__import__('os').remove('none')": "FileNotFoundError",
    "__import__('os').environ.update(SAFETY='1')": "os.putenv",
    "__import__('os').system('true')": "os.system",
    "import subprocess; subprocess.run(['true'])": "subprocess.Popen",
    "import socket; socket.socket()": "socket.__new__",
    "import ctypes; ctypes.CDLL(None)": "ctypes.dlopen",
    "exec('1')": "exec (<code object <module>",
    "eval('1')": "compile (b'1', '<string>')",
    "compile('1', 'name', 'eval')": "compile (b'1', 'name')",
    "import torch; torch.save(1, 'written')": "RuntimeError",  # torch opens the file itself, but may not write to it
}
FOREIGN = {
    "import numpy": "numpy",
    "import pickle": "pickle",
    "from safetensors.torch import load_file": "safetensors",
    "import modeling_sparse_moe_vlm": "modeling_sparse_moe_vlm",  # last, because it registers its classes
}
CHANGES = {
    "import torch; torch.set_default_dtype(torch.float64)": "process is unchanged",
    "import torch; torch.manual_seed(7)": "process is unchanged",
    "import sys; sys.path.append('/tmp')": "process is unchanged",
    "import transformers as t; t.LlamaConfig.model_type = 'x'; t.AutoConfig.register('x', t.LlamaConfig)": "registered",
}


@pytest.mark.extensive
def test_importing_the_code_only_defines_and_registers(folder, tmp_path):
    lines = [*HOSTILE, *CHANGES, *FOREIGN]
    copies = {}
    for number, line in enumerate(lines):
        copies[f"line_{number}"] = tmp_path / f"line_{number}"
        copies[f"line_{number}"].mkdir()
        (tmp_path / f"line_{number}" / "bad.py").write_text(f"{line}\nCLASS = None\n")
        (tmp_path / f"line_{number}" / "config.json").write_text('{"auto_map": {"AutoConfig": "bad.CLASS"}}')
    report = audit({kind: folder / kind for kind in FILES} | copies, tmp_path)
    for kind, files in FILES.items():
        done = report[kind]
        assert done["found"] == [], kind
        assert {name.partition(".")[0] for name in done["imported"]} <= ALLOWED
        # The configuration of the tower names this file, but not the configuration of a retrieval model.
        unused = {"modeling_upcycled_classification"} if kind == "upcycled_retrieval" else set()
        assert done["loaded"] == sorted(files - unused), "a file that travels is not needed"
        assert done["registered"] == REGISTERED.get(kind, [])
        assert done["process is unchanged"]
    for number, line in enumerate(lines):
        done = report[f"line_{number}"]
        if line in HOSTILE:
            assert any(event.startswith(HOSTILE[line]) for event in done["found"]), (line, done)
        elif line in FOREIGN:
            assert FOREIGN[line] in {name.partition(".")[0] for name in done["imported"]} - ALLOWED, (line, done)
        elif CHANGES[line] == "registered":
            assert done["registered"], line
        else:
            assert not done[CHANGES[line]], line


# ------------------------------------------------------------------------------------------------ what the code says

SHIPPED = sorted(set().union(*FILES.values()))
# Built-in functions that run or import code, or open files.
FORBIDDEN_NAMES = {"breakpoint", "compile", "eval", "exec", "input", "open", "__import__", "__builtins__", "__loader__"}
ATTRIBUTES_TOO = FORBIDDEN_NAMES - {"compile"} | {"httpx"}
# Attributes that start processes, run code, write files, use the network, read pickles or reach into the interpreter.
FORBIDDEN_ATTRIBUTES = {
    *("system", "popen", "Popen", "fork", "kill", "execv", "execve", "posix_spawn", "startfile", "spawnv", "putenv"),
    *("write", "write_text", "write_bytes", "writelines", "mkdir", "makedirs", "touch", "unlink", "remove", "rmdir"),
    *("rmtree", "rename", "symlink_to", "hardlink_to", "chmod", "chown", "copyfile", "copytree", "move"),
    *("urlopen", "urlretrieve", "request", "post", "put", "socket", "connect", "hf_hub_download", "snapshot_download"),
    *("Unpickler", "find_class", "CDLL", "dlopen", "load_library", "hub", "cpp_extension", "save"),
    *(
        "__globals__",
        "__builtins__",
        "__subclasses__",
        "__code__",
        "__closure__",
        "f_globals",
        "f_back",
        "modules_cache",
    ),
    *("save_file", "to_json_file", "push_to_hub", "upload_file", "upload_folder", "import_module"),
}
# Each use that is allowed, and why.
EXCEPTIONS = {
    ("checkpoint_integrity", "open"),  # reads the header of a file with weights
    ("experts_config", "push_to_hub"),  # leaves out paths and calls the method of Transformers
    ("experts_host", "push_to_hub"),  # the same, and the name of an argument of `save_pretrained`
    ("fused_head", "__code__"),  # looks up from which function of TRL a `forward` was made
    ("image_reading", "open"),  # Pillow opens images that a caller passes
    ("video_decoding", "av"),  # decodes videos that a caller passes, if it is installed
    ("video_decoding", "open"),  # Pillow and PyAV open videos that a caller passes
    ("image_reading", "httpx"),  # downloads images that a caller passes as a URL
    ("sentence_transformers_files", "mkdir"),  # in `save_pretrained` of a retrieval model
    ("sentence_transformers_files", "write_text"),  # in `save_pretrained` of a retrieval model
}


def uses_of(text: str) -> list[str]:
    """Lists the forbidden names, attributes and modules in a file."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES | ATTRIBUTES_TOO:
            found.append(node.attr)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] not in ALLOWED]
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found += sorted(names & (FORBIDDEN_NAMES | FORBIDDEN_ATTRIBUTES))
            if not node.level and str(node.module).partition(".")[0] not in ALLOWED:
                found.append(str(node.module))
        elif isinstance(node, ast.Constant) and node.value in FORBIDDEN_NAMES | FORBIDDEN_ATTRIBUTES:
            found.append(str(node.value))  # as in `getattr(os, "system")`
    return found


def test_the_code_uses_nothing_dangerous():
    found = {(name, use) for name in SHIPPED for use in uses_of((PACKAGE / f"{name}.py").read_text())}
    assert found == EXCEPTIONS


@pytest.mark.parametrize(
    ("line", "uses"),
    [
        *((line, None) for line in (*HOSTILE, *FOREIGN)),
        ("getattr(os, 'system')('true')", ["system"]),
        ("from os import system", ["system"]),
        ("from urllib.request import urlopen", ["urlopen", "urllib.request"]),
        ("torch.hub.load('a', 'b')", ["hub"]),
        ("pathlib.Path('a').write_bytes(b'')", ["write_bytes"]),
        ("import shutil", ["shutil"]),
        ("(lambda: 0).__globals__", ["__globals__"]),
        ("re.compile('a')", []),
        ("import torch.nn.functional as F; from .checks import check", []),
    ],
)
def test_dangerous_uses_are_found(line, uses):
    assert uses_of(line) if uses is None else uses_of(line) == uses


def test_only_the_package_stages_saves_and_compares_code(folder, tmp_path):
    """The code in checkpoints leaves files to Transformers, and the modules that do not travel keep their names."""
    from modeling_sparse_moe_vlm import code_revisions, staged_saves
    from modeling_sparse_moe_vlm.experts_host import ExpertsHost

    assert staged_saves is registered.staged_saves
    assert code_revisions is registered.code_revisions
    assert ExpertsHost._staged_folder is staged_saves.staged_folder
    assert ExpertsHost._warn_of_other_code is code_revisions.warn_of_other_code
    name = "modeling_sparse_moe_vlm.SparseMoeVlmForCausalLM"
    remote = get_class_from_dynamic_module(name, folder / "text")
    assert remote._staged_folder is remote._warn_of_other_code is None
    model = remote.from_pretrained(folder / "text", trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(
        path.name for path in (folder / "text").iterdir()
    )
