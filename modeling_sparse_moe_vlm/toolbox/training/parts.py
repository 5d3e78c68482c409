"""Freezes parts of a model, or gives them a learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.training_args import OptimizerNames

from ...checks import check
from ..expert_modules import our_experts_config
from .model_parts import OTHERS, PARTS, model_parts

FREEZE, TRAIN = "freeze", "train"
# What wrappers such as `DistributedDataParallel`, `torch.compile` and activation checkpointing add to names.
WRAPPERS = re.compile(r"^module\.|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

Setting = float | str


class PartsOptimizer:
    """
    A factory of optimizers with a learning rate for each part of a model. `Trainer` calls it if the factory is the
    first element of its argument `optimizer_cls_and_kwargs`. Make this argument with [`train_parts`].
    """

    def __call__(
        self,
        model: nn.Module,
        optimizer_class: type[torch.optim.Optimizer],
        options: Mapping[str, Any],
        weight_decay: float,
        learning_rates: Mapping[str, float],
    ) -> torch.optim.Optimizer:
        """
        Creates the optimizer. As in `Trainer`, biases and norms have no weight decay. There is a group for each
        learning rate with weight decay and one without, the default learning rate first.

        Args:
            model (`nn.Module`):
                The model, which may be wrapped or sharded.
            optimizer_class (`type[torch.optim.Optimizer]`):
                Class of the optimizer.
            options (`Mapping[str, Any]`):
                Arguments of the class, among them the default learning rate `lr`.
            weight_decay (`float`):
                Weight decay.
            learning_rates (`Mapping[str, float]`):
                Learning rate of every parameter, by its name in the model without wrappers.

        Returns:
            `torch.optim.Optimizer`: The optimizer of all parameters that are not frozen.

        Raises:
            ValueError: If a parameter was not in the model when [`train_parts`] was called.
        """
        with_decay = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
        rates = dict.fromkeys([options["lr"], *learning_rates.values()])
        # Parameters on different device meshes (as with expert parallelism) cannot be in one group.
        groups: dict[tuple[float, bool], dict[Any, list[nn.Parameter]]] = {
            (rate, decays): {} for rate in rates for decays in (True, False)
        }
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            own = WRAPPERS.sub("", name)
            check(
                own in learning_rates,
                f"the parameter {own!r} was not in the model when `train_parts` was called. Call it after everything "
                "that changes the model, such as `get_peft_model`.",
            )
            meshes = groups[learning_rates[own], name in with_decay]
            meshes.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        return optimizer_class(
            [
                {"params": parameters, "lr": rate, "weight_decay": weight_decay if decays else 0.0}
                for (rate, decays), meshes in groups.items()
                for parameters in meshes.values()
            ],
            **options,
        )


def train_parts(
    model: PreTrainedModel, parts: Mapping[str, Any], arguments: TrainingArguments
) -> tuple[type[PartsOptimizer], dict[str, Any]] | None:
    """
    Freezes parts of a model, or gives them a learning rate. Pass the result to `Trainer`, or to any trainer based on
    it, as `optimizer_cls_and_kwargs`. [`~toolbox.training.model_parts`] returns the parts of a model.

    ```python
    parts = {"vision_encoder": "freeze", "connector": 1e-3, "experts": {"image": 1e-4, "text": "freeze"}}
    trainer = Trainer(model, arguments, ..., optimizer_cls_and_kwargs=train_parts(model, parts, arguments))
    ```

    The learning rate scheduler scales all learning rates alike. Routers that are frozen keep their biases.

    Args:
        model (`PreTrainedModel`):
            A model of this package, an upcycled model or any other Transformers model. Add adapters before.
        parts (`Mapping[str, Any]`):
            For each part `"freeze"`, a learning rate, or `"train"` for the learning rate of the arguments. The names
            are `"vision_encoder"`, `"connector"`, `"embeddings"`, `"attention"`, `"experts"`, `"routers"` and `"rest"`:
            everything that no other entry names. Parts without an entry train. Instead of one value, `"experts"` can
            have a mapping with the names of expert groups or modalities. A modality stands for the groups that serve
            only this modality.
        arguments (`TrainingArguments`):
            Arguments of the training, with the default learning rate, the optimizer and the weight decay.

    Returns:
        `tuple[type[PartsOptimizer], dict[str, Any]]`: The factory of the optimizer and its arguments, or `None` if no
        part has its own learning rate. `Trainer` then creates its usual optimizer.

    Raises:
        ValueError: If a part is unknown or the model does not have it, if a value is invalid, if a part that should
            train is frozen already, if nothing would train, or if the optimizer cannot have several learning rates.
    """
    by_part = model_parts(model)
    settings = _settings(model, check_parts(parts), by_part)
    frozen = [parameter for part, own in by_part.items() if settings[part] == FREEZE for parameter in own.values()]
    check(
        any(p.requires_grad for part, own in by_part.items() if settings[part] != FREEZE for p in own.values()),
        "nothing would train: `parts` freezes all parameters that were not frozen already.",
    )
    optimizer = None
    if any(isinstance(setting, float) for setting in settings.values()):
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        check(
            not is_optimizer_factory(optimizer_class) and not {"params", "model", "optimizer_dict"} & options.keys(),
            f"the optimizer {OptimizerNames(arguments.optim).value!r} groups the parameters itself, so `parts` cannot "
            "have learning rates: set `optim` to another one, such as 'adamw_torch', or only freeze parts.",
        )
        rates = {part: setting if isinstance(setting, float) else options["lr"] for part, setting in settings.items()}
        optimizer = {
            "optimizer_class": optimizer_class,
            "options": options,
            "weight_decay": arguments.weight_decay,
            "learning_rates": {name: rates[part] for part, names in by_part.items() for name in names},
        }
    for parameter in frozen:
        parameter.requires_grad_(False)
    return None if optimizer is None else (PartsOptimizer, optimizer)


def check_parts(parts: Any) -> dict[str, Any]:
    """
    Checks the names and values of `parts`, without a model.

    Args:
        parts (`Any`):
            As in [`train_parts`]. Numbers may be strings, as `1e-3` is in YAML.

    Returns:
        `dict[str, Any]`: The same, with learning rates as `float`.

    Raises:
        ValueError: If a name is unknown or a value is invalid.
    """
    check(isinstance(parts, Mapping), f"`parts` must be a mapping such as {{'connector': 0.001}}, but got {parts!r}.")
    unknown = [name for name in parts if name not in PARTS]
    check(not unknown, f"`parts` has unknown names {unknown}; the parts are {', '.join(PARTS)}.")
    return {
        name: {key: _setting(own, f"parts.{name}.{key}") for key, own in value.items()}
        if name == "experts" and isinstance(value, Mapping)
        else _setting(value, f"parts.{name}")
        for name, value in parts.items()
    }


def describe_parts(model: PreTrainedModel, parts: Mapping[str, Any], learning_rate: float) -> str:
    """
    Describes what trains.

    Args:
        model (`PreTrainedModel`):
            The model, after [`train_parts`].
        parts (`Mapping[str, Any]`):
            As in [`train_parts`].
        learning_rate (`float`):
            Learning rate of the arguments of the training.

    Returns:
        `str`: A table with a line for each part of the model: the number of its parameters, how many of them train, and
        their learning rate.
    """
    by_part = model_parts(model)
    settings = _settings(model, check_parts(parts), by_part)
    lines = [("part", "parameters", "train", "learning rate")]
    total = trained = 0
    for part, parameters in by_part.items():
        size = sum(parameter.numel() for parameter in parameters.values())
        own = sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
        rate = settings[part] if isinstance(settings[part], float) else learning_rate
        lines.append((part, f"{size:,}", f"{own:,}", f"{rate:g}" if own else "frozen"))
        total, trained = total + size, trained + own
    lines.append(("all", f"{total:,}", f"{trained:,}", ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{part:<{widths[0]}}  {size:>{widths[1]}}  {own:>{widths[2]}}  {rate}".rstrip()
        for part, size, own, rate in lines
    )


def _setting(value: Any, name: str) -> Setting:
    """Returns a checked value of a part."""
    if value in (FREEZE, TRAIN):
        return value
    try:
        rate = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        rate = math.nan
    check(
        0 < rate < math.inf,
        f"`{name}` must be 'freeze', 'train' or a learning rate above 0, but got {value!r}.",
    )
    return rate


def _settings(
    model: PreTrainedModel, parts: Mapping[str, Any], by_part: Mapping[str, Mapping[str, nn.Parameter]]
) -> dict[str, Setting]:
    """Returns the value of every part of a model, where every expert group is a part."""
    settings: dict[str, Setting] = {}
    has_adapters = hasattr(model, "peft_config")
    for name, value in parts.items():
        if name == OTHERS:
            continue
        wanted: dict[str, tuple[list[str], Setting]] = {}  # parts and value of each entry
        if isinstance(value, Mapping):
            wanted = {
                f"{name}.{key}": ([f"experts.{group}" for group in _groups(model, key)], value[key]) for key in value
            }
        else:
            wanted[name] = ([part for part in by_part if part.partition(".")[0] == name], value)
        for entry, (own, setting) in wanted.items():
            check(
                bool(own) and by_part.keys() >= set(own),
                f"`parts.{entry}`: this model has no such part. It has {', '.join(by_part)}.",
            )
            twice = [part for part in own if part in settings]
            check(
                not twice, f"`parts.{entry}` sets {', '.join(twice)}, which another entry of `parts.experts` also sets."
            )
            check(
                setting == FREEZE
                or any(parameter.requires_grad for part in own for parameter in by_part[part].values()),
                f"`parts.{entry}` is {setting!r}, but all its parameters are frozen already."
                + (" In a model with adapters, only parts that have adapters train." if has_adapters else "")
                + (
                    " `lora.connector=true` trains the connector in full."
                    if has_adapters and name == "connector"
                    else ""
                ),
            )
            settings |= dict.fromkeys(own, setting)
    return {part: settings.get(part, parts.get(OTHERS, TRAIN)) for part in by_part}


def _groups(model: PreTrainedModel, key: str) -> list[str]:
    """Returns the names of the expert groups that a key of `parts.experts` stands for."""
    config = our_experts_config(model.config)
    check(
        config is not None,
        f"`parts.experts.{key}`: the experts of this model have no groups. Give `parts.experts` a single value.",
    )
    serves = {group["name"]: group["modalities"] for group in config.expert_groups}
    groups = [key] if key in serves else [group for group, modalities in serves.items() if modalities == [key]]
    check(
        bool(groups),
        f"`parts.experts.{key}` must be the name of an expert group or a modality that has its own groups. The groups "
        f"and their modalities are {serves}.",
    )
    return groups
