"""The dense feed-forward blocks of a model that experts can replace, found by what they compute."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from .decoders import DecoderLayers, decoder_layers, placeholder_ids, takes_images_by_cross_attention
from .errors import UpcyclingError
from .gated_formula import (
    FORMULA,
    GatedFormula,
    NotTheFormulaError,
    Rows,
    fingerprint,
    looks_like_feed_forward,
    read_formula,
)
from .starts import GatedWeights

__all__ = [
    "DenseBlocks",
    "GatedBlock",
    "block_weights",
    "find_blocks",
    "placeholder_ids",
    "takes_images_by_cross_attention",
]


@dataclass(frozen=True)
class GatedBlock:
    """
    A dense feed-forward block of a decoder layer, which computes `down(act(gate(x)) * up(x))`.

    Attributes:
        name (`str`): Name of the block in the model, such as "model.language_model.layers.0.mlp".
        layer (`int`): Index of its decoder layer.
        intermediate_size (`int`): Width of `gate(x)` and `up(x)`, which may differ between layers.
        parameters (`dict[str, tuple[str, slice | None]]`):
            For "gate", "up" and "down": the name of a parameter in the block, and its rows (`None`: all of them).
    """

    name: str
    layer: int
    intermediate_size: int
    parameters: Mapping[str, Rows]


@dataclass(frozen=True)
class DenseBlocks:
    """
    All dense gated blocks of a model's text decoder.

    Attributes:
        decoder (`str`): Name in the model of the module that owns the list of layers; `""` for the model itself.
        num_layers (`int`): Number of decoder layers, with and without such a block.
        hidden_size (`int`): Width of the blocks' inputs and outputs.
        hidden_act (`str`): Name of their activation in Transformers' `ACT2FN`.
        blocks (`tuple[GatedBlock, ...]`): The blocks, in the order of their layers.
    """

    decoder: str
    num_layers: int
    hidden_size: int
    hidden_act: str
    blocks: tuple[GatedBlock, ...]


def find_blocks(
    model: PreTrainedModel, layers: Collection[int] | None = None, include_dense_layers_of_moe: bool = False
) -> DenseBlocks:
    """
    Finds the dense gated feed-forward block in each layer of a model's text decoder.

    Blocks are found by their formula and not by their names: every candidate runs with random weights. Fused
    projections of gate and up, other names and different widths are therefore found, and modules that only look like
    such a block are not. The model is not changed and its weights are not read, so it may be on the meta device.

    Args:
        model (`PreTrainedModel`): A language model or vision-language model.
        layers (collection of `int`, *optional*): Indices of the decoder layers to search. By default, all.
        include_dense_layers_of_moe (`bool`, *optional*, defaults to `False`):
            Whether to return the dense layers of a model whose other layers have experts.

    Returns:
        `DenseBlocks`: The blocks. Layers without a feed-forward block are ignored.

    Raises:
        UpcyclingError: If there is no such block, if a layer has another kind of feed-forward block or experts already,
            if the activations of layers differ, or if the model is quantised or has adapters.
    """
    _check_model(model)
    decoder = decoder_layers(model)
    chosen = _chosen_layers(layers, len(decoder.layers))
    experts = [index for index in chosen if _has_experts(decoder.layers[index])]
    dense = [index for index in chosen if index not in experts]
    found, reasons = _search(decoder, dense)
    _check_experts(model, experts, sorted(found), layers is not None, include_dense_layers_of_moe)
    _check_found(model, found, reasons, layers is not None)
    _check_alike(model, found)
    blocks = tuple(
        GatedBlock(f"{decoder.path}.{index}.{name}", index, formula.intermediate_size, formula.parameters)
        for index, (name, formula) in found.items()
    )
    _check_shared(model, blocks)
    _, first = next(iter(found.values()))
    return DenseBlocks(decoder.decoder, len(decoder.layers), first.hidden_size, first.hidden_act, blocks)


def block_weights(module: nn.Module, block: GatedBlock) -> GatedWeights:
    """
    Returns the weights of a dense block: views of its parameters.

    Args:
        module (`torch.nn.Module`): The block itself, `model.get_submodule(block.name)`.
        block (`GatedBlock`): Description of the block, which names its parameters.
    """
    places = (block.parameters[part] for part in ("gate", "up", "down"))
    return GatedWeights(*(module.get_parameter(name)[rows or slice(None)].detach() for name, rows in places))


Found = dict[int, tuple[str, GatedFormula]]
Reasons = dict[int, str]


def _search(decoder: DecoderLayers, indices: list[int]) -> tuple[Found, Reasons]:
    """Returns the block and formula of each layer, or the reason why it has none."""
    found: Found = {}
    reasons: Reasons = {}
    known: dict[tuple, GatedFormula | NotTheFormulaError] = {}
    activations = _activations_of(decoder.config)
    for index in indices:
        blocks: dict[str, GatedFormula] = {}
        for name, module in _candidates(decoder.layers[index]):
            key = fingerprint(module)
            if key not in known:
                try:
                    known[key] = read_formula(module, activations)
                except NotTheFormulaError as error:
                    known[key] = error
            result = known[key]
            if isinstance(result, GatedFormula):
                blocks[name] = result
            elif looks_like_feed_forward(module):
                reasons.setdefault(index, f"`{name}`: {result}")
        innermost = [name for name in blocks if not any(other.startswith(f"{name}.") for other in blocks)]
        if len(innermost) == 1:
            found[index] = (innermost[0], blocks[innermost[0]])
            reasons.pop(index, None)
        elif innermost:
            reasons[index] = f"it has {len(innermost)} gated blocks ({', '.join(innermost)})"
    return found, reasons


def _candidates(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the modules inside a layer that could be its feed-forward block."""
    lists = (nn.Linear, nn.ModuleList, nn.ModuleDict)
    return [(name, module) for name, module in layer.named_modules() if name and not isinstance(module, lists)]


