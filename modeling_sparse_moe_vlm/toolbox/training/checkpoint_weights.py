"""Loads the weights of a checkpoint into a model whose tensors have other names in checkpoints."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...checkpoint_integrity import read_index
from ...experts_host import ExpertsHost


def load_renamed(model: nn.Module, folder: str | Path) -> bool:
    """
    Loads the weights of a checkpoint into a model, if the model has other names for some of its tensors.

    `Trainer` passes the contents of a checkpoint to `load_state_dict` as they are. Transformers renames or fuses the
    tensors of many types when it loads or saves them (LLaVA, Gemma 3, Mixtral, …), so `Trainer` would load nothing
    and only log a warning. Models of this package convert state dicts themselves.

    Args:
        model (`nn.Module`):
            The model.
        folder (`str` or `Path`):
            Folder of the checkpoint.

    Returns:
        `bool`: Whether the weights were loaded. If not, `Trainer` can load them, or they are not in a single
        checkpoint (adapters, FSDP, tensor parallelism).
    """
    if not isinstance(model, PreTrainedModel) or isinstance(model, ExpertsHost):
        return False
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return False
    if _names_in(Path(folder)) <= set(model.state_dict()):
        return False
    dtypes = {parameter.dtype for parameter in model.parameters()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    saved = type(model).from_pretrained(str(folder), config=deepcopy(model.config), dtype=dtype)
    model.load_state_dict(saved.state_dict())
    return True


def _names_in(folder: Path) -> set[str]:
    """Returns the names of the tensors of a model in a folder. Other checkpoints have none."""
    if (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        return set(read_index(folder / SAFE_WEIGHTS_INDEX_NAME))
    if not (folder / SAFE_WEIGHTS_NAME).exists():
        return set()
    with safe_open(folder / SAFE_WEIGHTS_NAME, "pt") as file:
        return set(file.keys())
