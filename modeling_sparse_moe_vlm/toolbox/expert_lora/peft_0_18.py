"""
Adapters of experts that PEFT wrote before 0.19: recognised, and brought into today's layout.

Of a stack of E experts of shape `(E, out, in)`, both write `lora_A` with the expert slowest and `lora_B` with the
expert fastest. Until 0.19 PEFT took the outputs for inputs::

    before: lora_A (E·r, out), lora_B (in, r·E), update[e, o, i] = scaling · Σᵣ lora_A[e, r, o] · lora_B[i, r, e]
    since:  lora_A (E·r, in), lora_B (out, r·E), update[e, o, i] = scaling · Σᵣ lora_B[o, r, e] · lora_A[e, r, i]

Stacks of shape `(E, in, out)` (`is_transposed`) are the same in both.
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
    Converts a folder with an adapter of experts that PEFT wrote before 0.19 into today's layout: the merged weights are
    the same. Adapters of other modules within it are copied.

    Args:
        source (`str` or `os.PathLike`): The folder with `adapter_config.json` and the weights.
        target (`str` or `os.PathLike`): Another folder, for the result.
        model (`nn.Module`): The model that the adapter is for.

    Raises:
        ValueError:
            If the adapter is in today's layout, has no adapters of experts, does not fit the model, or does not tell in
            which layout it is: its stacks are square, and no version of PEFT is named.
    """
    source, target = Path(source), Path(target)
    check(source.resolve() != target.resolve(), f"the result must go to another folder than {str(source)!r}.")
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
    Whether an adapter has the layout of PEFT before 0.19. Shapes tell; where stacks are square, the version.

    Args:
        config (`Mapping[str, Any]`): The content of `adapter_config.json`.
        weights (`Mapping[str, torch.Tensor]`): The tensors, by their names on disk.
        model (`nn.Module`): The model that the adapter is for.

    Raises:
        ValueError: If the adapter does not fit the model, or if neither shapes nor version tell.
    """
    layouts = set()
    adapted = list(_adapted_stacks(model, config, weights))
    for prefix, (num_experts, outputs, inputs) in adapted:
        a, b = weights[f"{prefix}.lora_A.weight"], weights[f"{prefix}.lora_B.weight"]
        sides = a.shape[1], b.shape[0]
        fits_old, fits_new = sides == (outputs, inputs), sides == (inputs, outputs)
        check(
            (fits_old or fits_new) and a.shape[0] == b.shape[1] and a.shape[0] % num_experts == 0,
            f"{prefix!r} has factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, which fit no stack of shape "
            f"({num_experts}, {outputs}, {inputs}): the adapter is of another model.",
        )
        if fits_old != fits_new:
            layouts.add(fits_old)
    check(len(layouts) < 2, "some experts' factors have today's layout, and some that of PEFT before 0.19.")
    if layouts:
        return layouts.pop()
    if not adapted:
        return False
    version = config.get("peft_version") or ""
    check(
        bool(version),
        "the experts are square and the adapter names no `peft_version`, so that inputs and outputs of its factors "
        "cannot be told apart: write the version of PEFT that trained it into its `adapter_config.json`.",
    )
    return is_old_version(version)


def read_adapter(path: str | os.PathLike, model: nn.Module, **hub_options: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """
    Reads an adapter of today's layout.

    Args:
        path (`str` or `os.PathLike`): The adapter's folder, or its name on the Hub.
        model (`nn.Module`): The model that it is for.
        **hub_options: `revision`, `token`, `cache_dir`.

    Returns:
        `tuple[Path, dict[str, torch.Tensor]]`: its folder, and its tensors by their names on disk.

    Raises:
        OSError: If a file is missing or damaged.
        ValueError: If the adapter has the layout of PEFT before 0.19, does not fit the model, or is not a LoRA adapter.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path), allow_patterns="adapter_*", **hub_options))
    # Not by `PeftConfig`, which takes an adapter that names no version for one of the version at hand.
    config, weights = read_adapter_files(folder)
    check(not is_old(config, weights, model), misread(str(path), config.get("peft_version") or "before 0.18"))
    return folder, weights


def misread(name: str, version: str) -> str:
    """What is wrong with an adapter of experts that PEFT wrote before 0.19, and what to do."""
    return (
        f"the adapter {name!r} was saved by PEFT {version}, which took the inputs of experts for outputs, so that it "
        "would be misread: convert its folder with `upgrade_expert_adapter`, and load the result."
    )


def is_old_version(version: str) -> bool:
    """Whether it is a version of PEFT that took the outputs of experts for inputs."""
    # Of a version under development PEFT names the commit, too: "0.19.0.dev0@…".
    return Version(version.partition("@")[0]) < ORIENTED_SINCE


def _adapted_stacks(
    model: nn.Module, config: Mapping[str, Any], weights: Iterable[str]
) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """The adapted stacks of shape `(E, out, in)`: before which names on disk, and the shape."""
    targets = config.get("target_parameters") or []
    modules: dict[str, list[Any]] = {}  # one, or its shards
    for module_name, module in experts_modules(model).items():
        if not module.is_transposed:
            modules.setdefault(name_without_shard(name_without_adapters(module_name)), []).append(module)
    for module_name, parts in modules.items():
        adapted = [
            name
            for name, _ in parts[0].named_parameters(recurse=False)
            if any(f".{module_name}.{name}".endswith(f".{target}") for target in targets)
        ]
        # The last one is outermost.
        for depth, name in enumerate(reversed(adapted)):
            prefix = f"base_model.model.{module_name}{'.base_layer' * depth}"
            stacks = [getattr(part, name) for part in parts]
            if stacks[0].dim() == 3 and f"{prefix}.lora_A.weight" in weights:
                yield prefix, (sum(stack.shape[0] for stack in stacks), *stacks[0].shape[1:])
