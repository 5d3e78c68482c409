"""
Reading and checking of the two files of an adapter. PEFT itself replaces missing fields by defaults and ignores missing
weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights

from ...checkpoint_integrity import ADVICE, check_weights, refuse_pickles

# The two factors of an adapter. Neither is of use without the other.
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def read_adapter_files(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    Reads the files of a LoRA adapter.

    Args:
        folder (`Path`):
            Folder of the adapter.

    Returns:
        `tuple[dict[str, Any], dict[str, torch.Tensor]]`: The content of `adapter_config.json`, and the tensors, by
        their names on disk.

    Raises:
        OSError: If a file is missing, damaged or a pickle, or contains only one of the two factors of an adapter. The
            message names the file.
        ValueError: If a field of the configuration is missing or wrong, or if it is not a LoRA adapter.
    """
    config = _read_config(folder / CONFIG_NAME)
    path = folder / SAFETENSORS_WEIGHTS_NAME
    refuse_pickles(folder)  # PEFT also reads them
    check_weights([path])
    weights = load_peft_weights(str(folder), device="cpu")
    for name in weights:
        for factors in (*_PAIRS, *(pair[::-1] for pair in _PAIRS)):
            other = ".".join(factors[1] if part == factors[0] else part for part in name.split("."))
            if other not in weights:
                raise OSError(f"{path} has {name!r}, but lacks {other!r}: {ADVICE}")
    return config, weights


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError as error:
        raise OSError(f"{path} is missing: {ADVICE}") from error
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is damaged ({error}): {ADVICE}") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} must set `peft_type` to 'LORA', but it is {config.get('peft_type')!r}.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path} must set the rank `r` to a positive integer, but it is {rank!r}.")
    if type(alpha) not in (int, float):
        raise ValueError(f"{path} must set the scale `lora_alpha` to a number, but it is {alpha!r}.")
    if not (config.get("target_modules") or config.get("target_parameters")):
        raise ValueError(
            f"{path} must set `target_modules` or `target_parameters`, which say what the adapter adapts: {ADVICE}"
        )
    return config
