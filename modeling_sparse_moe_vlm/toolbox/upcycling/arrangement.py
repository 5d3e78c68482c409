"""The experts' configuration for a request to `upcycle`, and the checks that the start is exact."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields as dataclass_fields
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ...checks import check_choice, check_integer, check_number
from ...expert_groups import ExpertGroup, resolve_groups
from ...experts_config import SparseMoeVlmExpertsConfig
from .errors import UpcyclingError

STARTS = ("copy", "split", "residual", "drop")
POOL_STARTS = ("first", "mean")
DROP_RATIO = 0.5  # the best one in the paper (arXiv 2502.19261)
# Exact starts of the named arrangements.
_DEFAULT_STARTS = {"hybrid": "residual", "joint": "copy", "isolated": "copy"}


class Start(NamedTuple):
    """The initial weights of experts, relative to the dense block of their layer.

    Args:
        name (`str`):
            - `"copy"`: every routed expert is the dense block.
            - `"split"`: every routed expert is one of `granularity` parts of the dense block.
            - `"residual"`: the always-on expert of each modality is the dense block, and the output of routed experts
              is zero.
            - `"drop"`: like `"copy"`, but a share of each expert's neurons is drawn again.
        granularity (`int`, defaults to 1):
            Number of parts that `"split"` cuts the dense block into.
        drop_ratio (`float`, defaults to 0.0):
            Share of the neurons that `"drop"` draws again.
        pool_start (`str`, *optional*):
            Dense block from which the experts of a pool start, except with `"residual"`: that of the pool's `"first"`
            layer, or the `"mean"` of the blocks of all its layers.
    """

    name: str
    granularity: int = 1
    drop_ratio: float = 0.0
    pool_start: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the sparse model computes what the dense model computes."""
        return self.drop_ratio == 0 and self.pool_start is None


class _Request(NamedTuple):
    """The arguments of [`experts_fields`] that several steps need."""

    arrangement: str | list[dict[str, Any]]
    num_experts: int | None
    modalities: list[str]
    widths: dict[int, int]  # of the dense block, by layer
    num_hidden_layers: int
    moe_intermediate_size: int | None
    granularity: int | None


