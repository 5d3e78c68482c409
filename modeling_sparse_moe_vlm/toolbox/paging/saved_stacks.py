"""What autograd saves of slots: remembered as experts, since the slots may hold others when backward asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .slots import ExpertSlots


@dataclass(frozen=True)
class _View:
    """A view of a stack of slots, without the memory; `turn` is what a context around may want to do first."""

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
    What autograd saves of the slots inside this context is remembered as experts rather than as memory, and is put
    back, read again where it must be, when backward asks for it.

    Args:
        slots ([`~toolbox.paging.slots.ExpertSlots`]): The slots.
        placement (`Mapping[int, int]`): The slots, by expert, that are computed with.
        in_use (`AbstractContextManager`): Entered while the slots are looked at in backward.
    """
    names = {stack.untyped_storage().data_ptr(): name for name, stack in slots.stacks.items()}
    # A context around this one, such as gradient checkpointing, keeps what is not of the slots.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack_outer, unpack_outer = outer or (torch.Tensor.detach, lambda saved: saved)

    def pack(tensor: torch.Tensor):
        name = names.get(tensor.untyped_storage().data_ptr()) if tensor.device == slots.device else None
        if name is None:
            return pack_outer(tensor)
        # The context around it may compute again what it did not keep, and needs the slots for that: it has its turn
        # first.
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
