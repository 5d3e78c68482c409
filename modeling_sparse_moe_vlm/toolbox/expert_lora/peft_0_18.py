"""
Recognition and conversion of adapters of experts that were saved by PEFT before 0.19.

PEFT before 0.19 swapped the inputs and the outputs of a stack of E experts of shape `(E, out, in)`. In both layouts,
the expert is the slow index of `lora_A` and the fast index of `lora_B`:

```
before 0.19: lora_A (E·r, out), lora_B (in, r·E), update[e, o, i] = scaling · Σᵣ lora_A[e, r, o] · lora_B[i, r, e]
since 0.19:  lora_A (E·r, in), lora_B (out, r·E), update[e, o, i] = scaling · Σᵣ lora_B[o, r, e] · lora_A[e, r, i]
```

For stacks of shape `(E, in, out)` (`is_transposed`), both layouts are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import snapshot_download
from packaging.version import Version
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ...checks import check
from ..expert_modules import experts_modules, name_without_adapters, name_without_shard
from .adapter_files import read_adapter_files

ORIENTED_SINCE = Version("0.19.0")


def upgrade_expert_adapter(source: str | os.PathLike, target: str | os.PathLike, model: nn.Module) -> None:
    """
    Converts an adapter of experts that was saved by PEFT before 0.19 into today's layout. The update of the weights
    stays the same. Adapters of other modules in the same folder are copied.

    Args:
        source (`str` or `os.PathLike`):
            Folder with `adapter_config.json` and the weights.
        target (`str` or `os.PathLike`):
            Folder to write the converted adapter to. It must differ from `source`.
        model (`nn.Module`):
            Model that the adapter belongs to.

    Raises:
        OSError: If a file of the adapter is missing or damaged. The message names the file.
        ValueError: If `target` is the same folder as `source`, if the adapter already has today's layout or contains no
            adapters of experts, if it is not a LoRA adapter or does not fit the model, or if the layout is unknown (the
            matrices of the experts are square, and the configuration has no `peft_version`).
    """
    source, target = Path(source), Path(target)
    check(source.resolve() != target.resolve(), f"the result must be written to another folder than {str(source)!r}.")
    config, weights = read_adapter_files(source)
    check(
        is_old(config, weights, model),
        f"the adapter in {str(source)!r} has today's layout, so there is nothing to convert.",
    )
    for prefix, (num_experts, *_) in _adapted_stacks(model, config, weights):
        key_a, key_b = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
        old_a, old_b = weights[key_a], weights[key_b]
        weights[key_a] = old_b.view(old_b.shape[0], -1, num_experts).permute(2, 1, 0).reshape(-1, old_b.shape[0])
        weights[key_b] = old_a.view(num_experts, -1, old_a.shape[1]).permute(2, 1, 0).reshape(old_a.shape[1], -1)
    target.mkdir(parents=True, exist_ok=True)
    save_file({key: weight.contiguous() for key, weight in weights.items()}, target / SAFETENSORS_WEIGHTS_NAME)
    (target / CONFIG_NAME).write_text(json.dumps(config | {"peft_version": peft.__version__}, indent=2))


def is_old(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], model: nn.Module) -> bool:
    """
    Whether an adapter has the layout of PEFT before 0.19. The shapes of the factors decide. If all matrices are square,
    the version of PEFT in the configuration decides.

    Args:
        config (`Mapping[str, Any]`):
            Content of `adapter_config.json`.
        weights (`Mapping[str, torch.Tensor]`):
            Tensors of the adapter, by their names on disk.
        model (`nn.Module`):
            Model that the adapter belongs to.

    Returns:
        `bool`: `False` also if no stack of shape `(E, out, in)` has an adapter.

    Raises:
        ValueError: If the adapter does not fit the model, or if the layout is unknown.
    """
    layouts = set()
    adapted = list(_adapted_stacks(model, config, weights))
    for prefix, (num_experts, outputs, inputs) in adapted:
        a, b = weights[f"{prefix}.lora_A.weight"], weights[f"{prefix}.lora_B.weight"]
        sides = a.shape[1], b.shape[0]
        fits_old, fits_new = sides == (outputs, inputs), sides == (inputs, outputs)
        check(
            (fits_old or fits_new) and a.shape[0] == b.shape[1] and a.shape[0] % num_experts == 0,
            f"{prefix!r} has factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, which do not fit a "
            f"stack of shape ({num_experts}, {outputs}, {inputs}): the adapter belongs to another model.",
        )
        if fits_old != fits_new:
            layouts.add(fits_old)
    check(
        len(layouts) < 2,
        "the factors of some experts have today's layout, and those of others the layout of PEFT before 0.19: train or "
        "download the adapter again.",
    )
    if layouts:
        return layouts.pop()
    if not adapted:
        return False
    version = config.get("peft_version") or ""
    check(
        bool(version),
        "the matrices of the experts are square and the adapter names no `peft_version`, so that the inputs and "
        "outputs of its factors cannot be distinguished: write the version of PEFT that trained it to the field "
        "`peft_version` of its `adapter_config.json`.",
    )
    return is_old_version(version)


def read_adapter(path: str | os.PathLike, model: nn.Module, **hub_options: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """
    Reads an adapter in today's layout.

    Args:
        path (`str` or `os.PathLike`):
            Folder of the adapter, or its name on the Hub.
        model (`nn.Module`):
            Model that the adapter belongs to.
        hub_options:
            `revision`, `token` and `cache_dir` for an adapter on the Hub.

    Returns:
        `tuple[Path, dict[str, torch.Tensor]]`: The folder of the adapter, and its tensors, by their names on disk.

    Raises:
        OSError: If a file is missing or damaged.
        ValueError: If the adapter has the layout of PEFT before 0.19, does not fit the model, or is not a LoRA adapter.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path), allow_patterns="adapter_*", **hub_options))
    # `PeftConfig` is not used: it would set a missing `peft_version` to the installed version.
    config, weights = read_adapter_files(folder)
    check(not is_old(config, weights, model), misread(str(path), config.get("peft_version") or "before 0.18"))
    return folder, weights


