"""Saves experts instead of slots for the backward pass, because the slots may contain other experts by then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .slots import ExpertSlots


@dataclass(frozen=True)
class _View:
    """A view of a stack of slots, without its memory. `turn` is an empty tensor saved by the outer context."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    turn: Any

    @property
    def last(self) -> int:
        """The offset of the last element."""
        return self.offset + sum((length - 1) * step for length, step in zip(self.size, self.stride))


@contextmanager
def save_experts_for_backward(
    slots: ExpertSlots, placement: Mapping[int, int], in_use: AbstractContextManager
) -> Iterator[None]:
    """
    A context in which autograd saves the numbers of the experts instead of the memory of the slots. In the backward
    pass, the weights are taken from the slots, or read again if they are no longer there.

    Args:
        slots ([`~toolbox.paging.slots.ExpertSlots`]): The slots.
        placement (`Mapping[int, int]`): Slots that the computation uses, by expert.
        in_use (`AbstractContextManager`): Lock that is entered while the backward pass accesses the slots.
    """
    names = {stack.untyped_storage().data_ptr(): name for name, stack in slots.stacks.items()}
    # The outer context, such as gradient checkpointing, saves tensors that are not part of the slots.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack_outer, unpack_outer = outer or (torch.Tensor.detach, lambda saved: saved)

    def pack(tensor: torch.Tensor):
        name = names.get(tensor.untyped_storage().data_ptr()) if tensor.device == slots.device else None
        if name is None:
            return pack_outer(tensor)
        # The outer context may recompute what it did not save, which needs the slots. Its hook for this empty tensor
        # runs before the slots are accessed.
        turn = pack_outer(tensor.new_empty(0))
        return _View(name, tensor.size(), tensor.stride(), int(tensor.storage_offset()), turn)

    def unpack(saved):
        if not isinstance(saved, _View):
            return unpack_outer(saved)
        unpack_outer(saved.turn)
        start = slots.stacks[saved.name].storage_offset()
        step = slots.stacks[saved.name].stride(0)
        first, last = (saved.offset - start) // step, (saved.last - start) // step
        with in_use:
            rows = slots.rows(saved.name, placement, first, last)
        return rows.as_strided(saved.size, saved.stride, saved.offset - start - first * step + rows.storage_offset())

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