def experts_fields(
    *,
    widths: Mapping[int, int],
    num_hidden_layers: int,
    hidden_size: int,
    hidden_act: str,
    modalities: Sequence[str],
    expert_groups: str | Sequence[Mapping[str, Any]] = "hybrid",
    num_experts: int | None = None,
    num_experts_per_tok: int = 2,
    start: str | None = None,
    granularity: int | None = None,
    drop_ratio: float | None = None,
    pool_start: str | None = None,
    **fields: Any,
) -> tuple[Start, dict[str, Any]]:
    r"""
    Returns the experts' configuration of a model that is upcycled.

    Args:
        widths (`Mapping[int, int]`):
            Width of the dense block of every layer that becomes sparse, by layer. The other layers stay dense. If the
            widths differ, groups without a width become one group for each width, with the width in the name
            (`"joint_2048"`).
        num_hidden_layers (`int`):
            Number of layers of the decoder, sparse and dense ones.
        hidden_size (`int`):
            Width of the residual stream.
        hidden_act (`str`):
            Activation of the dense blocks.
        modalities (`Sequence[str]`):
            Names of the modalities of the model, text first.
        expert_groups (`str` or `list[dict]`, defaults to `"hybrid"`):
            Name of an arrangement, or the groups, as in [`SparseMoeVlmExpertsConfig`]. If a group has no width, it
            follows from the dense block and the start.
        num_experts (`int`, *optional*, defaults to 8):
            Number of routed experts of a layer. With a list of groups, it follows from the groups.
        num_experts_per_tok (`int`, defaults to 2):
            Number of routed experts per token.
        start (`str`, *optional*):
            See [`Start`]. By default, an exact start: `"residual"` for `"hybrid"`, and for groups in which each
            modality has an always-on group that is wide enough for the dense block. Otherwise, `"split"` if there is a
            `granularity`, and `"copy"` if not.
        granularity (`int`, *optional*):
            Divisor of the width of routed experts: they are as wide as the dense block divided by it. With `"split"`,
            `num_experts` (of every routed group) and `num_experts_per_tok` count these smaller experts and must be
            multiples of `granularity`: E experts are E / granularity copies of the dense block, each cut into
            `granularity` parts. With `"split"`, it defaults to `num_experts_per_tok`, so that a token costs as much as
            in the dense model.
        drop_ratio (`float`, *optional*, defaults to 0.5):
            See [`Start`], for `"drop"`.
        pool_start (`str`, *optional*):
            See [`Start`]. With it, layers that share experts do not start exactly.
        fields:
            Further fields of [`SparseMoeVlmExpertsConfig`], such as `router`, `expert_pool` and `initializer_range`.

    Returns:
        `tuple[Start, dict[str, Any]]`: The start of the experts, and all fields of their configuration that follow from
        the request, with all keys of every group.

    Raises:
        UpcyclingError: If the fields contradict each other, or if the start would not be exact (except `"drop"`).
    """
    with _named_errors():
        _check_fields(fields)
        _check_options(start, granularity, drop_ratio, pool_start)
        check_integer("num_experts_per_tok", num_experts_per_tok)
        _check_widths(widths, num_hidden_layers)
        request = _Request(
            arrangement=expert_groups if isinstance(expert_groups, str) else [dict(group) for group in expert_groups],
            num_experts=num_experts,
            modalities=list(modalities),
            widths=dict(sorted(widths.items())),
            num_hidden_layers=num_hidden_layers,
            moe_intermediate_size=fields.pop("moe_intermediate_size", None),
            granularity=granularity,
        )
        name = _default_start(request) if start is None else start
        by_modality = fields.get("num_experts_per_tok_by_modality") or {}
        if name == "split" and granularity is None:
            request = request._replace(granularity=num_experts_per_tok)
        chosen = Start(
            name,
            granularity=(request.granularity or 1) if name == "split" else 1,
            drop_ratio=(DROP_RATIO if drop_ratio is None else drop_ratio) if name == "drop" else 0.0,
            pool_start=pool_start,
        )
        _check_start(chosen, request, fields, drop_ratio)
        slots = {modality: by_modality.get(modality, num_experts_per_tok) for modality in request.modalities}
        groups = _groups(chosen, request)
        _check_pools_fit(chosen, request, groups, fields.get("expert_pool"))
        complete = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "hidden_act": hidden_act,
            "modalities": request.modalities,
            "mlp_only_layers": [layer for layer in range(num_hidden_layers) if layer not in widths],
            "num_experts": num_experts,
            "num_experts_per_tok": num_experts_per_tok,
            "moe_intermediate_size": _routed_width(chosen, request, next(iter(request.widths.values()))),
            "expert_groups": groups,
            **fields,
        }
        config = SparseMoeVlmExpertsConfig(**complete)
        complete |= {"expert_groups": config.expert_groups, "num_experts": config.num_experts}
        _check_groups(chosen, request, config, slots)
        _check_pools(chosen, config)
        return chosen, complete


def dense_carriers(groups: Sequence[ExpertGroup], modalities: Sequence[str], width: int) -> list[str] | None:
    """
    Chooses the always-on groups of a layer that start as its dense block with the start `"residual"`, so that exactly
    one of them serves each modality.

    Args:
        groups (`Sequence[ExpertGroup]`):
            The groups of the layer; earlier ones are preferred.
        modalities (`Sequence[str]`):
            The modalities of the model.
        width (`int`):
            Width of the dense block. The experts of a group must have at least this total width.

    Returns:
        `list[str]`: Names of the groups; `None` if there is no such choice.
    """
    able = [group for group in groups if group.always_on and group.num_experts * group.intermediate_size >= width]

    def choose(left: list[str]) -> list[str] | None:
        if not left:
            return []
        for group in able:
            if group.serves(left[0]) and set(group.modalities) <= set(left):
                rest = choose([modality for modality in left if not group.serves(modality)])
                if rest is not None:
                    return [group.name, *rest]
        return None

    return choose(list(modalities))


