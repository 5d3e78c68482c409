"""Checkpoints of upcycled models in a process where this package cannot be imported."""

import os
import subprocess
import sys

import torch

from tests.support.in_tree_models import GREEDY
from tests.support.upcycled import make_dense_inputs, make_few_experts

SCRIPT = """
import pickle, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoModelForSequenceClassification

root, *names = sys.argv[1:]
for name in names:
    inputs, expected, generated = torch.load(f"{root}/{name}.pt")
    auto_class = AutoModelForCausalLM if name == "llama" else AutoModelForImageTextToText
    with torch.no_grad():
        for folder in (f"{root}/{name}", f"{root}/{name}-again"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            model = auto_class.from_pretrained(folder, trust_remote_code=True)
            base = AutoModel.from_pretrained(folder, trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules."), type(model)
            assert type(model.config).__name__ == type(config).__name__
            for again in (model, pickle.loads(pickle.dumps(model))):
                torch.testing.assert_close(again(**inputs).logits, expected)
            assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), generated)
            torch.testing.assert_close(model.lm_head(base(**inputs).last_hidden_state), expected)
            scorer = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=1)
            scorer.config.get_text_config().pad_token_id = 1
            assert type(scorer).__module__.startswith("transformers_modules."), type(scorer)
            assert type(scorer.base_model).__name__ == type(base).__name__
            last = base(**inputs).last_hidden_state[:, -1]
            torch.testing.assert_close(scorer(**inputs).logits, scorer.score(last))
            losses = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
            assert losses.router_loss > 0 and len(losses.router_logits) == 2
            if folder == f"{root}/{name}":
                model.save_pretrained(f"{root}/{name}-again")
                saved = f"{root}/{name}-scorer"
                scorer.save_pretrained(saved)
                again = AutoModelForSequenceClassification.from_pretrained(saved, trust_remote_code=True)
                torch.testing.assert_close(again(**inputs).logits, scorer(**inputs).logits)
    try:
        auto_class.from_pretrained(f"{root}/{name}")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError("a load without the code would have random blocks")
assert "modeling_sparse_moe_vlm" not in sys.modules
"""


def test_checkpoints_contain_all_code_that_they_need(tmp_path):
    names = {"llama": "hybrid", "llava": "isolated", "qwen3_vl": "hybrid"}
    for name, expert_groups in names.items():
        model, inputs = make_few_experts(name, expert_groups), make_dense_inputs(name)
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            torch.save((inputs, model(**inputs).logits, model.generate(**inputs, **GREEDY)), tmp_path / f"{name}.pt")
        model.save_pretrained(tmp_path / name)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", SCRIPT, str(tmp_path), *names]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    for name in names:
        code, *others = (
            {path.name: path.read_text() for path in (tmp_path / folder).glob("*.py")}
            for folder in (name, f"{name}-again", f"{name}-scorer")
        )
        assert others == [code, code]
        assert "modeling_upcycled.py" in code
        assert "modeling_sparse_moe_vlm.py" not in code
