"""
A stack of expert weights with low-rank updates. Products are computed without adding the updates to the weights: x·W +
(x·Lᵀ)·R.

An object of this kind replaces the stack while an experts module runs. The experts implementations of Transformers, and
the forwards of models that do not use them, index it and multiply with it. Both operations are applied to the stack and
to the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Up to this number of rows, separate products for each expert are faster on the CPU than a grouped product, which
# processes all experts.
FEW_ROWS = 32


class LowRankUpdate:
    """
    The low-rank updates scaling·Lᵀ·R of E matrices, or of one matrix.

    Args:
        rows (`torch.Tensor` of shape `(E, r, rows)` or `(r, rows)`):
            L, the factor that belongs to the rows of the matrix.
        columns (`torch.Tensor` of shape `(E, r, columns)` or `(r, columns)`):
            R, the factor that belongs to the columns of the matrix.
        scaling (`float`):
            Factor of the product Lᵀ·R.
        dropout (`nn.Module`, *optional*):
            Dropout for the inputs of the update. The inputs of W are not affected.
    """

    __slots__ = ("_columns_t", "_matrices", "_transposed", "columns", "dropout", "rows", "scaling")

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor, scaling: float, dropout: nn.Module | None = None):
        self.rows = rows
        self.columns = columns
        self.scaling = scaling
        self.dropout = dropout
        # Views are made once, because an update may be used in many decoding steps.
        self._transposed: LowRankUpdate | None = None
        self._columns_t: torch.Tensor | None = None
        self._matrices: dict[int, LowRankUpdate] = {}

    def __getitem__(self, index: Any) -> LowRankUpdate:
        return LowRankUpdate(self.rows[index], self.columns[index], self.scaling, self.dropout)

    def matrix(self, expert: int) -> LowRankUpdate:
        """Returns the update of the matrix of one expert."""
        matrix = self._matrices.get(expert)
        if matrix is None:
            matrix = self._matrices[expert] = self[expert]
        return matrix

    @property
    def columns_t(self) -> torch.Tensor:
        if self._columns_t is None:
            self._columns_t = self.columns.transpose(-2, -1)
        return self._columns_t

    def transpose(self) -> LowRankUpdate:
        if self._transposed is None:
            self._transposed = LowRankUpdate(self.columns, self.rows, self.scaling, self.dropout)
        return self._transposed

    def product(self) -> torch.Tensor:
        return (self.rows.transpose(-2, -1) @ self.columns) * self.scaling

    def dropped(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs if self.dropout is None else self.dropout(inputs)

    def scaled(self, reduced: torch.Tensor) -> torch.Tensor:
        return reduced if self.scaling == 1 else reduced * self.scaling

    def adds_in_place(self, inputs: torch.Tensor, output: torch.Tensor) -> bool:
        """Whether the product with the update can be added to `output` in place, in one operation."""
        return not torch.is_grad_enabled() and inputs.dtype == output.dtype == self.rows.dtype


class FactoredWeight:
    """
    A stack of E matrices W + Σ scaling·Lᵀ·R, whose outputs may be rescaled. An index selects some of the matrices, or a
    single one, whose tensors have no dimension E.

    Args:
        base (`torch.Tensor` of shape `(E, rows, columns)`):
            W.
        updates (`Sequence[LowRankUpdate]`):
            The updates, in the orientation of W.
        rescale (`torch.Tensor` of shape `(E, outputs)`, *optional*):
            Factor of each output, for DoRA.

    Raises:
        NotImplementedError: If the object is used in an operation other than a product.
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
        """Swaps the last two dimensions. Raises `ValueError` for other dimensions."""
        if (dim0, dim1) not in SWAPS:
            raise ValueError(
                f"a stack of experts has no transpose({dim0}, {dim1}): only its last two dimensions can be swapped."
            )
        return FactoredWeight(self.base.transpose(1, 2), [update.transpose() for update in self.updates], self.rescale)

    def _linear(self, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = F.linear(inputs, self.base)
        for update in self.updates:
            reduced = update.scaled(F.linear(update.dropped(inputs), update.columns))
            if output.dim() == 2 and update.adds_in_place(inputs, output):
                output.addmm_(reduced, update.rows)
            else:
                output = output + reduced @ update.rows
        output = output if self.rescale is None else output * self.rescale
        return output if bias is None else output + bias

    def _from_the_right(self, function: Callable, inputs: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        offsets = (options["offs"] if options else rest[0]) if function in GROUPED else None
        if offsets is not None and self._are_few(inputs):
            return self._by_expert(inputs, offsets)
        output = function(inputs, self.base, *rest, **options)
        for update in self.updates:
            reduced = update.scaled(function(update.dropped(inputs), update.rows.transpose(-2, -1), *rest, **options))
            output = output + function(reduced, update.columns, *rest, **options)
        rescale = self.rescale
        if rescale is None:
            return output
        if offsets is not None:
            owners = _owners(offsets, output.shape[0])
            # Rows that belong to no expert are uninitialised. They must not reach the gradients of `rescale`.
            output = output.masked_fill((owners == rescale.shape[0]).unsqueeze(-1), 0.0)
            return output * rescale[owners.clamp(max=rescale.shape[0] - 1)]
        return output * (rescale.unsqueeze(-2) if rescale.dim() == 2 else rescale)

    def _are_few(self, rows: torch.Tensor) -> bool:
        return (
            rows.shape[0] <= FEW_ROWS
            and rows.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")  # grouped products ignore autocast
            and rows.dtype == self.base.dtype != torch.float16  # products with vectors are slow in float16
            and all(update.rows.dtype == rows.dtype for update in self.updates)
            and self.rescale is None
            and not torch.compiler.is_compiling()
        )

    def _by_expert(self, inputs: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Computes a grouped product expert by expert. Rows that belong to no expert are not written."""
        matrices, updates, start = self.base.transpose(1, 2), self.updates, 0
        output = inputs.new_empty(inputs.shape[0], matrices.shape[1])
        for expert, end in enumerate(offsets.tolist()):
            if end == start:
                continue
            if end == start + 1:  # products with vectors are faster
                part, its_output = inputs[start], output[start]
                torch.mv(matrices[expert], part, out=its_output)
                for update in updates:
                    matrix = update.matrix(expert)
                    reduced = update.scaled(torch.mv(matrix.rows, update.dropped(part)))
                    its_output.addmv_(matrix.columns_t, reduced)
            else:
                part, its_output = inputs[start:end], output[start:end]
                torch.mm(part, matrices[expert].t(), out=its_output)
                for update in updates:
                    matrix = update.matrix(expert)
                    reduced = update.scaled(torch.mm(update.dropped(part), matrix.rows.t()))
                    its_output.addmm_(reduced, matrix.columns)
            start = end
        return output

    def _from_the_left(self, function: Callable, inputs: torch.Tensor) -> torch.Tensor:
        output = function(self.base, inputs)
        for update in self.updates:
            reduced, rows = update.scaled(function(update.columns, update.dropped(inputs))), update.rows
            if output.dim() == 3 and update.adds_in_place(inputs, output):
                output.baddbmm_(rows.transpose(1, 2), reduced)
            else:
                output = output + function(rows.transpose(-2, -1), reduced)
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
            f"the forward of the experts calls `{getattr(function, '__name__', function)}`, which factored adapters do "
            'not know: set `experts_implementation` to "eager", "grouped_mm" or "batched_mm".'
        )


SWAPS = {(a, b) for a in (1, 2, -1, -2) for b in (1, 2, -1, -2) if {a % 3, b % 3} == {1, 2}}
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


def _owners(offsets: torch.Tensor, num_rows: int) -> torch.Tensor:
    """
    Returns the expert of each row. `offsets` contains the end of the rows of each of E experts. Rows after the last end
    belong to no expert and get the value E.
    """
    rows = torch.arange(num_rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, rows, right=True)
