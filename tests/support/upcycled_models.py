"""Upcycled models whose experts differ, as after training, so that it matters who serves a token."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle
from tests.support import in_tree_models
from tests.support.in_tree_models import TEXT


def make_dense(name: str = "llava"):
    """A small dense model: Transformers' own Llama, or one with images."""
    if name == "llama":
        torch.manual_seed(0)
        return in_tree_models.prepare(LlamaForCausalLM(LlamaConfig(**TEXT)))
    return in_tree_models.make_model(name)


def make_dense_inputs(name: str = "llava") -> dict[str, torch.Tensor]:
    inputs = in_tree_models.make_inputs(name, padded=False)
    if name == "llama":
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        inputs["input_ids"][:, 2:10] += 50  # no placeholders
        inputs["input_ids"] %= 99
    return inputs


@torch.no_grad()
def spread_experts(model):
    """Moves every weight of routers and experts, so that no two experts are alike."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "expert" in name or ".gate.weight" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_upcycled(name: str = "llava", expert_groups="isolated", **request):
    """An upcycled model in evaluation mode, as after training."""
    request = {"num_experts": 4} | request if isinstance(expert_groups, str) else request
    return spread_experts(upcycle(make_dense(name), expert_groups, **request)).eval()
