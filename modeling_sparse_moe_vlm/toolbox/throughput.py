"""Tokens per second and peak memory of a training."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..parallel_plans import is_one_of_several_processes
from ..token_modalities import padding_mask
from .expert_modules import our_experts_config

# Ids of `mm_token_type_ids` in Transformers.
MODALITIES = ("text", "image", "video", "audio")


class Throughput:
    """
    Counts the tokens that a model processes in training, by modality, and measures the time of the training steps.
    Evaluation and saving do not count.
    """

    def __init__(self) -> None:
        self._modalities: tuple[str, ...] = MODALITIES
        self._tokens: list[torch.Tensor] = []  # replicas of `DataParallel` append to it from their threads
        self._seconds, self._since = 0.0, 0.0
        self._num_copies = 1
        self._hooks: list[RemovableHandle] = []

    def start(self, model: nn.Module) -> None:
        """
        Starts to count the tokens of the forward passes in training.

        Args:
            model (`nn.Module`):
                The model. It can be wrapped or have adapters.
        """
        self.stop()
        self._tokens, self._seconds = [], 0.0
        own = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if own is not None:
            experts = our_experts_config(own.config)
            self._modalities = MODALITIES if experts is None else tuple(experts.modalities)
            # With tensor parallelism, several processes read the same rows.
            self._num_copies = getattr(getattr(own.config, "distributed_config", None), "tp_size", 1)
            self._hooks = [own.register_forward_pre_hook(self._before, with_kwargs=True)]
        self.resume()

    def stop(self) -> None:
        """Stops counting."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def resume(self) -> None:
        """Restarts the clock after something that is not training, such as an evaluation."""
        self._since = time.perf_counter()

    def add_time(self) -> None:
        """Adds the time since the last call of this method or of `resume`."""
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now

    def _before(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            inputs = kwargs if not args else kwargs | {"input_ids": args[0]}
            counts = count_tokens(model, inputs, len(self._modalities))
            if counts is not None:
                self._tokens.append(counts)

    def figures(self) -> dict[str, float]:
        """
        Returns the throughput since the last call of this method, over all processes, which must call it together.

        Returns:
            `dict[str, float]`: `tokens_per_second`, and `tokens_per_second_<modality>` for each modality in the data.
            Empty if no tokens were counted.
        """
        tokens, seconds = self._tokens, self._seconds
        self._tokens, self._seconds = [], 0.0
        if not tokens or seconds <= 0:
            return {}
        counts = torch.stack([count.to(tokens[0].device) for count in tokens]).sum(dim=0)
        if is_one_of_several_processes():
            torch.distributed.all_reduce(counts)
        per_second = [count / self._num_copies / seconds for count in counts.tolist()]
        figures = {"tokens_per_second": sum(per_second)}
        for modality, value in zip(self._modalities, per_second, strict=True):
            if value:
                figures[f"tokens_per_second_{modality}"] = value
        return figures


def count_tokens(model: PreTrainedModel, inputs: Mapping[str, Any], num_modalities: int) -> torch.Tensor | None:
    """
    Counts the tokens of a batch by modality. Padding is not counted.

    Args:
        model (`PreTrainedModel`):
            The model.
        inputs (`Mapping[str, Any]`):
            Inputs of its forward pass. Without `mm_token_type_ids`, the placeholder tokens define the modalities.
        num_modalities (`int`):
            Number M of modalities.

    Returns:
        `torch.Tensor` of shape `(M,)`, *optional*: Number of tokens of each modality, of type int64. `None` if the
        inputs have neither `input_ids` nor `inputs_embeds`.
    """
    input_ids = inputs.get("input_ids")
    tokens = input_ids if input_ids is not None else inputs.get("inputs_embeds")
    if tokens is None:
        return None
    ids = inputs.get("mm_token_type_ids")
    if ids is None:
        ids = torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        if input_ids is not None:
            for number, name in enumerate(MODALITIES[1:num_modalities], start=1):
                placeholder = getattr(model.config, f"{name}_token_id", None)
                if placeholder is None:
                    placeholder = getattr(model.config, f"{name}_token_index", None)
                if placeholder is not None:
                    ids = ids.masked_fill(input_ids == placeholder, number)
    mask = padding_mask(inputs.get("attention_mask"), inputs.get("position_ids"), ids.shape)
    is_real = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else (mask != 0).to(ids)
    return torch.zeros(num_modalities, dtype=torch.long, device=ids.device).index_add(
        0, ids.flatten().long(), is_real.flatten().long()
    )


def peak_memory(device: torch.device) -> float | None:
    """
    Measures the largest memory that this process has used so far.

    Args:
        device (`torch.device`):
            Device of the training.

    Returns:
        `float`, *optional*: On CUDA, the largest memory that tensors occupied on the device, in GiB. On other devices,
        the largest resident memory of the process; `None` if the system does not report it (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def largest_peak_memory(device: torch.device) -> float | None:
    """
    Returns [`peak_memory`] of the process that uses most. All processes must call this function.

    Args:
        device (`torch.device`):
            Device of the training.

    Returns:
        `float`, *optional*: Memory in GiB.
    """
    peak = peak_memory(device)
    if peak is None or not is_one_of_several_processes():
        return peak
    largest = torch.tensor(peak, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest.item()
