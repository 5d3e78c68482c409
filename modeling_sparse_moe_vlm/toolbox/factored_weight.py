"""A stack of expert weights with low-rank updates that multiplies without being added up: x·W + (x·L)·R.

It stands in for the stack while an experts module runs. Transformers' experts implementations, and the forwards that
models bring along, take experts from it and multiply with them; both are passed on to the stack and to the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Up to which the CPU is faster with the products of each expert than with a grouped one, which looks at all experts.
FEW_ROWS = 32


class LowRankUpdate:
    """
    Updates scaling·L·R of E matrices, or of one.

    Args:
        left (`torch.Tensor` of shape `(E, rows, r)` or `(rows, r)`): L.
        right (`torch.Tensor` of shape `(E, r, columns)` or `(r, columns)`): R.
        scaling (`float`): Factor of the product.
        dropout (`nn.Module`, *optional*): Applied to what the update is multiplied with, not to what W is.
    """

    __slots__ = ("_transposed", "dropout", "left", "right", "scaling")

    def __init__(self, left: torch.Tensor, right: torch.Tensor, scaling: float, dropout: nn.Module | None = None):
        self.left = left
        self.right = right
        self.scaling = scaling
        self.dropout = dropout
        self._transposed: LowRankUpdate | None = None

    def __getitem__(self, index: Any) -> LowRankUpdate:
        return LowRankUpdate(self.left[index], self.right[index], self.scaling, self.dropout)

    def transpose(self) -> LowRankUpdate:
        if self._transposed is None:
            left, right = self.right.transpose(-2, -1), self.left.transpose(-2, -1)
            self._transposed = LowRankUpdate(left, right, self.scaling, self.dropout)
        return self._transposed

    def product(self) -> torch.Tensor:
        return (self.left @ self.right) * self.scaling

    def dropped(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs if self.dropout is None else self.dropout(inputs)

    def scaled(self, reduced: torch.Tensor) -> torch.Tensor:
        return reduced if self.scaling == 1 else reduced * self.scaling


class FactoredWeight:
    """
    A stack of E matrices W + Σ scaling·L·R, each output of which may be rescaled; or one matrix, or a selection.

    Args:
        base (`torch.Tensor`): W, `(E, rows, columns)`.
        updates (`Sequence[LowRankUpdate]`): The updates, in the orientation of W.
        rescale (`torch.Tensor` of shape `(E, outputs)`, *optional*): Factor of each output.
    """

    def __init__(self, base: torch.Tensor, updates: Sequence[LowRankUpdate], rescale: torch.Tensor | None = None):
        self.base = base
        self.updates = updates
        self.rescale = rescale

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    def data_ptr(self) -> int:
        return self.base.data_ptr()

    def __getitem__(self, index: Any) -> FactoredWeight:
        rescale = None if self.rescale is None else self.rescale[index]
        return FactoredWeight(self.base[index], [update[index] for update in self.updates], rescale)

    def transpose(self, dim0: int, dim1: int) -> FactoredWeight:
        """With the last two dimensions swapped, as products ask for it."""
        if {dim0 % 3, dim1 % 3} != {1, 2}:
            raise ValueError(f"a stack of experts has no transpose({dim0}, {dim1}) but that of its matrices.")
        return FactoredWeight(self.base.transpose(1, 2), [update.transpose() for update in self.updates], self.rescale)

    def _linear(self, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = F.linear(inputs, self.base)
        for update in self.updates:
            reduced = update.scaled(F.linear(update.dropped(inputs), update.right))
            if torch.is_grad_enabled() or output.dtype != update.left.dtype or output.dim() != 2:
                output = output + F.linear(reduced, update.left)
            else:
                output.addmm_(reduced, update.left.t())
        output = output if self.rescale is None else output * self.rescale
        return output if bias is None else output + bias

    def _from_the_right(self, function: Callable, inputs: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        output = function(inputs, self.base, *rest, **options)
        offsets = (options["offs"] if options else rest[0]) if function in GROUPED else None
        for update in self.updates:
            if offsets is not None and inputs.shape[0] <= FEW_ROWS and _can_add_in_place(inputs, output, update):
                _add_by_expert(output, update, inputs, offsets)
                continue
            reduced = update.scaled(function(update.dropped(inputs), update.left, *rest, **options))
            output = output + function(reduced, update.right, *rest, **options)
        rescale = self.rescale
        if rescale is None:
            return output
        if offsets is not None:
            owners = _owners(offsets, output.shape[0])
            # Rows of nobody were not written, and what they hold must not get into the gradients of `rescale`.
            output = output.masked_fill((owners == rescale.shape[0]).unsqueeze(-1), 0.0)
            return output * rescale[owners.clamp(max=rescale.shape[0] - 1)]
        return output * (rescale.unsqueeze(-2) if rescale.dim() == 2 else rescale)

    def _from_the_left(self, function: Callable, inputs: torch.Tensor) -> torch.Tensor:
        output = function(self.base, inputs)
        for update in self.updates:
            output = output + function(update.left, update.scaled(function(update.right, update.dropped(inputs))))
        rescale = self.rescale
        return output if rescale is None else output * rescale.unsqueeze(-1)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> torch.Tensor:
        kwargs = kwargs or {}
        first, second, *rest = args
        if function is F.linear and isinstance(second, cls):
            return second._linear(first, *rest, **kwargs)
        if (function in PRODUCTS or function in GROUPED) and isinstance(second, cls):
            return second._from_the_right(function, first, *rest, **kwargs)
        if function in PRODUCTS and isinstance(first, cls):
            return first._from_the_left(function, second)
        raise NotImplementedError(
            f"the experts' forward calls `{getattr(function, '__name__', function)}`, which factored adapters do not "
            'know. `experts_implementation` "eager", "grouped_mm" or "batched_mm" runs factored.'
        )


GROUPED = {
    function
    for function in (
        getattr(F, "grouped_mm", None),
        getattr(torch, "_grouped_mm", None),
        torch.ops.transformers.grouped_mm_fallback,
        torch.ops.transformers.grouped_mm_fallback.default,
    )
    if function is not None
}
PRODUCTS = {torch.mm, torch.bmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm}


def _can_add_in_place(inputs: torch.Tensor, output: torch.Tensor, update: LowRankUpdate) -> bool:
    return (
        output.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and inputs.dtype == output.dtype == update.left.dtype
    )


def _add_by_expert(output: torch.Tensor, update: LowRankUpdate, inputs: torch.Tensor, offsets: torch.Tensor) -> None:
    inputs, start = update.dropped(inputs), 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            reduced = update.scaled(torch.mm(inputs[start:end], update.left[expert]))
            output[start:end].addmm_(reduced, update.right[expert])
            start = end


def _owners(offsets: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The expert of each row, from the ends of the experts' rows. Rows behind the last belong to nobody, E."""
    rows = torch.arange(num_rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, rows, right=True)
