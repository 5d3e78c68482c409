"""Routing: which experts a token goes to, and with what weight.

Data flow of one layer, with T tokens, E routed experts and k experts per token::

    hidden_states (T, D) ── router ──► logits (T, E) ── route ──► weights, index (T, k) ──► experts

What depends on the modalities of the tokens alone is worked out once per forward pass ([`RoutingPlanner`]) and
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
    """What the router of one layer did with the T tokens of a forward pass.

    Args:
        logits (`torch.Tensor` of shape `(T, E)`):
            Router logits; minus infinity where an expert does not serve the token.
        chosen (`torch.Tensor` of shape `(T, k)`):
            Ids of the experts that were chosen, best first; the sentinel E for an unused slot.
        dropped (`torch.Tensor` of shape `(T, k)`, *optional*):
            Of type bool: which of them had no capacity for the token; `None` where experts have no limit.
    """

    logits: torch.Tensor
    chosen: torch.Tensor
    dropped: torch.Tensor | None


class RoutingRecord:
    """
    What routers do in one forward pass, for the router losses and statistics: every sparse layer writes once, however
    often activation checkpointing runs it. Layers know it only weakly: what checkpointing keeps of a layer's arguments
    would otherwise hold the logits, and with them itself.

    Attributes:
        tokens ([`~token_modalities.TokenModalities`], *optional*): The tokens of the pass, once it is planned.
    """

    def __init__(self) -> None:
        self.tokens: TokenModalities | None = None
        self._layers: dict[int, LayerRouting] = {}

    def add(self, layer_idx: int, routing: LayerRouting) -> None:
        """Called by a layer; only its first call counts."""
        self._layers.setdefault(layer_idx, routing)

    def layers(self) -> list[LayerRouting]:
        """The routing of the sparse layers, in their order."""
        return [self._layers[layer] for layer in sorted(self._layers)]

    def outputs(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """The routing of the sparse layers by name of a model's output."""
        layers = self.layers()
        outputs = {
            "router_logits": tuple(layer.logits for layer in layers),
            "router_indices": tuple(layer.chosen for layer in layers),
        }
        dropped = tuple(layer.dropped for layer in layers if layer.dropped is not None)
        return outputs | ({"router_dropped": dropped} if dropped else {})


class RoutingPlan(NamedTuple):
    """What a forward pass knows of its tokens' modalities, by the names of groups and of sets of groups.

    Args:
        tokens (`dict[str, torch.Tensor | None]`):
            By name of a group, the tokens that it serves: `None` for all, row numbers `(n,)` of type int64, or, where
            shapes must not depend on data (`torch.compile`, `torch.export`), a mask `(T,)` of type bool.
        served (`dict[str, torch.Tensor]`):
            By key of a layer's routed groups ([`groups_key`]), the experts that serve each token, `(T or 1, E)` of type
            bool; no entry where every expert serves every token.
        num_slots (`torch.Tensor`, *optional*):
            Number of experts per token, `(T or 1, 1)`, where it depends on the modality.
        modality_ids (`torch.Tensor` of shape `(T,)`, *optional*):
            Modality id of every token, where routers ask for it; all text when `None`.
        real (`torch.Tensor` of shape `(T,)`, *optional*):
            `False` for padding, where routers ask for it; no padding when `None`.
        record (`weakref.ref`, *optional*):
            Reference to the [`RoutingRecord`] where layers write what their routers do.
    """

    tokens: dict[str, torch.Tensor | None]
    served: dict[str, torch.Tensor]
    num_slots: torch.Tensor | None
    modality_ids: torch.Tensor | None = None
    real: torch.Tensor | None = None
    record: weakref.ref[RoutingRecord] | None = None


def groups_key(groups: tuple[ExpertGroup, ...]) -> str:
    """Key of a layer's routed groups in [`RoutingPlan`]`.served`."""
    return "+".join(group.name for group in groups)


