"""Slow, literal implementations of the formulas in papers, token by token and expert by expert, as references."""

import copy

import torch
import torch.nn.functional as F

from modeling_sparse_moe_vlm.experts import SparseMoeVlmSparseMoeBlock
from tests.support.models import make_config

# Groups of every kind with one router: experts per modality, joint experts, and always-on experts of two widths.
MANY_GROUPS = [
    {"name": "text", "num_experts": 2, "modalities": ["text"], "intermediate_size": 16},
    {"name": "joint", "num_experts": 3},
    {"name": "image", "num_experts": 4, "modalities": ["image"]},
    {"name": "vision", "num_experts": 2, "modalities": ["image"], "always_on": True},
    {"name": "everyone", "num_experts": 2, "always_on": True, "intermediate_size": 8},
]
# Configurations with different kinds of experts and routing.
ARRANGEMENTS = {
    "hybrid": {},
    "joint": {"expert_groups": "joint"},
    "isolated": {"expert_groups": "isolated"},
    "many": {"expert_groups": MANY_GROUPS, "num_experts": None},
    "many-top_p": {"expert_groups": MANY_GROUPS, "num_experts": None, "router": "top_p", "num_experts_per_tok": 3},
    "many-by_modality": {
        "expert_groups": MANY_GROUPS,
        "num_experts": None,
        "num_experts_per_tok_by_modality": {"text": 1, "image": 3},
    },
    "joint-by_modality": {"expert_groups": "joint", "num_experts_per_tok_by_modality": {"image": 1}},
    "joint-sigmoid": {"expert_groups": "joint", "router": "sigmoid"},
    "hybrid-unnormalised": {"norm_topk_prob": False},
    "hybrid-top_p-unnormalised": {"router": "top_p", "norm_topk_prob": False, "num_experts_per_tok": 4},
    "joint-bias": {"expert_groups": "joint", "router_bias_update_rate": 1e-3},
    "many-sigmoid-bias": {
        "expert_groups": MANY_GROUPS,
        "num_experts": None,
        "router": "sigmoid",
        "router_bias_update_rate": 1e-3,
    },
    "hybrid-top_p-bias": {"router": "top_p", "num_experts_per_tok": 3, "router_bias_update_rate": 1e-3},
}


def make_block(seed: int = 0, implementation: str = "eager", **text_config):
    """Returns a sparse block with random weights that are large enough to matter, and its configuration."""
    config = make_config(**text_config).text_config
    config._experts_implementation = implementation
    block = SparseMoeVlmSparseMoeBlock(config, layer_idx=0)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*block.parameters(), *block.buffers()):
        torch.nn.init.normal_(tensor, std=0.3, generator=generator)
    return block, config


def route_token(
    scores: torch.Tensor, k: int, router: str, normalised: bool, top_p: float, bias: torch.Tensor | None = None
) -> dict[int, torch.Tensor]:
    """Returns the weights of the chosen experts of one token with these router logits and this bias, `(experts,)`."""
    affinity = torch.sigmoid(scores) if router == "sigmoid" else torch.exp(scores) / torch.exp(scores).sum()
    rank = affinity if bias is None else affinity + bias
    chosen, mass = [], 0.0
    for expert in sorted(range(len(scores)), key=lambda expert: -rank[expert].item())[:k]:
        if router == "top_p" and mass >= top_p:
            break
        chosen.append(expert)
        mass += affinity[expert].item()
    total = sum(affinity[expert] for expert in chosen) if normalised else 1.0
    return {expert: affinity[expert] / total for expert in chosen}


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return down @ (F.silu(gate @ x) * (up @ x))


def run_block(block, config, hidden_states: torch.Tensor, modality_ids: torch.Tensor):
    """
    Runs the sparse block in float64. Returns its output `(T, D)` and the float64 copy, for gradients of its parameters.
    """
    block = copy.deepcopy(block).double()
    groups = config.layer_expert_groups(0)
    several = len(config.routed_group_names) > 1
    outputs = []
    for x, modality_id in zip(hidden_states, modality_ids.tolist(), strict=True):
        modality = config.modalities[modality_id]
        output = torch.zeros_like(x)
        candidates = []  # (row of the router, stack of experts, index in the stack)
        row = 0
        for group in groups:
            if group.always_on:
                continue
            stack = block.experts[group.name] if several else block.experts
            for number in range(group.num_experts):
                if modality in group.modalities:
                    candidates.append((row, stack, number))
                row += 1
        scores = torch.stack([block.gate.weight[row] @ x for row, _, _ in candidates])
        bias = block.gate.e_score_correction_bias
        weights = route_token(
            scores,
            config.experts_per_token(modality),
            config.router,
            config.norm_topk_prob,
            config.router_top_p,
            None if bias is None else bias[modality_id, [row for row, _, _ in candidates]],
        )
        for candidate, weight in weights.items():
            _, stack, number = candidates[candidate]
            gate, up = stack.gate_up_proj[number].chunk(2)
            output = output + weight * swiglu(x, gate, up, stack.down_proj[number])
        for group in groups:
            if not group.always_on or modality not in group.modalities:
                continue
            shared = block.shared_experts[group.name]
            for number in range(group.num_experts):
                units = slice(number * group.intermediate_size, (number + 1) * group.intermediate_size)
                output = output + swiglu(
                    x, shared.gate_proj.weight[units], shared.up_proj.weight[units], shared.down_proj.weight[:, units]
                )
        outputs.append(output)
    return torch.stack(outputs), block
