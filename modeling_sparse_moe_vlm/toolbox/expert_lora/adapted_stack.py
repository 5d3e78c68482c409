"""The replacement of a stack that has adapters, while an experts module runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .factored_weight import FactoredWeight, LowRankUpdate


class AdaptedStack(FactoredWeight):
    """
    The stack of a layer with adapters.

    Args:
        layer ([`~toolbox.expert_lora.adapted_layer.FactoredExpertsLayer`]):
            Layer of the stack.
        adapter_names (`Sequence[str]`):
            Names of the adapters to run.
        updates (`Sequence[LowRankUpdate]`):
            Updates of all experts by these adapters.
        stack (`torch.Tensor`):
            The stack, in the orientation of the parameter.
        held (`torch.Tensor`, *optional*):
            Indices of the experts in `stack`. By default, it contains all experts.
    """

    def __init__(
        self,
        layer: Any,
        adapter_names: Sequence[str],
        updates: Sequence[LowRankUpdate],
        stack: torch.Tensor,
        held: torch.Tensor | None = None,
    ):
        super().__init__(stack, updates if held is None else [update[held] for update in updates])
        self._layer = layer
        self._adapter = adapter_names[0]
        self._held = held
        self._is_whole = held is None
        self._rescale: torch.Tensor | None = None

    @property
    def rescale(self) -> torch.Tensor | None:  # type: ignore[override]
        """The factor by which DoRA rescales each output, computed at the first access."""
        if self._rescale is None and self._layer.use_dora.get(self._adapter):
            self._rescale = self._layer.rescale(self._adapter, self.base, self._held)
        return self._rescale

    @rescale.setter
    def rescale(self, rescale: torch.Tensor | None) -> None:
        self._rescale = rescale

    @property
    def requires_grad(self) -> bool:
        return self.base.requires_grad

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns the stack on another device. Accelerate calls this to offload the stack again."""
        return self.base.to(*args, **kwargs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return self._element(*index)
        if self._is_whole and _is_one(index):
            index = int(index)
            updates = [update.matrix(index) for update in self.updates]
        else:
            updates = [update[index] for update in self.updates]
        rescale = self.rescale
        return FactoredWeight(self.base[index], updates, None if rescale is None else rescale[index])

    def _element(self, expert: int, *place: int) -> torch.Tensor:
        """Returns one element of the adapted weights. Models use it to keep experts without tokens in the graph."""
        matrix = self[expert]
        weight = matrix.base + sum(update.product() for update in matrix.updates)
        if matrix.rescale is not None:
            weight = self._layer.out_first(weight[None]) * matrix.rescale[None, :, None]
            weight = self._layer.out_first(weight)[0]
        return weight[place]


def _is_one(index: int | torch.Tensor) -> bool:
    """Whether an index selects one expert and its value is known now, that is, not while a call is compiled."""
    return not isinstance(index, torch.Tensor) or (index.dim() == 0 and not torch.compiler.is_compiling())