def misread(name: str, version: str) -> str:
    """Returns the error message for an adapter of experts that was saved by PEFT before 0.19."""
    return (
        f"the adapter {name!r} was saved by PEFT {version}, which swapped the inputs and outputs of experts, so that "
        "it would be misread: convert its folder with `upgrade_expert_adapter`, and load the result."
    )


def is_old_version(version: str) -> bool:
    """Whether a version of PEFT swaps the inputs and outputs of experts."""
    # For a development version, PEFT also names the commit: "0.19.0.dev0@…".
    return Version(version.partition("@")[0]) < ORIENTED_SINCE


def _adapted_stacks(
    model: nn.Module, config: Mapping[str, Any], weights: Iterable[str]
) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Yields the adapted stacks of shape `(E, out, in)`: the prefix of their names on disk, and the shape."""
    targets = config.get("target_parameters") or []
    modules: dict[str, list[Any]] = {}  # by name: one module, or its shards
    for module_name, module in experts_modules(model).items():
        if not module.is_transposed:
            modules.setdefault(name_without_shard(name_without_adapters(module_name)), []).append(module)
    for module_name, parts in modules.items():
        adapted = [
            name
            for name, _ in parts[0].named_parameters(recurse=False)
            if any(f".{module_name}.{name}".endswith(f".{target}") for target in targets)
        ]
        # The layer of the last parameter is the outermost one.
        for depth, name in enumerate(reversed(adapted)):
            prefix = f"base_model.model.{module_name}{'.base_layer' * depth}"
            stacks = [getattr(part, name) for part in parts]
            if stacks[0].dim() == 3 and f"{prefix}.lora_A.weight" in weights:
                yield prefix, (sum(stack.shape[0] for stack in stacks), *stacks[0].shape[1:])
