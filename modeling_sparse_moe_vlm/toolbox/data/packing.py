"""
Sample packing: puts the rows of a batch one after another into few sequences, so that little padding remains.

The rows of a sequence are separated by their positions, which restart at 0 in each row. Transformers derives the
attention mask from them if a call has neither an attention mask nor a key/value cache. Padding at the end of a sequence
has the position -1, so that no token attends to another padding token, and models with our experts recognise it.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BatchFeature

IGNORE_INDEX = -100
PADDING_POSITION = -1


def assign_rows(lengths: Sequence[int]) -> list[list[int]]:
    """
    Assigns the rows of a batch to sequences.

    For each number of sequences, the rows are distributed so that the sequences have similar lengths (each row, longest
    first, is added to the shortest sequence). Of these assignments, the one with the fewest tokens is used, padding
    included, among those whose attention matrices are not larger than those of the padded batch.

    Args:
        lengths (`Sequence[int]`):
            Number of tokens of each row.

    Returns:
        `list[list[int]]`: The numbers of the rows of each sequence, in order.
    """
    num_rows, longest = len(lengths), max(lengths)
    best: tuple[int, int] | None = None
    assignment: list[list[int]] = []
    for count in range(1, num_rows + 1):
        sequences: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for row in sorted(range(num_rows), key=lambda row: -lengths[row]):
            shortest = filled.index(min(filled))
            sequences[shortest].append(row)
            filled[shortest] += lengths[row]
        width = max(filled)
        cost = (count * width, count * width**2)
        if cost[1] <= num_rows * longest**2 and (best is None or cost < best):
            best, assignment = cost, sequences
    return assignment


class RowPacker:
    """
    Packs rows for one model. It can be pickled, because it does not keep the model.

    Args:
        pad_token_id (`int`):
            Token id of padding.
        layouts (`Mapping[str, bool]`):
            Whether a field of the processor has one entry per row (`input_ids`, or `pixel_values` of Idefics 3), by the
            name of the field. The other fields have one or several entries per image.
        positions (`RowPositions`):
            Computes the positions of a row.
        separators (`bool`, *optional*, defaults to `False`):
            Whether to put a token of padding between two rows and not to restart the positions. Relative positions are
            the same. Some models need this, because they apply other masks to positions instead of places.
        one_sequence (`bool`, *optional*, defaults to `False`):
            Whether to put all rows into a single sequence, without padding at its end.
    """

    def __init__(
        self,
        pad_token_id: int,
        layouts: Mapping[str, bool],
        positions: RowPositions,
        *,
        separators: bool = False,
        one_sequence: bool = False,
    ):
        self.pad_token_id = pad_token_id
        self.layouts = dict(layouts)
        self.positions = positions
        self.separators = separators
        self.one_sequence = one_sequence

    def assign(self, lengths: Sequence[int]) -> list[list[int]]:
        """Returns the numbers of the rows of each sequence, for rows of these lengths."""
        if self.one_sequence:
            return [list(range(len(lengths)))]
        return assign_rows([length + self.separators for length in lengths])

    def pack(
        self, rows: Sequence[Mapping[str, Any]], sequences: Sequence[Sequence[int]], padding: Collection[int] = ()
    ) -> BatchFeature:
        """
        Packs rows into sequences.

        Args:
            rows (`Sequence[Mapping]`):
                Model inputs of each row, a batch of one row without padding, with `labels`.
            sequences (`Sequence[Sequence[int]]`):
                Numbers of the rows of each sequence.
            padding (`Collection[int]`, *optional*):
                Numbers of rows that are padding and not targets. They are moved to the end of their sequence.

        Returns:
            `BatchFeature`: Model inputs with `position_ids` of shape `(sequences, length)`, or `(axes, sequences,
            length)` for models with several positions per token, and without `attention_mask`. `use_cache` is `False`,
            because Transformers does not separate rows if there is a cache.

        Raises:
            ValueError: If a row has a field whose layout is not known.
        """
        rows = [self._with_positions(row, number in padding) for number, row in enumerate(rows)]
        sequences = [sorted(sequence, key=lambda row: row in padding) for sequence in sequences]
        unknown = [name for row in rows for name in row if name not in self.layouts and name != "position_ids"]
        if unknown:
            raise ValueError(
                f"the processor returns `{unknown[0]}`, which packing does not know: its entries cannot be assigned to "
                "rows. Set `packing=False`."
            )
        batch: dict[str, Any] = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            value = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, "position_ids": PADDING_POSITION}.get(
                name, 0
            )
            of_sequences = [self._of_sequence(name, [rows[row] for row in sequence], value) for sequence in sequences]
            parts = [part for part in of_sequences if part is not None]
            if self.layouts.get(name) and len(parts) < len(sequences):
                # Sequences without images have an image that consists of padding.
                nothing = torch.full_like(parts[0][:, :1], value)
                parts = [nothing if part is None else part for part in of_sequences]
            batch[name] = _concatenate(parts, dim=1 if name == "position_ids" else 0, value=value)
        if batch["position_ids"].shape[0] == 1:
            batch["position_ids"] = batch["position_ids"][0]
        return BatchFeature(batch | {"use_cache": False})

    def _of_sequence(self, name: str, rows: Sequence[Mapping[str, torch.Tensor]], value: int) -> torch.Tensor | None:
        """Returns a field of a sequence of rows, or `None` if no row has the field."""
        parts = [row[name] for row in rows if name in row]
        if not parts:
            return None
        if name == "position_ids":
            return torch.cat(self._separated(self._continued(parts), value), dim=2)
        if not self.layouts[name]:
            return _concatenate(parts, dim=0, value=value)
        is_of_tokens = all(part.shape[1:] == row["input_ids"].shape[1:] for row, part in zip(rows, parts))
        return _concatenate(self._separated(parts, value) if is_of_tokens else parts, dim=1, value=value)

    def _separated(self, parts: list[torch.Tensor], value: int) -> list[torch.Tensor]:
        """Appends a token of padding to all parts but the last one."""
        if not self.separators:
            return parts
        return [*(F.pad(part, (0, 1), value=value) for part in parts[:-1]), parts[-1]]

    def _continued(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """With separators, the positions of a row start at its place in the sequence."""
        if not self.separators:
            return parts
        places = [0, *accumulate(part.shape[-1] + 1 for part in parts[:-1])]
        return [
            torch.where(part == PADDING_POSITION, part, part + place) for part, place in zip(parts, places, strict=True)
        ]

    def _with_positions(self, row: Mapping[str, Any], is_padding: bool) -> dict[str, Any]:
        row = dict(row) | {"position_ids": self.positions(row)}
        row.pop("attention_mask", None)
        row["labels"] = row["labels"].clone()
        row["labels"][:, 0] = IGNORE_INDEX  # otherwise, the last token of the row before would predict it
        if is_padding:
            row["labels"].fill_(IGNORE_INDEX)
            row["position_ids"] = torch.full_like(row["position_ids"], PADDING_POSITION)
        return row


class RowPositions:
    """
    Computes the positions of the tokens of a row as the model does, without keeping the weights of the model.

    Args:
        model (`nn.Module`):
            The model.
    """

    def __init__(self, model: nn.Module):
        owners = [module for module in model.modules() if hasattr(type(module), "get_rope_index")]
        self.owner = _without_weights(owners[0]) if owners else None

    def __call__(self, row: Mapping[str, Any]) -> torch.Tensor:
        """
        Returns the positions of a row.

        Args:
            row (`Mapping`):
                Model inputs of one row, without padding.

        Returns:
            `torch.Tensor` of shape `(axes, 1, length)`: The positions. The first axis counts the tokens; models with
            multimodal rotary embeddings have further axes.
        """
        length = row["input_ids"].shape[1]
        counted = torch.arange(length)[None, None]
        if self.owner is None:
            return counted
        if not any(name.endswith("grid_thw") for name in row):
            return counted.repeat(4, 1, 1)
        known = inspect.signature(self.owner.get_rope_index).parameters
        positions = self.owner.get_rope_index(**{name: value for name, value in row.items() if name in known})[0]
        return torch.cat([counted, positions.to(counted)])


def _without_weights(module: nn.Module) -> Any:
    """Returns a module of the same class with the same plain attributes, but without submodules and tensors."""
    shell = object.__new__(type(module))
    nn.Module.__init__(shell)
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_") and not callable(value)}
    vars(shell).update(plain)
    return shell


def _concatenate(tensors: Sequence[torch.Tensor], dim: int, value: int) -> torch.Tensor:
    """Concatenates tensors along a dimension. The other dimensions are padded to the largest size with the value."""
    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(tensors[0].dim())]
    padded = []
    for tensor in tensors:
        missing = [0 if axis == dim else sizes[axis] - tensor.shape[axis] for axis in range(tensor.dim())]
        padding = [number for count in reversed(missing) for number in (0, count)]
        padded.append(F.pad(tensor, padding, value=value))
    return torch.cat(padded, dim=dim)
