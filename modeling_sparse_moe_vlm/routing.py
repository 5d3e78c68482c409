"""Routing: chooses the experts of every token and their weights.

Data flow of one layer, with T tokens, E routed experts and k experts per token::

    hidden_states (T, D) ── router ──► logits (T, E) ── route ──► weights, index (T, k) ──► experts

Everything that depends only on the modalities of the tokens is computed once per forward pass ([`RoutingPlanner`]) and
shared by all layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from .capacity import drop_over_capacity, expert_capacity
from .expert_groups import ExpertGroup
from .experts_config import SparseMoeVlmExpertsConfig
from .token_modalities import TokenModalities, check_range, real_tokens

logger = logging.get_logger(__name__)


class LayerRouting(NamedTuple):
    """
    The routing of the T tokens of a forward pass in one layer.

    Args:
        logits (`torch.Tensor` of shape `(T, E)`):
            Router logits; minus infinity where an expert does not serve the token.
        chosen (`torch.Tensor` of shape `(T, k)`):
            Ids of the chosen experts, best first; the sentinel E for an unused slot.
        dropped (`torch.Tensor` of shape `(T, k)`, *optional*):
            Which of the chosen experts had no capacity left for the token, of type bool. `None` if the capacity of the
            experts is unlimited.
    """

    logits: torch.Tensor
    chosen: torch.Tensor
    dropped: torch.Tensor | None


class RoutingRecord:
    """
    The routing of all layers in one forward pass, for the router losses and statistics.

    Every sparse layer adds its routing once, even if gradient checkpointing runs the layer again. The layers only have
    a weak reference to the record. Otherwise, gradient checkpointing, which keeps the arguments of a layer, would keep
    the logits alive, and they in turn the arguments.

    Attributes:
        tokens ([`~token_modalities.TokenModalities`], *optional*):
            The tokens of the forward pass. Set by [`RoutingPlanner.plan`].
    """

    def __init__(self) -> None:
        self.tokens: TokenModalities | None = None
        self._layers: dict[int, LayerRouting] = {}

    def add(self, layer_idx: int, routing: LayerRouting) -> None:
        """Adds the routing of a layer. Later calls for the same layer are ignored."""
        self._layers.setdefault(layer_idx, routing)

    def layers(self) -> list[LayerRouting]:
        """Returns the routing of the sparse layers, in the order of the layers."""
        return [self._layers[layer] for layer in sorted(self._layers)]

    def outputs(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """Returns the routing of the sparse layers as model outputs, by the name of the output."""
        layers = self.layers()
        outputs = {
            "router_logits": tuple(layer.logits for layer in layers),
            "router_indices": tuple(layer.chosen for layer in layers),
        }
        dropped = tuple(layer.dropped for layer in layers if layer.dropped is not None)
        return outputs | ({"router_dropped": dropped} if dropped else {})


class RoutingPlan(NamedTuple):
    """
    The part of the routing that depends only on the modalities of the tokens and is shared by all layers.

    Args:
        tokens (`dict[str, torch.Tensor | None]`):
            Tokens that each expert group serves, by the name of the group: `None` for all tokens, token indices `(n,)`
            of type int64, or a mask `(T,)` of type bool if shapes must not depend on the data (`torch.compile`,
            `torch.export`).
        served (`dict[str, torch.Tensor]`):
            Which experts serve each token, `(T or 1, E)` of type bool, by the key of the layer's routed groups (see
            [`groups_key`]). There is no entry if every expert serves every token.
        num_slots (`torch.Tensor` of shape `(T or 1, 1)`, *optional*):
            Number of experts per token, if it depends on the modality.
        modality_ids (`torch.Tensor` of shape `(T,)`, *optional*):
            Modality id of every token, if the routers need it. `None` if all tokens are text.
        real (`torch.Tensor` of shape `(T,)`, *optional*):
            `False` for padding, if the routers need it. `None` if there is no padding.
        record (`weakref.ref`, *optional*):
            Reference to the [`RoutingRecord`] to which the layers add their routing.
    """

    tokens: dict[str, torch.Tensor | None]
    served: dict[str, torch.Tensor]
    num_slots: torch.Tensor | None
    modality_ids: torch.Tensor | None = None
    real: torch.Tensor | None = None
    record: weakref.ref[RoutingRecord] | None = None


def groups_key(groups: tuple[ExpertGroup, ...]) -> str:
    """Returns the key of a layer's routed groups in `served` of [`RoutingPlan`]."""
    return "+".join(group.name for group in groups)


