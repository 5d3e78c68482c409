"""Experts: the feed-forward networks that tokens are routed to, stored as fused stacks, one module per group.

Shapes, with T tokens of width D, E experts of width I and k experts per token::

    hidden_states (T, D), top_k_index (T, k), top_k_weights (T, k) ──► (T, D)
    gate_up_proj (E, 2 I, D), down_proj (E, D, I)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .expert_groups import ExpertGroup
from .expert_shards import SparseMoeVlmExpertShards, run_at_once, send, shard_sizes
from .experts_config import SparseMoeVlmExpertsConfig
from .parallel_plans import is_one_of_several_processes
from .routing import LayerRouting, RoutingPlan, RoutingRule, SparseMoeVlmTopKRouter, groups_key

_Experts = TypeVar("_Experts", bound=nn.Module)


@use_experts_implementation
class SparseMoeVlmExperts(nn.Module):
    """
    The routed experts of one group. `forward` is the readable reference (`experts_implementation="eager"`);
    `grouped_mm`, `batched_mm` and others come from Transformers' experts interface.
    """

    # Set by the decorator.
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]
    _is_expert_parallel: bool

    def __init__(self, config: PreTrainedConfig, group: ExpertGroup):
        super().__init__()
        self.num_experts = group.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = group.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden_states)
        chosen = [expert for expert in top_k_index.unique().tolist() if expert < self.num_experts]
        for expert in chosen:
            token, slot = torch.where(top_k_index == expert)
            gate_up = F.linear(hidden_states[token], self.gate_up_proj[expert])
            expert_output = F.linear(self._apply_gate(gate_up), self.down_proj[expert])
            weighted = expert_output * top_k_weights[token, slot, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        if not chosen and torch.is_grad_enabled():
            # Keeps the parameters in the graph, or data-parallel ranks that see no such token would hang.
            output = output + 0.0 * (self.gate_up_proj[0, 0, 0] + self.down_proj[0, 0, 0])
        return output


class SparseMoeVlmExpertGroups(nn.ModuleDict):
    """The routed groups of a layer, by name, where there are several: ids count through the groups in order."""

    def __init__(self, config: SparseMoeVlmExpertsConfig, groups: tuple[ExpertGroup, ...]):
        super().__init__({group.name: _accept_sentinels(_make_stack(config, group)) for group in groups})
        # Not read off the groups, since expert parallelism changes their `num_experts`.
        self._sizes = {group.name: group.num_experts for group in groups}

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        tokens: dict[str, torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        calls, rows_of_calls = [], []
        first = 0
        for name, experts in self.items():
            size = self._sizes[name]
            rows = tokens[name] if tokens is not None else None
            if rows is not None and rows.dtype == torch.bool:
                rows = None  # the router sends the other tokens elsewhere, so their slots become sentinels below
            index = _take(top_k_index, rows) - first
            elsewhere = (index < 0) | (index >= size)
            inputs = (
                _take(hidden_states, rows),
                index.masked_fill(elsewhere, size),
                _take(top_k_weights, rows).masked_fill(elsewhere, 0.0),
            )
            if not _is_skippable(experts, inputs[0]):
                calls.append((experts, inputs))
                rows_of_calls.append(rows)
            first += size
        output = torch.zeros_like(hidden_states)
        for rows, addend in zip(rows_of_calls, run_at_once(calls, hidden_states.device), strict=True):
            output = _add(output, addend, rows)
        return output


class SparseMoeVlmMLP(nn.Module):
    """Gated feed-forward network (SwiGLU, arXiv 2002.05202): `(..., D)` → `(..., D)`."""

    def __init__(self, config: PreTrainedConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class SparseMoeVlmSharedExperts(nn.ModuleDict):
    """
    The always-on groups of a layer, by name. n always-on experts of width I are one feed-forward network of width n·I,
    so each group is a dense network over the tokens that it serves.
    """

    def __init__(self, config: SparseMoeVlmExpertsConfig, groups: tuple[ExpertGroup, ...]):
        super().__init__(
            {group.name: SparseMoeVlmMLP(config, group.num_experts * group.intermediate_size) for group in groups}
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        output: torch.Tensor,
        tokens: dict[str, torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """Adds the experts' outputs for `hidden_states (T, D)` to `output (T, D)`."""
        for name, expert in self.items():
            rows = tokens[name] if tokens is not None else None
            if rows is not None and rows.dtype == torch.bool:
                output = output + torch.where(rows[:, None], send(expert(hidden_states), output.device), 0.0)
                continue
            inputs = _take(hidden_states, rows)
            if not _is_skippable(expert, inputs):
                output = _add(output, send(expert(inputs), output.device), rows)
        return output