@contextmanager
def _named_errors() -> Iterator[None]:
    """Raises the configuration's errors as `UpcyclingError`."""
    try:
        yield
    except UpcyclingError:
        raise
    except ValueError as error:
        raise UpcyclingError(str(error)) from error


# Fields of the experts' configuration that follow from the dense model.
OF_DENSE_MODEL = ("hidden_size", "num_hidden_layers", "hidden_act", "widths")


def check_not_of_dense_model(fields: Collection[str]) -> None:
    """Raises `UpcyclingError` for fields that follow from the dense model."""
    for field in OF_DENSE_MODEL:
        if field in fields:
            raise UpcyclingError(f"`{field}` is taken from the dense model and cannot be set: leave it out.")


def _check_fields(fields: Mapping[str, Any]) -> None:
    library = {field.name for field in dataclass_fields(PreTrainedConfig)}
    known = [field.name for field in dataclass_fields(SparseMoeVlmExpertsConfig) if field.name not in library]
    for field in fields:
        if field in ("decoder_sparse_step", "mlp_only_layers"):
            raise UpcyclingError(f"`{field}` is derived from the layers that are upcycled: choose them with `layers`.")
        if field not in known:
            close = difflib.get_close_matches(field, known, n=1)
            raise UpcyclingError(
                f"`{field}` is not a field of the experts' configuration"
                + (f": did you mean `{close[0]}`?" if close else f", which has {known}.")
            )


def _check_options(start: Any, granularity: Any, drop_ratio: Any, pool_start: Any) -> None:
    if start is not None:
        check_choice("start", start, STARTS)
    if granularity is not None:
        check_integer("granularity", granularity)
    if drop_ratio is not None:
        check_number("drop_ratio", drop_ratio, at_most=1)
    if pool_start is not None:
        check_choice("pool_start", pool_start, POOL_STARTS)


def _check_widths(widths: Mapping[int, int], num_hidden_layers: int) -> None:
    if not widths:
        raise UpcyclingError("no layer would become sparse: choose at least one with `layers`.")
    for layer, width in widths.items():
        check_integer("layers", layer, at_least=0, below=num_hidden_layers)
        check_integer(f"widths[{layer}]", width)


def _default_start(request: _Request) -> str:
    if isinstance(request.arrangement, str):
        # Unknown names are refused when the groups are resolved.
        name = _DEFAULT_STARTS.get(request.arrangement, "copy")
    else:
        groups = [ExpertGroup.from_dict(group) for group in _groups(Start("residual"), request)]
        can_hold = all(
            dense_carriers(_of_layer(groups, layer), request.modalities, width) is not None
            for layer, width in request.widths.items()
        )
        name = "residual" if can_hold else "copy"
    return "split" if name == "copy" and (request.granularity or 1) > 1 else name


def _of_layer(groups: Sequence[ExpertGroup], layer: int) -> list[ExpertGroup]:
    return [group for group in groups if group.layers is None or layer in group.layers]


def _routed_width(start: Start, request: _Request, width: int) -> int:
    """Returns the width of routed experts whose group has no width, for a dense block of a given width."""
    if start.name == "residual" and request.moe_intermediate_size is not None:
        return request.moe_intermediate_size
    return width // (request.granularity or 1)