class RoutingPlanner:
    """
    Determines once per forward pass which tokens each expert group serves.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
    """

    def __init__(self, config: SparseMoeVlmExpertsConfig):
        layers = {config.layer_expert_groups(layer) for layer in config.sparse_layers}
        groups = sorted({group for layer in layers for group in layer}, key=lambda group: group.name)
        everyone = set(config.modalities)
        self.modalities = tuple(config.modalities)
        # Modality ids that each group serves, by the name of the group. `None` for all modalities.
        self.modality_ids: dict[str, tuple[int, ...] | None] = {
            group.name: None
            if set(group.modalities) == everyone
            else tuple(sorted(config.modalities.index(modality) for modality in group.modalities))
            for group in groups
        }
        # Names and sizes of the routed groups of layers in which some experts do not serve all modalities.
        self.masked_routers: dict[str, tuple[tuple[str, int], ...]] = {}
        for layer in layers:
            routed = tuple(group for group in layer if not group.always_on)
            if any(self.modality_ids[group.name] is not None for group in routed):
                self.masked_routers[groups_key(routed)] = tuple((group.name, group.num_experts) for group in routed)
        slots = tuple(config.experts_per_token(modality) for modality in config.modalities)
        self.num_slots = slots if len(set(slots)) > 1 else None
        self.has_bias = config.router_bias_update_rate is not None
        self.has_capacity = config.expert_capacity_factor is not None

    @property
    def depends_on_modality(self) -> bool:
        """Whether the routing of a token depends on its modality."""
        is_restricted = any(ids is not None for ids in self.modality_ids.values())
        return is_restricted or self.num_slots is not None or self.has_bias or self.has_capacity

    def __call__(
        self,
        mm_token_type_ids: torch.Tensor | None,
        device: torch.device,
        attention_mask: torch.Tensor | None = None,
        num_tokens: int = 0,
    ) -> RoutingPlan | None:
        """
        Makes a plan from the arguments of a forward pass: see [`RoutingPlanner.plan`].

        Args:
            mm_token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Modality id of every token. By default, all tokens are text.
            device (`torch.device`):
                Device of the hidden states.
            attention_mask (`torch.Tensor`, *optional*):
                Mask with 0 for padding, needed if experts have a capacity (see [`~token_modalities.real_tokens`]).
            num_tokens (`int`, *optional*, defaults to 0):
                Number of tokens (`batch_size * sequence_length`) that the mask must match.

        Returns:
            `RoutingPlan`, *optional*: The plan, or `None` if the routing does not depend on the modalities.

        Raises:
            ValueError: If an id is not a position in `modalities`.
        """
        if mm_token_type_ids is not None and not is_tracing(mm_token_type_ids):
            check_range(mm_token_type_ids, self.modalities)
        return self.plan(TokenModalities(mm_token_type_ids, real_tokens(attention_mask, num_tokens)), device)

    def plan(
        self, tokens: TokenModalities, device: torch.device, record: RoutingRecord | None = None
    ) -> RoutingPlan | None:
        """
        Makes the plan of a forward pass.

        Args:
            tokens ([`~token_modalities.TokenModalities`]):
                The tokens of the forward pass.
            device (`torch.device`):
                Device of the hidden states.
            record ([`RoutingRecord`], *optional*):
                Record to which the layers add their routing.

        Returns:
            `RoutingPlan`, *optional*: The plan, or `None` if the routing depends only on the hidden states and is not
            recorded.
        """
        reference = None
        if record is not None:
            record.tokens = tokens
            reference = weakref.ref(record)
        if not self.depends_on_modality:
            return None if record is None else RoutingPlan(dict.fromkeys(self.modality_ids), {}, None, record=reference)

        restricted = {ids for ids in self.modality_ids.values() if ids is not None}
        ids = torch.zeros(1, dtype=torch.long, device=device)
        if tokens.ids is not None:
            ids = tokens.ids.reshape(-1).to(device)
        # A forward pass waits for the device only here, once for all layers, and does not wait while it is traced.
        may_wait = tokens.ids is not None and not is_tracing(ids)
        all_text = tokens.ids is None or (may_wait and not ids.any())
        if all_text:
            ids = ids[:1]  # the plan is the same for all text tokens
        masks: dict[tuple[int, ...] | None, torch.Tensor] = {
            modality_ids: _is_any_of(ids, modality_ids) for modality_ids in restricted
        }

        rows: dict[tuple[int, ...] | None, torch.Tensor | None] = {None: None}
        for modality_ids in restricted:
            if all_text:
                rows[modality_ids] = None if 0 in modality_ids else ids[:0]
            elif may_wait:
                index = masks[modality_ids].nonzero().squeeze(1)
                rows[modality_ids] = None if index.numel() == ids.numel() else index
            else:
                rows[modality_ids] = masks[modality_ids]

        masks[None] = torch.ones_like(ids, dtype=torch.bool)
        served = {
            key: torch.cat([masks[self.modality_ids[name]][:, None].expand(-1, size) for name, size in groups], dim=1)
            for key, groups in self.masked_routers.items()
        }
        num_slots = None
        if self.num_slots is not None:
            num_slots = slots_per_token(ids, self.num_slots)
        return RoutingPlan(
            tokens={name: rows[modality_ids] for name, modality_ids in self.modality_ids.items()},
            served=served,
            num_slots=num_slots,
            modality_ids=ids if (self.has_bias or self.has_capacity) and not all_text else None,
            real=tokens.is_real.reshape(-1).to(device) if self.has_capacity and tokens.is_real is not None else None,
            record=reference,
        )


