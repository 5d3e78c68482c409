"""A pretended second process for tests of losses over the batch of all processes."""

from __future__ import annotations

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.training import global_batch


def pretend_two_processes(monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    Makes a global batch believe that there are two processes.

    Returns:
        `tuple[list[torch.Tensor], list[torch.Tensor]]`: A list that gets the tensors that this process reduces, and a
        list of those that the other process adds to the next ones, which the test fills.
    """
    mine: list[torch.Tensor] = []
    others: list[torch.Tensor] = []

    def all_reduce(tensor: torch.Tensor) -> None:
        mine.append(tensor.clone())
        if others:
            tensor += others.pop(0)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(global_batch, "is_one_of_several_processes", lambda: True)
    return mine, others