def _has_experts(layer: nn.Module) -> bool:
    return any("experts" in name.split(".") for name, _ in layer.named_modules())


def _activations_of(config: PreTrainedConfig) -> list[str]:
    values = [value for key, value in config.to_dict().items() if "act" in key and isinstance(value, str)]
    return [value for value in values if value in ACT2FN]


def _chosen_layers(layers: Collection[int] | None, num_layers: int) -> list[int]:
    if layers is None:
        return list(range(num_layers))
    if wrong := [index for index in layers if index not in range(num_layers)]:
        raise UpcyclingError(f"`layers` must be decoder layers, 0 to {num_layers - 1}, got {wrong}.")
    if not layers:
        raise UpcyclingError("`layers` must name at least one decoder layer.")
    return sorted(set(layers))


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        hint = " Merge its adapters first: `model.merge_and_unload()`." if hasattr(model, "merge_and_unload") else ""
        raise UpcyclingError(f"`model` must be a model of Transformers, got {type(model).__name__}.{hint}")
    name = type(model).__name__
    if _is_quantised(model):
        raise UpcyclingError(f"{name} is quantised: load it unquantised, and quantise the result.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UpcyclingError(f"{name} has adapters: merge them into its weights first, or load it without them.")


def _is_quantised(model: PreTrainedModel) -> bool:
    """Returns whether weights are quantised. Weights that were dequantised in loading (as from GGUF files) are not."""
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(model.config, "quantization_config", None) or getattr(quantizer, "quantization_config", quantizer)
    if method is None:
        return False
    is_unpacked = getattr(method, "dequantize", False) or getattr(method, "quant_method", None) == "gguf"
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    is_plain = all(type(linear) is nn.Linear and linear.weight.is_floating_point() for linear in linears)
    return not (is_unpacked and is_plain)


def _check_experts(
    model: PreTrainedModel, experts: list[int], dense: list[int], chosen: bool, include_dense_layers: bool
) -> None:
    if not experts:
        return
    name = type(model).__name__
    if not dense:
        raise UpcyclingError(f"{name} is already a mixture of experts, in {_named(experts)}.")
    if chosen:
        raise UpcyclingError(f"`layers`: {name} is already a mixture of experts in {_named(experts)}.")
    if not include_dense_layers:
        raise UpcyclingError(
            f"{name} is already a mixture of experts, in {_named(experts)}. `include_dense_layers_of_moe=True` takes "
            f"its dense ones, {_named(dense)}."
        )


def _check_found(model: PreTrainedModel, found: Found, reasons: Reasons, chosen: bool) -> None:
    name = type(model).__name__
    for index, reason in reasons.items():
        advice = f" `layers={sorted(found)}` leaves those dense." if found and not chosen else ""
        raise UpcyclingError(
            f"{name} has feed-forward blocks that experts cannot replace, in {_named(sorted(reasons))}. Layer {index}, "
            f"{reason}.{advice}"
        )
    if not found:
        raise UpcyclingError(f"{name} is not gated: no module of its decoder layers computes {FORMULA}.")


def _check_alike(model: PreTrainedModel, found: Found) -> None:
    for attribute in ("hidden_size", "hidden_act"):
        if len(values := {str(getattr(formula, attribute)) for _, formula in found.values()}) > 1:
            raise UpcyclingError(
                f"The feed-forward blocks of {type(model).__name__} differ in `{attribute}`: "
                f"{', '.join(sorted(values))}. Name layers of one kind with `layers`."
            )


def _check_shared(model: PreTrainedModel, blocks: tuple[GatedBlock, ...]) -> None:
    """Refuses layers that share their weights, because they would get separate experts."""
    tied = model.all_tied_weights_keys  # weights of a model on the meta device are not tied yet
    owners: dict[str | int, str] = {}
    for block in blocks:
        for name, parameter in model.get_submodule(block.name).named_parameters(block.name):
            for key in (id(parameter), tied.get(name, name)):
                if (owner := owners.setdefault(key, block.name)) != block.name:
                    raise UpcyclingError(f"{type(model).__name__} shares weights between `{owner}` and `{block.name}`.")


def _named(layers: list[int]) -> str:
    """Returns "layer 3", or "layers 0-2, 5"."""
    runs: list[list[int]] = []
    for index in layers:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer{'s' * (len(layers) > 1)} {parts}"
