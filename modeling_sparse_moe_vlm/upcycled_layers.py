"""Sparse blocks in the decoder layers of other models, and how they get to know the tokens of a forward pass.

The outermost model works out a [`TokenPlan`] and leaves it to its thread. Each sparse layer takes it from there when it
is called, as one of its own arguments: what activation checkpointing keeps of a layer is then all that it needs when
the layer runs again in the backward pass. While the layer runs, its block finds the plan with the thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .experts import SparseMoeVlmSparseMoeBlock
from .experts_config import SparseMoeVlmExpertsConfig
from .routing import RoutingPlan, RoutingPlanner, RoutingRecord
from .token_modalities import TokenModalities


class ExpertPools:
    """The experts that several layers share, by number of the pool. Not a module, so that nobody moves them."""

    def __init__(self, pools: nn.ModuleDict):
        self._pools = pools

    def __getitem__(self, pool: int) -> nn.Module:
        return self._pools[str(pool)]


class TokenPlan(NamedTuple):
    """
    What the sparse layers of a model need to know of a forward pass.

    Args:
        owner (`SparseMoeVlmExpertsConfig`):
            The experts' configuration of the model, which is the same object in all of its parts.
        planner ([`RoutingPlanner`]):
            What made the plan.
        tokens ([`TokenModalities`]):
            The tokens, as far as the plan depends on them.
        routing ([`RoutingPlan`], *optional*):
            See [`RoutingPlanner.plan`].
        pools ([`ExpertPools`], *optional*):
            The experts that layers share.
        of_last_tokens (`dict[int, RoutingPlan | None]`):
            The plans of layers that only run so many of the last tokens, once they are made.
    """

    owner: SparseMoeVlmExpertsConfig
    planner: RoutingPlanner
    tokens: TokenModalities
    routing: RoutingPlan | None
    pools: ExpertPools | None
    of_last_tokens: dict[int, RoutingPlan | None]

    @classmethod
    def of(
        cls,
        owner: SparseMoeVlmExpertsConfig,
        planner: RoutingPlanner,
        tokens: TokenModalities,
        device: torch.device,
        record: RoutingRecord | None = None,
    ) -> TokenPlan:
        """Plans the routing of the tokens, see [`RoutingPlanner.plan`]."""
        return cls(owner, planner, tokens, planner.plan(tokens, device, record), pools=None, of_last_tokens={})

    def routing_of(self, hidden_states: torch.Tensor) -> RoutingPlan | None:
        """
        The routing of the tokens that a layer runs: all, or in a prompt only the last ones of each row, where later
        layers keep nothing in the cache (Gemma 4).

        Args:
            hidden_states (`torch.Tensor` of shape `(..., D)`):
                What the layer runs.

        Raises:
            ValueError: If it runs other tokens than the plan is for.
        """
        known = self.tokens.is_real if self.tokens.ids is None else self.tokens.ids
        num_tokens = hidden_states.numel() // hidden_states.shape[-1]
        if known is None or known.numel() == num_tokens:
            return self.routing
        length = num_tokens // known.shape[0]
        if hidden_states.shape[:-1] != (known.shape[0], length) or length > known.shape[1]:
            raise ValueError(
                f"The decoder runs {num_tokens} tokens, but the call had {known.numel()}: the base model adds or "
                "drops tokens, so their modalities are not known. Pass `mm_token_type_ids` with a call of the decoder, "
                'or use `expert_groups="joint"`.'
            )
        if self.routing is not None and self.routing.record is not None:
            raise ValueError(
                f"Some layers of this model only run the last {length} of {known.shape[1]} tokens, because of "
                "`logits_to_keep`, so the routing of all tokens is not known: pass `logits_to_keep=0` to get it."
            )
        if length not in self.of_last_tokens:
            last = TokenModalities(*(None if values is None else values[:, -length:] for values in self.tokens))
            self.of_last_tokens[length] = self.planner.plan(last, hidden_states.device)
        return self.of_last_tokens[length]


class _OfThread(threading.local):
    # Unlike a context variable, `torch.compile` traces it.
    plan: TokenPlan | None = None


_of_thread = _OfThread()


def current_plan() -> TokenPlan | None:
    """The plan of the forward pass that this thread runs."""
    return _of_thread.plan


@contextmanager
def token_plan(plan: TokenPlan | None) -> Iterator[None]:
    """Makes `plan` the current one for a while."""
    before, _of_thread.plan = _of_thread.plan, plan
    try:
        yield
    finally:
        _of_thread.plan = before


class UpcycledBlock(SparseMoeVlmSparseMoeBlock):
    """A sparse block in the place of a dense one: `hidden_states (..., D)` → `(..., D)`."""

    def __init__(self, config: SparseMoeVlmExpertsConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.pool = config.layer_pool(layer_idx)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        plan = _of_thread.plan
        if plan is None:
            raise RuntimeError(
                f"The sparse block of layer {self.layer_idx} runs without knowing its tokens: call the model or its "
                "decoder rather than a layer or block of it."
            )
        pooled = None if self.pool is None or plan.pools is None else plan.pools[self.pool]
        return super().forward(hidden_states, plan.routing_of(hidden_states), pooled)


class UpcycledLayerMixin:
    """Of a decoder layer with a sparse block in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Before activation checkpointing, which keeps the arguments and calls `forward` again in the backward pass.
        kwargs.setdefault("token_plan", _of_thread.plan)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, token_plan: TokenPlan | None = None, **kwargs: Any) -> Any:
        before, _of_thread.plan = _of_thread.plan, token_plan
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _of_thread.plan = before

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild_layer, (_base_of(type(self)),), self.__dict__


_layer_classes: dict[type, type] = {}


def upcycled_layer_class(base: type) -> type:
    """
    The class of a decoder layer with a sparse block.

    Args:
        base (`type`):
            The layer's class in the base model.

    Returns:
        `type`: a subclass under the same name, by which Accelerate and FSDP know which modules not to split; the same
        for every call.
    """
    if issubclass(base, UpcycledLayerMixin):
        return base
    if base not in _layer_classes:
        namespace = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _layer_classes[base] = type(base.__name__, (UpcycledLayerMixin, base), namespace)
    return _layer_classes[base]


def _base_of(layer_class: type) -> type:
    return next(base for base in layer_class.__mro__[1:] if base is not UpcycledLayerMixin)


def _rebuild_layer(base: type) -> Any:
    made: Any = upcycled_layer_class(base)
    return object.__new__(made)
