"""Adapters of experts in two processes: outputs, gradients and files equal those of one process."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config, factor_expert_lora
from tests.support import in_tree_moe
from tests.support.models import make_model
from tests.support.processes import run_in_processes

pytestmark = pytest.mark.newest

MODELS = {
    "hybrid": {},
    "isolated": {"expert_groups": "isolated"},
    "pools": {"expert_pool": [0, 0]},
    "dora": {"expert_groups": "isolated"},
}
SIZES = [{"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}, {"tp_size": 2}]
# Experts, and linear layers that tensor parallelism splits by rows, by columns or not at all.
CONFIG = {
    "r": 3,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "o_proj", "linear_1", "gate_proj", "down_proj"],
    "target_parameters": ["gate_up_proj", "down_proj"],
    "init_lora_weights": False,
}

SCRIPT = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
import modeling_sparse_moe_vlm
from modeling_sparse_moe_vlm.toolbox.expert_lora import factor_expert_lora, load_expert_lora
from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config
from tests.integration.test_parallel_lora import CONFIG, MODELS, SIZES
from tests.integration.test_trainer import make_rows
from tests.support.batches import collate
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
rows = make_rows(2)[::-1]  # every second row has no image, so with two batches one process gets no image
whole_batch = collate(rows)
num_targets = int((whole_batch["labels"][:, 1:] != -100).sum())


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load(name, sizes=None, experts="grouped_mm"):
    distributed = {"distributed_config": DistributedConfig(**sizes)} if sizes else {}
    model_class = AutoModelForCausalLM if name == "qwen3_moe" else AutoModelForImageTextToText
    return model_class.from_pretrained(folder / name, experts_implementation=experts, **distributed)


def adapters(model):
    return {name: value for name, value in model.named_parameters() if "lora_" in name}


def compare(model, adapted, sizes, case):
    mine = slice(rank, None, 2) if "fsdp_size" in sizes else slice(None)
    batch = collate(rows[mine])
    outputs = adapted(**batch, num_items_in_batch=num_targets)
    outputs.loss.backward()
    real = batch["attention_mask"].bool()
    expected = model.last_logits[mine][:, : real.shape[1]]
    torch.testing.assert_close(full(outputs.logits)[real], expected[real], atol=1e-4, rtol=1e-4, msg=case)
    num_batches = sizes.get("fsdp_size", 1)
    for name, parameter in adapters(adapted).items():
        gradient, expected_gradient = full(parameter.grad) * num_batches, adapters(model)[name].grad
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-3, msg=f"{case} {name}")
    adapted.eval()
    with torch.no_grad():
        logits = full(adapted(**batch).logits)
        torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4, msg=case)


def saves_the_same(adapted, path, expected):
    adapted.save_pretrained(path, is_main_process=rank == 0)
    dist.barrier()
    for name, tensor in load_file(expected / "adapter_model.safetensors").items():
        assert torch.equal(load_file(path / "adapter_model.safetensors")[name], tensor), name


def fails(function, words):
    try:
        function()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"no error with {words!r}")


for name in MODELS:
    saved = folder / f"{name} adapter"
    for experts in ("eager", "grouped_mm", "batched_mm") if name == "isolated" else ("grouped_mm",):
        model = load_expert_lora(load(name, None, experts), saved, is_trainable=True)
        outputs = model.train()(**whole_batch, num_items_in_batch=num_targets)
        outputs.loss.backward()
        model.last_logits = outputs.logits.detach()
        for sizes in SIZES:
            spread = load(name, sizes, experts)
            if experts == "grouped_mm":
                adapted = load_expert_lora(spread, saved, is_trainable=True).train()
            else:
                adapted = factor_expert_lora(PeftModel.from_pretrained(spread, saved, is_trainable=True)).train()
            if name == "dora" and sizes == {"tp_size": 2}:
                fails(lambda: adapted(**whole_batch), "DoRA needs the norms of whole matrices")
                continue
            compare(model, adapted, sizes, f"{name} {experts} {sizes}")
            saves_the_same(adapted, folder / "again", saved)
            if experts != "grouped_mm" or name != "isolated":
                continue
            # All processes have the values of the first one in new adapters.
            torch.manual_seed(rank)
            config = LoraConfig(**CONFIG)
            adapted = factor_expert_lora(get_peft_model(load(name, sizes), config))
            for key, value in adapters(adapted).items():
                values = [torch.empty_like(value) for _ in range(2)]
                if not isinstance(value, DTensor):
                    dist.all_gather(values, value.detach())
                    assert torch.equal(*values), key
            spread = load(name, sizes)
            adapted = get_peft_model(spread, expert_lora_config(spread, r=2))
            if "fsdp_size" in sizes:
                fails(lambda: expert_lora_config(spread, routers=True), "cannot train it in full")
            dora = "cannot adapt its linear layers with `use_dora`"
            fails(lambda: expert_lora_config(spread, attention=True, use_dora=True), dora)
            fails(adapted.merge_adapter, "merge it in one process")
            if sizes != {"fsdp_size": 2}:
                fails(lambda: adapted(**whole_batch), "call `factor_expert_lora(model)`")
            fails(lambda: adapted.eval()(**whole_batch, adapter_names=["default"] * 2), "leave out `adapter_names`")

# The adapter methods of Transformers, with the same batch in all processes.
batch = {"input_ids": torch.arange(4, 24).view(2, 10), "labels": torch.arange(4, 24).view(2, 10)}
model = load_expert_lora(load("qwen3_moe"), folder / "qwen3_moe adapter", is_trainable=True)
expected = model(**batch)
expected.loss.backward()
for sizes in SIZES:
    adapted = load_expert_lora(load("qwen3_moe", sizes), folder / "qwen3_moe adapter", is_trainable=True)
    outputs = adapted(**batch)
    outputs.loss.backward()
    torch.testing.assert_close(full(outputs.logits), expected.logits, atol=1e-4, rtol=1e-4, msg=str(sizes))
    for name, parameter in adapters(adapted).items():
        expected_gradient = adapters(model)[name].grad
        torch.testing.assert_close(full(parameter.grad), expected_gradient, atol=1e-5, rtol=1e-3, msg=f"{sizes} {name}")
print(f"rank {rank} is done")
dist.destroy_process_group()
"""


@pytest.mark.extensive
def test_adapters_are_those_of_one_process(tmp_path):
    sizes = {"vocab_size": 100, "num_experts": 8, "num_key_value_heads": 4, "moe_intermediate_size": 32}
    models = {name: make_model(**sizes, **fields) for name, fields in MODELS.items()}
    for name, model in (models | {"qwen3_moe": in_tree_moe.make_model("qwen3_moe", width=32, vocab_size=100)}).items():
        model.save_pretrained(tmp_path / name)
        if name in ("dora", "qwen3_moe"):
            adapted = get_peft_model(model, expert_lora_config(model, r=3, use_dora=name == "dora"))
        else:
            adapted = get_peft_model(model, LoraConfig(**CONFIG))
        for key, value in adapted.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                torch.nn.init.normal_(value, std=0.2)
        factor_expert_lora(adapted).save_pretrained(tmp_path / f"{name} adapter")
    result = run_in_processes(SCRIPT, tmp_path)
    assert result.returncode == 0, result.stderr[-12000:]
    assert result.stdout.count("is done") == 2