class RoutingPlanner:
    """
    Works out, once per forward pass, which tokens each expert group serves.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
    """

    def __init__(self, config: SparseMoeVlmExpertsConfig):
        layers = {config.layer_expert_groups(layer) for layer in config.sparse_layers}
        groups = sorted({group for layer in layers for group in layer}, key=lambda group: group.name)
        everyone = set(config.modalities)
        self.modalities = tuple(config.modalities)
        # By name of a group, the modality ids that it serves; `None` for all.
        self.modality_ids: dict[str, tuple[int, ...] | None] = {
            group.name: None
            if set(group.modalities) == everyone
            else tuple(sorted(config.modalities.index(modality) for modality in group.modalities))
            for group in groups
        }
        # The routed groups of every layer whose router has experts that do not serve every token.
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
        """Whether tokens of different modalities are routed differently."""
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
        As [`plan`], from what a forward pass is given.

        Args:
            mm_token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Modality id of every token; all tokens are text when `None`.
            device (`torch.device`):
                Device of the hidden states.
            attention_mask (`torch.Tensor`, *optional*):
                What tells padding, where experts have a capacity (see [`~token_modalities.real_tokens`]).
            num_tokens (`int`, defaults to 0):
                Number of tokens (batch_size * sequence_length), which the mask is for.

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
        Args:
            tokens ([`~token_modalities.TokenModalities`]):
                The tokens of the forward pass.
            device (`torch.device`):
                Device of the hidden states.
            record ([`RoutingRecord`], *optional*):
                Where layers are to write what their routers do.

        Returns:
            `RoutingPlan`, *optional*: `None` where routing depends on the hidden states alone and is not recorded.
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
        # Here, and only here, a forward pass waits for the device: once for all layers, and not where it is traced.
        may_wait = tokens.ids is not None and not is_tracing(ids)
        all_text = tokens.ids is None or (may_wait and not ids.any())
        if all_text:
            ids = ids[:1]  # what holds for one text token holds for all
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
    """Number of experts per token, `(T, 1)`, from that of each modality and the modality ids `(T,)`."""
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
    Picks the experts of every token.

    Args:
        logits (`torch.Tensor` of shape `(T, E)`):
            Router logits; minus infinity where an expert does not serve the token.
        top_k (`int`):
            Number of experts per token (with `router="top_p"` and with `num_slots`, the largest number).
        router (`str`, defaults to `"softmax"`):
            `"softmax"`: the k most probable experts, weighted by probability (Shazeer et al., arXiv 1701.06538).
            `"sigmoid"`: the k experts of the largest affinity sigmoid(logit) (DeepSeek-V3, arXiv 2412.19437,
            eq. 13–15).
            `"top_p"`: the fewest experts whose probabilities sum to `top_p` (arXiv 2403.07652, eq. 4).
        norm_topk_prob (`bool`, defaults to `True`):
            Whether the weights of the chosen experts are scaled to sum to 1.
        top_p (`float`, defaults to 1.0):
            Probability to reach with `router="top_p"`.
        num_slots (`torch.Tensor` of shape `(T or 1, 1)`, *optional*):
            Number of experts per token where it differs between tokens, at most `top_k`.
        bias (`torch.Tensor` of shape `(T or 1, E)`, *optional*):
            Added to the scores (probabilities, with `"sigmoid"` affinities) for the choice and its order alone, never
            to the weights (DeepSeek-V3, eq. 16). With `"top_p"`, experts are taken in this order until their own
            probabilities reach `top_p`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: weights in the dtype of the logits and expert ids of type int64, both
        `(T, top_k)`, best first (in half precision, equal ones in the order of their ids). An unused slot has weight 0
        and the sentinel id E, which experts skip.
    """
    ranks = logits  # their order is that of their softmax and of their sigmoid: the choice needs no probabilities
    if bias is not None:
        plain = logits.detach().float()
        affinity = torch.sigmoid(plain) if router == "sigmoid" else torch.softmax(plain, dim=-1)
        ranks = (affinity + bias).masked_fill(plain == -torch.inf, -torch.inf)
    if torch.finfo(logits.dtype).bits > 16:
        index = torch.topk(ranks, top_k, dim=-1).indices
    else:
        # In half precision experts often tie. `topk` takes any of them; the first ones are those of one copy where
        # the parts of a dense block share a router row, and only together are they the dense block.
        index = torch.sort(ranks, dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = logits.gather(-1, index)
    scores = chosen.float()
    if router == "sigmoid":
        log_weights = F.logsigmoid(scores)
    elif router == "softmax" and norm_topk_prob:
        log_weights = scores  # the sum over all experts would cancel below
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
    # Normalised from logarithms, so that no sum of tiny sigmoids is lost to rounding.
    weights = torch.softmax(log_weights, dim=-1) if norm_topk_prob else log_weights.exp()
    return weights.to(logits.dtype), index


class RoutingRule(NamedTuple):
    """How the router of a layer turns its logits into experts: what the configuration says, worked out once.

    Args:
        top_k (`int`): Number of experts per token, the largest over the modalities.
        router, norm_topk_prob, top_p: See [`route`].
        capacity (`tuple[float, ...]`, *optional*): By modality, capacity per token (see [`expert_capacity`]).
    """

    top_k: int
    router: str
    norm_topk_prob: bool
    top_p: float
    capacity: tuple[float, ...] | None

    @classmethod
    def of(cls, config: SparseMoeVlmExpertsConfig, groups: tuple[ExpertGroup, ...]) -> RoutingRule:
        """The rule of a layer with these routed groups."""
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
        """[`route`] by this rule."""
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
        """What is left of the choice where experts have a capacity: tokens are served by their highest score."""
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
    The choice of experts behind router logits, where it was not recorded with them.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        router_logits (`Sequence[torch.Tensor]`):
            One tensor `(T, E)` per sparse layer.
        modality_ids (`torch.Tensor` of shape `(T,)`):
            Modality id of every token.
        biases (`Sequence[torch.Tensor]`, *optional*):
            The routers' biases when the logits were made, one tensor `(num_modalities, E)` per sparse layer.

    Returns:
        `list[torch.Tensor]`: ids `(T, k)` per sparse layer, as in [`LayerRouting`].
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
    """The rows of a router's bias `(num_modalities, E)` for tokens with modality ids `(T,)`: `(T or 1, E)`."""
    return bias[:1] if modality_ids is None else bias[modality_ids]


