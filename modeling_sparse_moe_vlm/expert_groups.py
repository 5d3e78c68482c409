"""Expert groups: the arrangement of the experts of a layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from .checks import (
    MAX_EXPERTS,
    MAX_GROUPS,
    MAX_MODALITIES,
    MAX_WIDTH,
    check,
    check_boolean,
    check_distinct,
    check_integer,
    check_layers,
    check_sequence,
)

# The modalities in the order of their ids in Transformers (`ProcessorMixin.create_mm_token_type_ids`).
BUILTIN_MODALITIES = ("text", "image", "video", "audio")
ARRANGEMENTS = ("hybrid", "joint", "isolated")


def served_as(modality: str, modalities: Sequence[str]) -> int:
    """
    Returns the id of the modality that determines how the tokens of a modality are routed.

    Args:
        modality (`str`):
            Name of the modality.
        modalities (`Sequence[str]`):
            The `modalities` of the configuration.

    Returns:
        `int`: The position of the modality in `modalities`. If it is not listed, video is routed as images, and other
        modalities are routed as text.
    """
    if modality not in modalities:
        modality = "image" if modality == "video" and "image" in modalities else "text"
    return list(modalities).index(modality)


@dataclass(frozen=True)
class ExpertGroup:
    """
    A group of experts of the sparse layers. The group determines which modalities its experts serve, and can be frozen,
    adapted with LoRA and placed on a device separately.

    Args:
        name (`str`):
            Name of the group, which is also the name of its module: a Python identifier that is unique in the model.
        num_experts (`int`):
            Number of experts in the group.
        modalities (`tuple[str, ...]`):
            The modalities whose tokens the group serves. In a configuration, defaults to all modalities.
        intermediate_size (`int`):
            Intermediate size of each expert. In a configuration, defaults to `moe_intermediate_size`.
        always_on (`bool`, *optional*, defaults to `False`):
            Whether every token of the served modalities uses all experts of the group with weight 1 ("shared experts"),
            instead of the experts that the router chooses.
        layers (`tuple[int, ...]`, *optional*):
            The layers that contain the group. All sparse layers by default.
    """

    name: str
    num_experts: int
    modalities: tuple[str, ...]
    intermediate_size: int
    always_on: bool = False
    layers: tuple[int, ...] | None = None

    def serves(self, modality: str) -> bool:
        """Returns whether the group serves the tokens of a modality."""
        return modality in self.modalities

    @classmethod
    def from_dict(cls, group: dict[str, Any]) -> ExpertGroup:
        """Creates a group from a complete entry of `expert_groups` in a configuration."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in group.items()
        }
        return cls(**values)


def resolve_groups(
    groups: str | list[dict[str, Any]],
    *,
    modalities: list[str],
    num_experts: int | None,
    intermediate_size: int,
    num_hidden_layers: int,
) -> list[dict[str, Any]]:
    """
    Converts the `expert_groups` of a configuration to a list of groups with all keys.

    Args:
        groups (`str` or `list[dict]`):
            Name of an arrangement, or groups with the keys of [`ExpertGroup`], of which `name` and `num_experts` are
            required.
        modalities (`list[str]`):
            The modalities of the model, which a group serves by default.
        num_experts (`int`, *optional*, defaults to 8):
            Number of routed experts of a layer, for a named arrangement.
        intermediate_size (`int`):
            Default intermediate size of an expert.
        num_hidden_layers (`int`):
            Number of layers of the model.

    Returns:
        `list[dict]`: The groups.

    Raises:
        ValueError: If a group is invalid. The message names the group and the fix.
    """
    if isinstance(groups, str):
        groups = _arrange(groups, modalities, 8 if num_experts is None else num_experts)
    check_sequence("expert_groups", groups, dict, at_most=MAX_GROUPS)
    groups = [_complete(group, modalities, intermediate_size, num_hidden_layers) for group in groups]
    check_distinct("expert_groups", [group["name"] for group in groups])
    return groups


def _arrange(arrangement: str, modalities: list[str], num_experts: int) -> list[dict[str, Any]]:
    """Returns the groups of a named arrangement."""
    check(
        arrangement in ARRANGEMENTS,
        f"`expert_groups` must be one of {', '.join(ARRANGEMENTS)}, or a list of groups, got {arrangement!r}.",
    )
    check_integer("num_experts", num_experts, at_most=MAX_EXPERTS)
    if arrangement == "isolated":
        share, rest = divmod(num_experts, len(modalities))
        check(
            rest == 0,
            f'`expert_groups="isolated"` splits `num_experts` ({num_experts}) evenly over {len(modalities)} '
            "modalities: choose a multiple, or pass the groups as a list.",
        )
        return [{"name": name, "num_experts": share, "modalities": [name]} for name in modalities]
    groups: list[dict[str, Any]] = [{"name": "joint", "num_experts": num_experts}]
    if arrangement == "hybrid":
        groups += [{"name": name, "num_experts": 1, "modalities": [name], "always_on": True} for name in modalities]
    return groups


def _complete(
    group: dict[str, Any], modalities: list[str], intermediate_size: int, num_hidden_layers: int
) -> dict[str, Any]:
    """Checks a group and returns it with all keys."""
    keys = [field.name for field in fields(ExpertGroup)]
    unknown = sorted(set(group) - set(keys))
    check(not unknown, f"`expert_groups` has unknown keys {unknown}; known ones are {keys}.")
    missing = sorted({"name", "num_experts"} - set(group))
    check(not missing, f"`expert_groups` entry {group!r} lacks {missing}.")
    defaults: dict[str, Any] = {
        "modalities": modalities,
        "intermediate_size": intermediate_size,
        "always_on": False,
        "layers": None,
    }
    group = defaults | group
    name = group["name"]
    # Names become module names. In checkpoints, they appear next to the numbers and projections of the experts.
    check(
        isinstance(name, str)
        and re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None
        and not name.endswith("proj")
        and not hasattr(nn.ModuleDict(), name),
        f"group name {name!r} in `expert_groups` must be lower-case letters, digits and underscores only, must start "
        'with a letter, must not end in "proj" and must not be an attribute of `torch.nn.ModuleDict`.',
    )
    field = f"expert_groups[{name!r}]"
    check_integer(f"{field}.num_experts", group["num_experts"], at_most=MAX_EXPERTS)
    check_integer(f"{field}.intermediate_size", group["intermediate_size"], at_most=MAX_WIDTH)
    check_boolean(f"{field}.always_on", group["always_on"])
    check_sequence(f"{field}.modalities", group["modalities"], str, at_most=MAX_MODALITIES)
    unknown = sorted(set(group["modalities"]) - set(modalities))
    check(
        not unknown and len(group["modalities"]) > 0,
        f"`{field}.modalities` is {group['modalities']}, but must name some of the `modalities` {modalities}.",
    )
    check_distinct(f"{field}.modalities", group["modalities"])
    if group["layers"] is not None:
        check_layers(f"{field}.layers", group["layers"], num_hidden_layers)
    # Tuples are converted to lists for JSON. The lists are copied, so that configurations do not share them.
    return {key: list(group[key]) if isinstance(group[key], list | tuple) else group[key] for key in keys}