def _groups(start: Start, request: _Request) -> list[dict[str, Any]]:
    """Returns the groups with all keys, one for each width that a group needs."""
    arrangement = request.arrangement
    resolved = resolve_groups(
        arrangement,
        modalities=request.modalities,
        num_experts=request.num_experts,
        intermediate_size=1,
        num_hidden_layers=request.num_hidden_layers,
    )
    given = [] if isinstance(arrangement, str) else [g["name"] for g in arrangement if "intermediate_size" in g]
    groups = []
    for group in resolved:
        layers = [layer for layer in request.widths if group["layers"] is None or layer in group["layers"]]
        if group["name"] in given or not layers:  # the configuration refuses groups that only have dense layers
            groups.append(group)
            continue
        layers_by_width: dict[int, list[int]] = {}
        for layer in layers:
            width = request.widths[layer]
            if not (group["always_on"] and start.name == "residual"):
                width = _routed_width(start, request, width)
            layers_by_width.setdefault(width, []).append(layer)
        for width, its_layers in layers_by_width.items():
            sized = group | {"intermediate_size": width}
            if len(layers_by_width) > 1:
                sized |= {"name": f"{group['name']}_{width}", "layers": its_layers}
            groups.append(sized)
    return groups


def _check_start(start: Start, request: _Request, fields: Mapping[str, Any], drop_ratio: float | None) -> None:
    """Raises `UpcyclingError` if the start and the fields do not fit each other."""
    name = start.name
    if drop_ratio is not None and name != "drop":
        raise UpcyclingError(f'`drop_ratio` is for `start="drop"`, but the start is "{name}": leave it out.')
    if name in ("copy", "drop") and (request.granularity or 1) > 1:
        raise UpcyclingError(
            f'`start="{name}"` makes experts as wide as the dense block, so it cannot be combined with '
            f'`granularity` {request.granularity}: use `start="split"`, or `start="residual"`.'
        )
    if name == "residual" and request.granularity is not None and request.moe_intermediate_size is not None:
        raise UpcyclingError(
            "`granularity` and `moe_intermediate_size` both set the width of routed experts: give one of them."
        )
    for layer, width in request.widths.items():
        if width % (request.granularity or 1):
            raise UpcyclingError(
                f"`granularity` {request.granularity} does not divide the width {width} of layer {layer}'s dense "
                "block: choose a divisor of it."
            )
        needed = _routed_width(start, request, width)
        if request.moe_intermediate_size not in (None, needed):
            raise UpcyclingError(
                f'`moe_intermediate_size` is {request.moe_intermediate_size}, but with `start="{name}"` experts of '
                f'layer {layer} are {needed} wide: leave it out, set `granularity`, or use `start="residual"`.'
            )
    if name == "residual":
        return
    if not fields.get("norm_topk_prob", True):
        raise UpcyclingError(
            f'`start="{name}"` needs weights of the chosen experts that sum to 1, otherwise they would scale the '
            'output of the dense block: leave `norm_topk_prob` True, or use `start="residual"`.'
        )
    if name == "split" and fields.get("router") == "top_p":
        raise UpcyclingError(
            '`router="top_p"` may choose only some parts of a dense block, so it cannot be combined with '
            '`start="split"`: use another router, `start="copy"` or `start="residual"`.'
        )
    if fields.get("expert_capacity_factor") is not None:
        raise UpcyclingError(
            f'`expert_capacity_factor` drops tokens, so `start="{name}"` would not be exact: leave it out, or use '
            '`start="residual"`.'
        )