class SparseMoeVlmSparseMoeBlock(nn.Module):
    """Sparse feed-forward block of a decoder layer: router → routed experts, plus always-on experts.

    `hidden_states (B, T, D)` → `(B, T, D)`. Without `routing`, the tokens are all text. Where the layer belongs to an
    expert pool, the routed experts are `pooled_experts`.
    """

    def __init__(self, config: SparseMoeVlmExpertsConfig, layer_idx: int):
        super().__init__()
        routed = config.layer_expert_groups(layer_idx, always_on=False)
        always_on = config.layer_expert_groups(layer_idx, always_on=True)
        self.layer_idx = layer_idx
        self.groups_key = groups_key(routed)
        self.rule = RoutingRule.of(config, routed)
        self.gate = SparseMoeVlmTopKRouter(config, routed)
        # Layers of an expert pool have no routed experts of their own.
        self.experts = None if config.layer_pool(layer_idx) is not None else make_experts(config, routed)
        self.shared_experts = SparseMoeVlmSharedExperts(config, always_on) if always_on else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        routing: RoutingPlan | None = None,
        pooled_experts: nn.Module | None = None,
    ) -> torch.Tensor:
        experts = self.experts if pooled_experts is None else pooled_experts
        assert experts is not None
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])
        tokens = None
        if routing is None:
            _, top_k_weights, top_k_index = self.gate(hidden_states)
        else:
            tokens = routing.tokens
            router_logits, top_k_weights, chosen = self.gate(
                hidden_states, routing.served.get(self.groups_key), routing.num_slots, routing.modality_ids
            )
            top_k_weights, top_k_index = self.rule.drop(
                router_logits, top_k_weights, chosen, modality_ids=routing.modality_ids, real=routing.real
            )
            record = None if routing.record is None else routing.record()
            if record is not None:
                dropped = None if self.rule.capacity is None else top_k_index != chosen
                record.add(self.layer_idx, LayerRouting(router_logits, chosen, dropped))
        if isinstance(experts, SparseMoeVlmExpertGroups):
            output = experts(hidden_states, top_k_index, top_k_weights, tokens)
        else:
            output = experts(hidden_states, top_k_index, top_k_weights)
        output = send(output, hidden_states.device)  # experts may be placed elsewhere
        if self.shared_experts is not None:
            output = send(self.shared_experts(hidden_states, output, tokens), hidden_states.device)
        return output.reshape(shape)


def init_expert_weights(module: nn.Module, std: float) -> None:
    """Initialises a stack of experts or a router, and leaves other modules alone: for a host's `_init_weights`."""
    if isinstance(module, SparseMoeVlmExperts):
        init.normal_(module.gate_up_proj, mean=0.0, std=std)
        init.normal_(module.down_proj, mean=0.0, std=std)
    elif isinstance(module, SparseMoeVlmTopKRouter):
        init.normal_(module.weight, mean=0.0, std=std)
        if module.e_score_correction_bias is not None:
            init.zeros_(module.e_score_correction_bias)


def make_experts(
    config: SparseMoeVlmExpertsConfig, groups: tuple[ExpertGroup, ...]
) -> SparseMoeVlmExperts | SparseMoeVlmExpertShards | SparseMoeVlmExpertGroups:
    """The routed experts of a layer, or of the layers that share a pool."""
    if len(config.routed_group_names) > 1:
        return SparseMoeVlmExpertGroups(config, groups)
    experts = _make_stack(config, groups[0])
    if config.router == "top_p" or config.num_experts_per_tok_by_modality or config.expert_capacity_factor:
        _accept_sentinels(experts)
    return experts


def _make_stack(
    config: SparseMoeVlmExpertsConfig, group: ExpertGroup
) -> SparseMoeVlmExperts | SparseMoeVlmExpertShards:
    sizes = shard_sizes(group.num_experts, config.num_expert_shards)
    if len(sizes) == 1:
        return SparseMoeVlmExperts(config, group)
    shards = [_accept_sentinels(SparseMoeVlmExperts(config, replace(group, num_experts=size))) for size in sizes]
    return SparseMoeVlmExpertShards(shards, sizes)


def _take(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _add(output: torch.Tensor, addend: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    # Under autocast the addend may be of lower precision than the stream.
    return output + addend if rows is None else output.index_add(0, rows, addend.to(output.dtype))


def _is_skippable(module: nn.Module, inputs: torch.Tensor) -> bool:
    """
    Whether a group without tokens may be left out. Not in training, where its parameters must stay in the
    graph, nor among several processes, which gather sharded weights together.
    """
    return inputs.shape[0] == 0 and not module.training and not is_one_of_several_processes()


def _accept_sentinels(experts: _Experts) -> _Experts:
    # Transformers' name for "ids may be the sentinel `num_experts`"; expert parallelism sets it, too.
    experts._is_expert_parallel = True  # type: ignore[assignment]
    return experts
