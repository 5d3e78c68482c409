"""Modules that train in full beside adapters."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ...checks import check
from ..expert_modules import base_model_of
from ..training.model_parts import model_parts


def connector_modules(model: PreTrainedModel) -> list[str]:
    """
    Returns the names of the modules of the connector, for `modules_to_save` of PEFT.

    Args:
        model (`PreTrainedModel`):
            A vision-language model. It can have adapters.

    Returns:
        `list[str]`: Names of the largest modules that contain only parameters of the connector (see
        [`~toolbox.training.model_parts`]) and have a forward pass, so no lists of modules.

    Raises:
        ValueError: If the model has no connector, or if a parameter of the connector is in no module of the connector.
    """
    model = base_model_of(model)
    of_connector = set(model_parts(model).get("connector", {}))
    check(bool(of_connector), f"`connector=True`: {type(model).__name__} has no connector.")
    names: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
        is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)  # PEFT cannot replace these
        if own and own <= of_connector and not is_list and not any(name.startswith(f"{other}.") for other in names):
            names.append(name)
    left = [parameter for parameter in of_connector if not parameter.startswith(tuple(f"{name}." for name in names))]
    check(
        not left,
        f"`connector=True`: {sorted(left)} of the connector cannot train in full, because their module also has other "
        "parameters.",
    )
    return names