def _check_groups(start: Start, request: _Request, config: SparseMoeVlmExpertsConfig, slots: Mapping[str, int]) -> None:
    """Raises `UpcyclingError` if the groups of a layer cannot contain its dense block."""
    for layer, width in request.widths.items():
        if start.name == "residual":
            if dense_carriers(config.layer_expert_groups(layer), request.modalities, width) is None:
                raise UpcyclingError(_no_carriers(config, layer, width))
            continue
        needed = width // start.granularity
        for group in config.layer_expert_groups(layer, always_on=False):
            if group.intermediate_size != needed:
                raise UpcyclingError(
                    f'`start="{start.name}"` needs experts of width {needed} in layer {layer}, whose dense block is '
                    f"{width} wide, but `expert_groups[{group.name!r}].intermediate_size` is "
                    f'{group.intermediate_size}: leave it out, or use `start="residual"`.'
                )
            if group.num_experts % start.granularity:
                raise UpcyclingError(
                    f'`start="split"` cuts each copy of the dense block into {start.granularity} experts, but group '
                    f"{group.name!r} has {group.num_experts}: choose a number of experts that is a multiple of "
                    "`granularity`, or another `granularity`."
                )
    for modality, chosen in slots.items():
        if chosen % start.granularity:
            raise UpcyclingError(
                f'`start="split"` needs all {start.granularity} parts of a dense block for a token, but a token of '
                f"modality {modality!r} goes to {chosen} experts: choose `num_experts_per_tok` (or "
                "`num_experts_per_tok_by_modality`) as a multiple of `granularity`, or another `granularity`."
            )


def _no_carriers(config: SparseMoeVlmExpertsConfig, layer: int, width: int) -> str:
    """Returns why the always-on experts of a layer cannot be its dense block."""
    always_on = config.layer_expert_groups(layer, always_on=True)
    for modality in config.modalities:
        sizes = {
            group.name: group.num_experts * group.intermediate_size for group in always_on if group.serves(modality)
        }
        if not sizes:
            return (
                f'`start="residual"` needs an always-on expert for every modality, but layer {layer} has none for '
                f'{modality!r}: use `expert_groups="hybrid"`, add a group with `"always_on": True`, or use '
                '`start="copy"`.'
            )
        if max(sizes.values()) < width:
            return (
                f'`start="residual"` makes an always-on expert of the dense block, which is {width} wide in layer '
                f"{layer}, but the always-on experts for {modality!r} have the widths {sizes}: leave their "
                '`intermediate_size` out, or use `start="copy"`.'
            )
    return (
        f'`start="residual"` needs always-on groups with a width of at least {width}, exactly one for each modality, '
        f"but no selection of {[group.name for group in always_on]} in layer {layer} provides that: change their "
        "`modalities`."
    )


def _check_pools_fit(start: Start, request: _Request, groups: list[dict[str, Any]], pools: Any) -> None:
    """Raises `UpcyclingError` if the layers of a pool need experts of different widths."""
    if not isinstance(pools, list | tuple) or len(pools) != request.num_hidden_layers:
        return  # the configuration refuses it
    routed = [ExpertGroup.from_dict(group) for group in groups if not group["always_on"]]
    for pool in {pool for pool in pools if pool is not None}:
        widths = {layer: request.widths[layer] for layer in request.widths if pools[layer] == pool}
        names = {tuple(group.name for group in _of_layer(routed, layer)) for layer in widths}
        if len(set(widths.values())) > 1 and len(names) > 1:
            raise UpcyclingError(
                f"`expert_pool` makes layers {sorted(widths)} share pool {pool}, but their dense blocks have different "
                f"widths {widths}: pool layers of one width"
                + (", or set `moe_intermediate_size`." if start.name == "residual" else ".")
            )


def _check_pools(start: Start, config: SparseMoeVlmExpertsConfig) -> None:
    shared = {pool: layers for pool, layers in config.pools.items() if len(layers) > 1}
    if start.pool_start is not None and (start.name == "residual" or not shared):
        reason = "routed experts start at zero" if start.name == "residual" else "no layers share their experts"
        raise UpcyclingError(f"`pool_start` has no effect here, because {reason}: leave it out.")
    if shared and start.pool_start is None and start.name != "residual":
        pool, layers = next(iter(shared.items()))
        raise UpcyclingError(
            f'`expert_pool` makes layers {layers} share the experts of pool {pool}, and `start="{start.name}"` can '
            'make them the dense block of only one of these layers: use `start="residual"` with an always-on expert '
            'for every modality, which is exact, or accept different outputs with `pool_start="first"` or `"mean"`.'
        )