def slots_per_token(modality_ids: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
    """
    Returns the number of experts per token.

    Args:
        modality_ids (`torch.Tensor` of shape `(T,)`):
            Modality id of every token.
        slots (`Sequence[int]`):
            Number of experts per token for each modality.

    Returns:
        `torch.Tensor` of shape `(T, 1)`: The number of experts of every token.
    """
    by_modality = [(modality_ids == modality_id) * number for modality_id, number in enumerate(slots)]
    return torch.stack(by_modality, dim=1).sum(dim=1, keepdim=True)


def _is_any_of(ids: torch.Tensor, modality_ids: tuple[int, ...]) -> torch.Tensor:
    mask = ids == modality_ids[0]
    for modality_id in modality_ids[1:]:
        mask = mask | (ids == modality_id)
    return mask


def route(
    logits: torch.Tensor,
    *,
    top_k: int,
    router: str = "softmax",
    norm_topk_prob: bool = True,
    top_p: float = 1.0,
    num_slots: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Chooses the experts of every token.

    Args:
        logits (`torch.Tensor` of shape `(T, E)`):
            Router logits; minus infinity where an expert does not serve the token.
        top_k (`int`):
            Number of experts per token. With `router="top_p"` or `num_slots`, it is the maximum number.
        router (`str`, *optional*, defaults to `"softmax"`):
            How to choose and weight experts:

            - `"softmax"`: the k most probable experts, weighted by probability (Shazeer et al., arXiv 1701.06538).
            - `"sigmoid"`: the k experts with the largest affinity sigmoid(logit) (DeepSeek-V3, arXiv 2412.19437,
              eq. 13–15).
            - `"top_p"`: the fewest experts whose probabilities sum to `top_p` (arXiv 2403.07652, eq. 4).
        norm_topk_prob (`bool`, *optional*, defaults to `True`):
            Whether to normalise the weights of the chosen experts so that they sum to 1.
        top_p (`float`, *optional*, defaults to 1.0):
            Total probability that the chosen experts must reach with `router="top_p"`.
        num_slots (`torch.Tensor` of shape `(T or 1, 1)`, *optional*):
            Number of experts per token if it differs between tokens, at most `top_k`.
        bias (`torch.Tensor` of shape `(T or 1, E)`, *optional*):
            Bias added to the scores (affinities with `"sigmoid"`, probabilities otherwise). It affects which experts
            are chosen and in which order, but not their weights (DeepSeek-V3, eq. 16). With `"top_p"`, experts are
            taken in this order until their probabilities without the bias reach `top_p`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Weights in the dtype of the logits and expert ids of type int64, both of
        shape `(T, top_k)`, best first. In half precision, experts with equal scores are ordered by id. An unused slot
        has weight 0 and the sentinel id E, which the experts skip.
    """
    ranks = logits  # in the same order as their softmax or sigmoid, so the choice does not need probabilities
    if bias is not None:
        plain = logits.detach().float()
        affinity = torch.sigmoid(plain) if router == "sigmoid" else torch.softmax(plain, dim=-1)
        ranks = (affinity + bias).masked_fill(plain == -torch.inf, -torch.inf)
    if torch.finfo(logits.dtype).bits > 16:
        index = torch.topk(ranks, top_k, dim=-1).indices
    else:
        # In half precision, experts often have equal scores, of which `topk` takes any. The stable sort takes the first
        # ones. In upcycled models whose experts are parts of a dense block with the same router row, these are the
        # parts of one copy of the block, which only together equal the dense block.
        index = torch.sort(ranks, dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = logits.gather(-1, index)
    scores = chosen.float()
    if router == "sigmoid":
        log_weights = F.logsigmoid(scores)
    elif router == "softmax" and norm_topk_prob:
        log_weights = scores  # the sum over all experts cancels in the normalisation below
    else:
        log_weights = scores - torch.logsumexp(logits.float(), dim=-1, keepdim=True)

    used = None
    if num_slots is not None:
        used = torch.arange(top_k, device=logits.device) < num_slots
    if router == "top_p":
        mass_before = F.pad(torch.cumsum(log_weights.exp(), dim=-1)[:, :-1], (1, 0))
        reached = mass_before >= top_p
        used = ~reached if used is None else used & ~reached
    if used is not None:
        log_weights = log_weights.masked_fill(~used, -torch.inf)
        index = index.masked_fill(~used, logits.shape[-1])
    # Normalised in log space, because a sum of tiny sigmoids would be rounded to 0.
    weights = torch.softmax(log_weights, dim=-1) if norm_topk_prob else log_weights.exp()
    return weights.to(logits.dtype), index


class RoutingRule(NamedTuple):
    """
    The rule by which the router of a layer chooses experts, derived from the configuration.

    Args:
        top_k (`int`):
            Number of experts per token, the maximum over the modalities.
        router (`str`):
            See [`route`].
        norm_topk_prob (`bool`):
            See [`route`].
        top_p (`float`):
            See [`route`].
        capacity (`tuple[float, ...]`, *optional*):
            Capacity of an expert per token, by modality (see [`~capacity.expert_capacity`]).
    """

    top_k: int
    router: str
    norm_topk_prob: bool
    top_p: float
    capacity: tuple[float, ...] | None

    @classmethod
    def of(cls, config: SparseMoeVlmExpertsConfig, groups: tuple[ExpertGroup, ...]) -> RoutingRule:
        """Returns the rule of a layer with these routed groups."""
        capacity = None
        if config.expert_capacity_factor is not None:
            capacity = tuple(
                config.expert_capacity_factor
                * config.experts_per_token(modality)
                / sum(group.num_experts for group in groups if group.serves(modality))
                for modality in config.modalities
            )
        return cls(
            top_k=max(config.experts_per_token(modality) for modality in config.modalities),
            router=config.router,
            norm_topk_prob=config.norm_topk_prob,
            top_p=config.router_top_p,
            capacity=capacity,
        )

    def choose(
        self,
        logits: torch.Tensor,
        *,
        num_slots: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses the experts of every token: see [`route`]."""
        return route(
            logits,
            top_k=self.top_k,
            router=self.router,
            norm_topk_prob=self.norm_topk_prob,
            top_p=self.top_p,
            num_slots=num_slots,
            bias=bias,
        )

    def drop(
        self,
        logits: torch.Tensor,
        weights: torch.Tensor,
        index: torch.Tensor,
        *,
        modality_ids: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Drops tokens from experts over capacity. Experts keep the tokens with the highest scores.

        Args:
            logits (`torch.Tensor` of shape `(T, E)`):
                Router logits.
            weights (`torch.Tensor` of shape `(T, k)`):
                Weights of the chosen experts.
            index (`torch.Tensor` of shape `(T, k)`):
                Ids of the chosen experts.
            modality_ids (`torch.Tensor` of shape `(T,)`, *optional*):
                Modality id of every token. By default, all tokens are text.
            real (`torch.Tensor` of shape `(T,)`, *optional*):
                `False` for padding. By default, there is no padding.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Weights and ids, with weight 0 and the sentinel id E for dropped
            tokens.
        """
        if self.capacity is None:
            return weights, index
        if modality_ids is None:
            modality_ids = torch.zeros_like(index[:, 0])
        scores = logits.detach().float()
        priority = scores.amax(dim=-1)
        if self.router != "sigmoid":
            priority = priority - torch.logsumexp(scores, dim=-1)
        return drop_over_capacity(
            weights,
            index,
            num_experts=logits.shape[-1],
            priority=priority,
            capacity=expert_capacity(share=self.capacity, modality_ids=modality_ids, real=real),
            modality_ids=modality_ids,
            real=real,
        )


@torch.no_grad()
def chosen_experts(
    config: SparseMoeVlmExpertsConfig,
    router_logits: Sequence[torch.Tensor],
    modality_ids: torch.Tensor,
    biases: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """
    Returns the experts that the router chose for the given logits, if they were not recorded with the logits.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        router_logits (`Sequence[torch.Tensor]`):
            One tensor `(T, E)` per sparse layer.
        modality_ids (`torch.Tensor` of shape `(T,)`):
            Modality id of every token.
        biases (`Sequence[torch.Tensor]`, *optional*):
            Biases of the routers when they computed the logits, one tensor `(num_modalities, E)` per sparse layer.

    Returns:
        `list[torch.Tensor]`: Ids of the chosen experts `(T, k)` per sparse layer, as in [`LayerRouting`].
    """
    slots = slots_per_token(modality_ids, [config.experts_per_token(modality) for modality in config.modalities])
    chosen = []
    for number, layer in enumerate(config.sparse_layers):
        logits = router_logits[number].detach()
        ids = modality_ids.to(logits.device)
        bias = None if biases is None else bias_of_tokens(biases[number].to(logits.device), ids)
        rule = RoutingRule.of(config, config.layer_expert_groups(layer, always_on=False))
        chosen.append(rule.choose(logits, num_slots=slots.to(logits.device), bias=bias)[1])
    return chosen


def bias_of_tokens(bias: torch.Tensor, modality_ids: torch.Tensor | None) -> torch.Tensor:
    """Returns the rows of a router bias `(num_modalities, E)` for the modality ids of tokens `(T,)`: `(T or 1, E)`."""
    return bias[:1] if modality_ids is None else bias[modality_ids]


class SparseMoeVlmTopKRouter(nn.Module):
    """
    The router of a layer, which scores the experts of all routed groups with a single matrix product.

    Shapes: `hidden_states (T, D)` → `router_logits (T, E)`, `top_k_weights (T, k)`, `top_k_index (T, k)`.

    With `config.router_bias_update_rate`, `e_score_correction_bias (num_modalities, E)` is the bias of loss-free
    balancing. It has one row per modality, because a single row could only balance the total load of all modalities: a
    joint expert that is overloaded by text and unused by images would count as balanced.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        groups (`tuple[ExpertGroup, ...]`):
            The routed groups of the layer.
    """

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, config: SparseMoeVlmExpertsConfig, groups: tuple[ExpertGroup, ...]):
        super().__init__()
        self.rule = RoutingRule.of(config, groups)
        num_experts = sum(group.num_experts for group in groups)
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        bias = None
        if config.router_bias_update_rate is not None:
            bias = torch.zeros(len(config.modalities), num_experts, dtype=torch.float32)
        # A buffer, so that it is neither sharded nor seen by the optimizer.
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn, recurse=True):
        """Same as in torch, but keeps the bias in float32, because updates of 1e-3 would be lost in lower precision."""
        super()._apply(fn, recurse)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias = self.e_score_correction_bias.float()
        return self

    def forward(
        self,
        hidden_states: torch.Tensor,
        served: torch.Tensor | None = None,
        num_slots: torch.Tensor | None = None,
        modality_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Routes the tokens.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`):
                Hidden states of the tokens.
            served (`torch.Tensor` of shape `(T or 1, E)`, *optional*):
                Which experts serve each token, of type bool. All by default.
            num_slots (`torch.Tensor` of shape `(T or 1, 1)`, *optional*):
                Number of experts per token, if it depends on the modality.
            modality_ids (`torch.Tensor` of shape `(T,)`, *optional*):
                Modality id of every token, for the bias. By default, all tokens are text.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Router logits `(T, E)`, and the weights and ids of the
            chosen experts `(T, k)`.
        """
        router_logits = F.linear(hidden_states, self.weight)
        if served is not None:
            router_logits = router_logits.masked_fill(~served, -torch.inf)
        bias = None
        if self.e_score_correction_bias is not None:
            bias = bias_of_tokens(self.e_score_correction_bias, modality_ids)
        top_k_weights, top_k_index = self.rule.choose(router_logits, num_slots=num_slots, bias=bias)
        return router_logits, top_k_weights, top_k_index


def routers_with_bias(model: nn.Module) -> list[Any]:
    """Returns the routers of a model that have a bias, in the order of the layers."""
    routers: dict[str, Any] = {}
    for name, module in model.named_modules():
        # Routers are found by their attribute: routers of remote code have another class, and PEFT wraps routers that
        # it trains in a module with the attributes of the active router.
        is_inner = any(name.startswith(f"{outer}.") for outer in routers)
        if getattr(module, "e_score_correction_bias", None) is not None and not is_inner:
            routers[name] = module
    return list(routers.values())


def warn_of_resting_biases(model: nn.Module) -> None:
    """Warns in a training forward pass that nothing records the routing, so the router biases are never updated."""
    if any(router.weight.requires_grad for router in routers_with_bias(model)):
        logger.warning_once(
            "`router_bias_update_rate` is set, but the router biases do not move by themselves: use "
            "`SparseMoeTrainer`, or pass `callbacks=[RoutingMonitor()]` (`from modeling_sparse_moe_vlm.toolbox.routing "
            "import RoutingMonitor`) to another trainer. In your own training loop, call `update_router_bias` after "
            "every step; you can then ignore this message."
        )


def router_biases(model: nn.Module) -> list[torch.Tensor] | None:
    """Returns the router biases `(num_modalities, E)` of a model, in the order of the layers, or `None`."""
    return [router.e_score_correction_bias for router in routers_with_bias(model)] or None