class SparseMoeVlmTopKRouter(nn.Module):
    """One router per layer over the experts of all its routed groups: a single product for every modality.

    Shapes: `hidden_states (T, D)` → `router_logits (T, E)`, `top_k_weights (T, k)`, `top_k_index (T, k)`.

    With `config.router_bias_update_rate`, `e_score_correction_bias (num_modalities, E)` is the bias of loss-free
    balancing. It has a row per modality, since one bias for all could only balance their sum: a joint expert that text
    overloads and images leave idle would be in balance.
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
        # A buffer, which no parallelism shards and no optimizer sees.
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn, recurse=True):
        """As torch's, but the bias stays in float32: steps of a thousandth would be lost in lower precision."""
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
        router_logits = F.linear(hidden_states, self.weight)
        if served is not None:
            router_logits = router_logits.masked_fill(~served, -torch.inf)
        bias = None
        if self.e_score_correction_bias is not None:
            bias = bias_of_tokens(self.e_score_correction_bias, modality_ids)
        top_k_weights, top_k_index = self.rule.choose(router_logits, num_slots=num_slots, bias=bias)
        return router_logits, top_k_weights, top_k_index


def routers_with_bias(model: nn.Module) -> list[Any]:
    """A model's routers that have a bias, layer by layer."""
    routers: dict[str, Any] = {}
    for name, module in model.named_modules():
        # By attribute: routers that came with a checkpoint are of another class, and one that PEFT trains beside an
        # adapter is within a wrapper, which hands out what the router in use has.
        is_inner = any(name.startswith(f"{outer}.") for outer in routers)
        if getattr(module, "e_score_correction_bias", None) is not None and not is_inner:
            routers[name] = module
    return list(routers.values())


def warn_of_resting_biases(model: nn.Module) -> None:
    """For a forward pass in training which nobody watches, though the routers' biases are to move by it."""
    if any(router.weight.requires_grad for router in routers_with_bias(model)):
        logger.warning_once(
            "`router_bias_update_rate` is set, but the routers' biases do not move by themselves: give the trainer "
            "`callbacks=[RoutingMonitor()]` (`from modeling_sparse_moe_vlm.toolbox.routing import RoutingMonitor`), or "
            "use `SparseMoeTrainer`, which has it. In a training loop of your own, call `update_router_bias` after "
            "every step; this message can then be ignored."
        )


def router_biases(model: nn.Module) -> list[torch.Tensor] | None:
    """The biases `(num_modalities, E)` of a model's routers, layer by layer; `None` where they have none."""
    return [router.e_score_correction_bias for router in routers_with_bias(model)] or None
