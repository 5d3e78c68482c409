"""Experts: the feed-forward networks that tokens are routed to. Each group stores its experts as stacked weights.

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

from .checks import check
from .expert_groups import ExpertGroup
from .expert_shards import SparseMoeVlmExpertShards, run_at_once, send, shard_sizes
from .experts_config import SparseMoeVlmExpertsConfig
from .parallel_plans import is_one_of_several_processes
from .routing import LayerRouting, RoutingPlan, RoutingRule, SparseMoeVlmTopKRouter, groups_key

_Experts = TypeVar("_Experts", bound=nn.Module)


@use_experts_implementation
class SparseMoeVlmExperts(nn.Module):
    """
    The routed experts of one group. `forward` is the reference implementation (`experts_implementation="eager"`);
    `"grouped_mm"`, `"batched_mm"` and others are provided by the experts interface of Transformers.

    Args:
        config (`PreTrainedConfig`):
            Configuration with `hidden_size` and `hidden_act`.
        group ([`~expert_groups.ExpertGroup`]):
            The group.
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
        """
        Runs the experts.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`):
                Hidden states of the tokens.
            top_k_index (`torch.Tensor` of shape `(T, k)`):
                Ids of the experts of every token. Ids of at least `num_experts` are skipped.
            top_k_weights (`torch.Tensor` of shape `(T, k)`):
                Weights of the experts.

        Returns:
            `torch.Tensor` of shape `(T, D)`: Weighted sum of the expert outputs.
        """
        output = torch.zeros_like(hidden_states)
        chosen = [expert for expert in top_k_index.unique().tolist() if expert < self.num_experts]
        for expert in chosen:
            token, slot = torch.where(top_k_index == expert)
            gate_up = F.linear(hidden_states[token], self.gate_up_proj[expert])
            expert_output = F.linear(self._apply_gate(gate_up), self.down_proj[expert])
            weighted = expert_output * top_k_weights[token, slot, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        if not chosen and torch.is_grad_enabled():
            # Keeps the parameters in the graph. Otherwise, data parallel ranks without a token for them would hang.
            output = output + 0.0 * (self.gate_up_proj[0, 0, 0] + self.down_proj[0, 0, 0])
        return output


class SparseMoeVlmExpertGroups(nn.ModuleDict):
    """
    The routed groups of a layer by name, if the model has several. Expert ids are numbered across the groups in order.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        groups (`tuple[ExpertGroup, ...]`):
            The routed groups of the layer.
    """

    def __init__(self, config: SparseMoeVlmExpertsConfig, groups: tuple[ExpertGroup, ...]):
        super().__init__({group.name: _accept_sentinels(_make_stack(config, group)) for group in groups})
        # Stored, because expert parallelism changes the `num_experts` of the groups.
        self._sizes = {group.name: group.num_experts for group in groups}

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        tokens: dict[str, torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """
        Runs every group on the tokens that it serves.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`):
                Hidden states of the tokens.
            top_k_index (`torch.Tensor` of shape `(T, k)`):
                Ids of the experts of every token.
            top_k_weights (`torch.Tensor` of shape `(T, k)`):
                Weights of the experts.
            tokens (`dict[str, torch.Tensor]`, *optional*):
                Tokens that each group serves, by the name of the group (see [`~routing.RoutingPlan`]). All by default.

        Returns:
            `torch.Tensor` of shape `(T, D)`: Weighted sum of the expert outputs.
        """
        calls, rows_of_calls = [], []
        first = 0
        for name, experts in self.items():
            size = self._sizes[name]
            rows = tokens[name] if tokens is not None else None
            if rows is not None and rows.dtype == torch.bool:
                rows = None  # the other tokens are routed to other groups, so their slots become sentinels below
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
    """
    A gated feed-forward network (SwiGLU, arXiv 2002.05202): `(..., D)` → `(..., D)`.

    Args:
        config (`PreTrainedConfig`):
            Configuration with `hidden_size` and `hidden_act`.
        intermediate_size (`int`):
            Width of the intermediate layer.
    """

    def __init__(self, config: PreTrainedConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs the network."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class SparseMoeVlmUnfusedExperts(nn.ModuleList):
    """
    The routed experts of one group as separate networks, whose linear layers quantisers and PEFT find
    (`unfused_experts=True`). It has the interface of [`SparseMoeVlmExperts`]. In memory, the tensors have the same
    names as in checkpoints.

    Args:
        config (`PreTrainedConfig`):
            Configuration with `hidden_size` and `hidden_act`.
        num_experts (`int`):
            Number of experts.
        intermediate_size (`int`):
            Width of their intermediate layer.
    """

    has_separate_experts = True  # for tools, because a checkpoint that contains its own code has its own classes

    def __init__(self, config: PreTrainedConfig, num_experts: int, intermediate_size: int):
        super().__init__(SparseMoeVlmMLP(config, intermediate_size) for _ in range(num_experts))
        self.num_experts = num_experts

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Runs the experts: see [`SparseMoeVlmExperts.forward`]."""
        output = torch.zeros_like(hidden_states)
        chosen = set(top_k_index.unique().tolist())
        # With several processes, each must run all experts. Otherwise, they would wait for gradients of experts that
        # are chosen in another process.
        runs_all = torch.is_grad_enabled() and is_one_of_several_processes()
        for number, expert in enumerate(self):
            if number in chosen or runs_all:
                token, slot = torch.where(top_k_index == number)
                weighted = expert(hidden_states[token]) * top_k_weights[token, slot, None]
                output.index_add_(0, token, weighted.to(output.dtype))
        return output


class SparseMoeVlmSharedExperts(nn.ModuleDict):
    """
    The always-on groups of a layer by name. n always-on experts of width I equal one feed-forward network of width n·I,
    so each group is a single dense network for the tokens that it serves.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        groups (`tuple[ExpertGroup, ...]`):
            The always-on groups of the layer.
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
        """
        Adds the outputs of the always-on experts to the output of the routed experts.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`):
                Hidden states of the tokens.
            output (`torch.Tensor` of shape `(T, D)`):
                Output of the routed experts.
            tokens (`dict[str, torch.Tensor]`, *optional*):
                Tokens that each group serves, by the name of the group (see [`~routing.RoutingPlan`]). All by default.

        Returns:
            `torch.Tensor` of shape `(T, D)`: The sum of the outputs.
        """
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
    """
    The feed-forward block of a sparse layer: a router, routed experts and always-on experts.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        layer_idx (`int`):
            Index of the layer.
    """

    def __init__(self, config: SparseMoeVlmExpertsConfig, layer_idx: int):
        super().__init__()
        routed = config.layer_expert_groups(layer_idx, always_on=False)
        always_on = config.layer_expert_groups(layer_idx, always_on=True)
        self.layer_idx = layer_idx
        self.groups_key = groups_key(routed)
        self.rule = RoutingRule.of(config, routed)
        self.gate = SparseMoeVlmTopKRouter(config, routed)
        # The routed experts of an expert pool are modules of the model.
        self.experts = None if config.layer_pool(layer_idx) is not None else make_experts(config, routed)
        self.shared_experts = SparseMoeVlmSharedExperts(config, always_on) if always_on else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        routing: RoutingPlan | None = None,
        pooled_experts: nn.Module | None = None,
    ) -> torch.Tensor:
        """
        Routes the tokens and runs the experts.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, D)`):
                Hidden states of the tokens.
            routing ([`~routing.RoutingPlan`], *optional*):
                The plan of the forward pass. By default, all tokens are text.
            pooled_experts (`nn.Module`, *optional*):
                The routed experts, if the layer uses an expert pool.

        Returns:
            `torch.Tensor` of shape `(B, T, D)`: The output of the block.
        """
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
        output = send(output, hidden_states.device)  # the experts may be on another device
        if self.shared_experts is not None:
            output = send(self.shared_experts(hidden_states, output, tokens), hidden_states.device)
        return output.reshape(shape)


def init_expert_weights(module: nn.Module, std: float) -> None:
    """
    Initialises the weights of a module of this file or of a router. Other modules are not changed. Called by the
    `_init_weights` of the model.

    Args:
        module (`nn.Module`):
            The module.
        std (`float`):
            Standard deviation of the weights.
    """
    if isinstance(module, SparseMoeVlmExperts):
        init.normal_(module.gate_up_proj, mean=0.0, std=std)
        init.normal_(module.down_proj, mean=0.0, std=std)
    elif isinstance(module, SparseMoeVlmTopKRouter):
        init.normal_(module.weight, mean=0.0, std=std)
        if module.e_score_correction_bias is not None:
            init.zeros_(module.e_score_correction_bias)


def make_experts(
    config: SparseMoeVlmExpertsConfig, groups: tuple[ExpertGroup, ...]
) -> SparseMoeVlmExperts | SparseMoeVlmUnfusedExperts | SparseMoeVlmExpertShards | SparseMoeVlmExpertGroups:
    """
    Creates the routed experts of a layer or of an expert pool.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        groups (`tuple[ExpertGroup, ...]`):
            The routed groups.

    Returns:
        `nn.Module`: A module per group if the model has several routed groups, otherwise the experts themselves, which
        are split into shards if `config.num_expert_shards` is more than 1, and separate networks with
        `config.unfused_experts`.
    """
    if len(config.routed_group_names) > 1:
        return SparseMoeVlmExpertGroups(config, groups)
    experts = _make_stack(config, groups[0])
    if config.router == "top_p" or config.num_experts_per_tok_by_modality or config.expert_capacity_factor:
        _accept_sentinels(experts)
    return experts


def _make_stack(
    config: SparseMoeVlmExpertsConfig, group: ExpertGroup
) -> SparseMoeVlmExperts | SparseMoeVlmUnfusedExperts | SparseMoeVlmExpertShards:
    if config.unfused_experts:
        check(
            config.num_expert_shards == 1,
            "`num_expert_shards` and `unfused_experts` cannot be combined: a device map can place each expert of a "
            "model with `unfused_experts` by its name.",
        )
        return SparseMoeVlmUnfusedExperts(config, group.num_experts, group.intermediate_size)
    sizes = shard_sizes(group.num_experts, config.num_expert_shards)
    if len(sizes) == 1:
        return SparseMoeVlmExperts(config, group)
    shards = [_accept_sentinels(SparseMoeVlmExperts(config, replace(group, num_experts=size))) for size in sizes]
    return SparseMoeVlmExpertShards(shards, sizes)


def _take(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _add(output: torch.Tensor, addend: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    # Under autocast, the addend can have lower precision than the hidden states.
    return output + addend if rows is None else output.index_add(0, rows, addend.to(output.dtype))


def _is_skippable(module: nn.Module, inputs: torch.Tensor) -> bool:
    """
    Returns whether a group can be skipped because it has no tokens. During training, its parameters must stay in the
    graph; with several processes, all processes must run it to gather sharded weights together.
    """
    return inputs.shape[0] == 0 and not module.training and not is_one_of_several_processes()


def _accept_sentinels(experts: _Experts) -> _Experts:
    # With this attribute, Transformers accepts the sentinel id `num_experts`. Expert parallelism also sets it.
    experts._is_expert_parallel = True  # type: ignore[assignment]
    return experts
