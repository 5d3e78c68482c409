"""Sparse blocks in the decoder layers of Transformers models, and how they get the modalities of the tokens.

The outermost model makes a [`TokenPlan`] and stores it in a thread-local variable. When a sparse layer is called, it
takes the plan from there and passes it to its own `forward` as an argument. Gradient checkpointing keeps the arguments
of a layer, so the plan is available again when the layer is run again in the backward pass. While the layer runs, its
sparse block reads the plan from the thread-local variable.
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
    """
    The routed experts that several layers share, by the number of the pool. It is not a module, so that tools that move
    the arguments of layers to other devices do not move the experts.

    Args:
        pools (`nn.ModuleDict`):
            The expert pools of the model.
    """

    def __init__(self, pools: nn.ModuleDict):
        self._pools = pools

    def __getitem__(self, pool: int) -> nn.Module:
        return self._pools[str(pool)]


class TokenPlan(NamedTuple):
    """
    The information about a forward pass that the sparse layers of a model need.

    Args:
        owner (`SparseMoeVlmExpertsConfig`):
            The experts' configuration of the model. It is the same object in all submodels.
        planner ([`~routing.RoutingPlanner`]):
            The planner that made the plan.
        tokens ([`~token_modalities.TokenModalities`]):
            The tokens, if the plan depends on them.
        routing ([`~routing.RoutingPlan`], *optional*):
            The routing plan (see [`~routing.RoutingPlanner.plan`]).
        pools ([`ExpertPools`], *optional*):
            The expert pools.
        of_last_tokens (`dict[int, RoutingPlan | None]`):
            Plans for layers that run only the last tokens of each row, by the number of tokens. Filled on demand.
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
        """Makes a plan for the tokens: see [`~routing.RoutingPlanner.plan`]."""
        return cls(owner, planner, tokens, planner.plan(tokens, device, record), pools=None, of_last_tokens={})

    def routing_of(self, hidden_states: torch.Tensor) -> RoutingPlan | None:
        """
        Returns the routing plan for the tokens that a layer runs. These are all tokens or, for later layers of a prompt
        that have no key/value cache, only the last tokens of each row (Gemma 4).

        Args:
            hidden_states (`torch.Tensor` of shape `(..., D)`):
                Hidden states that the layer runs.

        Returns:
            [`~routing.RoutingPlan`], *optional*: The plan.

        Raises:
            ValueError: If the layer runs other tokens than those of the plan.
        """
        known = self.tokens.is_real if self.tokens.ids is None else self.tokens.ids
        num_tokens = hidden_states.numel() // hidden_states.shape[-1]
        if known is None or known.numel() == num_tokens:
            return self.routing
        length = num_tokens // known.shape[0]
        if hidden_states.shape[:-1] != (known.shape[0], length) or length > known.shape[1]:
            raise ValueError(
                f"The decoder runs {num_tokens} tokens, but the call had {known.numel()}: the base model adds or "
                "drops tokens, so their modalities are not known. Call the decoder directly with `mm_token_type_ids`, "
                'or use `expert_groups="joint"`.'
            )
        if self.routing is not None and self.routing.record is not None:
            raise ValueError(
                f"Some layers of this model only run the last {length} of {known.shape[1]} tokens, because of "
                "`logits_to_keep`, so the routing of all tokens is not known: pass `logits_to_keep=0`."
            )
        if length not in self.of_last_tokens:
            last = TokenModalities(*(None if values is None else values[:, -length:] for values in self.tokens))
            self.of_last_tokens[length] = self.planner.plan(last, hidden_states.device)
        return self.of_last_tokens[length]


class _OfThread(threading.local):
    """The plan of the current thread. Unlike a context variable, it can be traced by `torch.compile`."""

    plan: TokenPlan | None = None


_of_thread = _OfThread()


def current_plan() -> TokenPlan | None:
    """Returns the plan of the forward pass that the current thread runs, or `None`."""
    return _of_thread.plan


@contextmanager
def token_plan(plan: TokenPlan | None) -> Iterator[None]:
    """Context manager that sets the plan of the current thread."""
    before, _of_thread.plan = _of_thread.plan, plan
    try:
        yield
    finally:
        _of_thread.plan = before


class UpcycledBlock(SparseMoeVlmSparseMoeBlock):
    """
    The sparse block that replaces a dense block: `hidden_states (..., D)` → `(..., D)`.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        layer_idx (`int`):
            Index of the layer.
    """

    def __init__(self, config: SparseMoeVlmExpertsConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.pool = config.layer_pool(layer_idx)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Routes the tokens of the current forward pass and runs the experts."""
        plan = _of_thread.plan
        if plan is None:
            raise RuntimeError(
                f"The sparse block of layer {self.layer_idx} does not know the modalities of its tokens: call the "
                "model or its decoder instead of a single layer or block."
            )
        pooled = None if self.pool is None or plan.pools is None else plan.pools[self.pool]
        return super().forward(hidden_states, plan.routing_of(hidden_states), pooled)


class UpcycledLayerMixin:
    """Base class of decoder layers that contain a sparse block. It passes the plan of the forward pass to the layer."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Before gradient checkpointing, which keeps the arguments and calls `forward` again in the backward pass.
        kwargs.setdefault("token_plan", _of_thread.plan)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, token_plan: TokenPlan | None = None, **kwargs: Any) -> Any:
        """Runs the layer of the base model with a plan."""
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
    Returns the class of a decoder layer with a sparse block.

    Args:
        base (`type`):
            Class of the layer in the base model.

    Returns:
        `type`: A subclass with the same name, by which Accelerate and FSDP identify modules that must not be split. It
        is the same for every call.
    """
    if issubclass(base, UpcycledLayerMixin):
        return base
    if base not in _layer_classes:
        namespace = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        # Another thread may have been faster.
        _layer_classes.setdefault(base, type(base.__name__, (UpcycledLayerMixin, base), namespace))
    return _layer_classes[base]


def _base_of(layer_class: type) -> type:
    return next(base for base in layer_class.__mro__[1:] if base is not UpcycledLayerMixin)


def _rebuild_layer(base: type) -> Any:
    made: Any = upcycled_layer_class(base)
    return object.__new__(made)
