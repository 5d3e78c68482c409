"""Adapters by row: `adapter_names` names one for each row of the batch."""

from __future__ import annotations

from typing import Any

import torch


def run_by_row(layer: Any, adapter_names: list[str], x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
    """
    Runs experts with an adapter for each row of the batch: once per adapter, on the tokens of its rows.

    Args:
        layer ([`~toolbox.expert_lora.adapted_layer.FactoredExpertsLayer`]): The outermost layer of the experts.
        adapter_names (`list[str]`): The adapter of each row; `"__base__"` for none.
        x (`torch.Tensor` of shape `(tokens, ...)`): The experts' input.
        *args (`torch.Tensor` of shape `(tokens, ...)`): Their other inputs.

    Raises:
        ValueError: If adapters are merged, or several processes share the experts.
    """
    if layer.merged:
        raise ValueError("`adapter_names` needs adapters that are not merged: call `unmerge_adapter` first.")
    if layer.share is not None:
        raise ValueError(
            f"several processes share {layer.stack_name!r}, so that rows of a batch cannot have an adapter "
            "each: leave out `adapter_names`, and switch by `set_adapter`, or run the model in one process."
        )
    places, num_tokens = layer.token_rows or (None, x.shape[0])
    if num_tokens % len(adapter_names):
        raise ValueError(
            f"`adapter_names` names {len(adapter_names)} rows, but the experts got {num_tokens} tokens, "
            "which is no multiple: give a name for each row of the batch."
        )
    rows = (torch.arange(num_tokens, device=x.device) if places is None else places) // (
        num_tokens // len(adapter_names)
    )
    output = torch.zeros_like(x)
    for name in dict.fromkeys(adapter_names):
        is_its = torch.tensor([other == name for other in adapter_names], device=x.device)
        tokens = is_its[rows].nonzero().squeeze(1)
        output[tokens] = layer.run([name], x[tokens], *(arg[tokens] for arg in args)).to(output.dtype)
    return output
