"""Upcycled checkpoints of several revisions in one process, loaded by several threads at once, without the package."""

import os
import subprocess
import sys

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.retrieval import to_retrieval
from tests.support.processors import make_tokenizer
from tests.support.upcycled import make_dense_inputs, make_few_experts

pytestmark = [pytest.mark.newest, pytest.mark.extensive]

SCRIPT = """
import copy, json, pickle, shutil, sys, threading
from pathlib import Path
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForSequenceClassification
from transformers import dynamic_module_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

torch.set_num_threads(1)
root = Path(sys.argv[1])
inputs, expected = torch.load(root / "values.pt")
models = {}


def load(name):
    auto_class = AutoModel if name == "retrieval" else AutoModelForImageTextToText
    return auto_class.from_pretrained(root / name / "model", trust_remote_code=True).eval()


def check(name, model):
    with torch.no_grad():
        outputs = model(**inputs)
    torch.testing.assert_close(outputs.embeddings if name == "retrieval" else outputs.logits, expected[name])


threads = [threading.Thread(target=lambda name=name: models.update({name: load(name)})) for name in expected]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert models.keys() == expected.keys()
for name, model in models.items():
    again = pickle.loads(pickle.dumps(model))
    check(name, again)
    check(name, copy.deepcopy(model))
    check(name, model)
    model.save_pretrained(root / "saved" / name)
    folders = (root / "saved" / name, root / name / "model")
    saved, code = ({path.name: path.read_bytes() for path in folder.glob("*.py")} for folder in folders)
    assert saved == code, name
    saved, code = (json.loads((folder / "config.json").read_text())["auto_map"] for folder in folders)
    assert saved == code, name
shutil.rmtree(dynamic_module_utils.HF_MODULES_CACHE)
for name in (*expected, *expected):
    check(name, load(name))
    if name != "retrieval":
        folder = root / name / "model"
        scorer = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=1).eval()
        with torch.no_grad():
            last = models[name].base_model(**inputs).last_hidden_state[:, -1]
            torch.testing.assert_close(scorer(**inputs).logits, scorer.score(last))
assert not [name for name in CONFIG_MAPPING._extra_content if "upcycled" in name]
assert "modeling_sparse_moe_vlm" not in sys.modules
"""


def scale_experts(folder, factor: int) -> None:
    """Changes the code of a checkpoint, so that the output of its sparse blocks is scaled."""
    path = folder / "upcycled_layers.py"
    code, line = path.read_text(), "return super().forward(hidden_states, plan.routing_of(hidden_states), pooled)"
    assert code.count(line) == 1
    path.write_text(code.replace(line, line.replace("return ", f"return {factor} * ")))


def test_revisions_and_kinds_do_not_disturb_each_other(tmp_path):
    inputs, expected = make_dense_inputs("llava"), {}
    for name, expert_groups, factor in (("one", "isolated", 1), ("two", "isolated", 2), ("joint", "joint", 1)):
        model = make_few_experts("llava", expert_groups, seed=factor)
        model.save_pretrained(tmp_path / name / "model")
        if factor != 1:
            scale_experts(tmp_path / name / "model", factor)
            for layer in model.model.language_model.layers:
                layer.mlp.register_forward_hook(lambda module, args, output: 2 * output)
        with torch.no_grad():
            expected[name] = model(**inputs).logits
    model = to_retrieval(make_few_experts("llava", "isolated", seed=3), make_tokenizer())
    model.save_pretrained(tmp_path / "retrieval" / "model")
    with torch.no_grad():
        expected["retrieval"] = model(**inputs).embeddings
    torch.save((inputs, expected), tmp_path / "values.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", SCRIPT, str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
