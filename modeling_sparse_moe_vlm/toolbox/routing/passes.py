"""Hooks that report the routing of every forward pass of any mixture of experts.

Models of this package and upcycled models record their own routing. For other models of Transformers, the router logits
come from the modules that the model names in `_can_record_outputs`, and the chosen experts from the indices that the
experts module is called with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from ...checks import check
from ...experts_config import SparseMoeVlmExpertsConfig
from ...routing import LayerRouting
from ...token_modalities import TokenModalities, flat_tokens
from ..expert_modules import base_model_of, decoder_name, layers_of_modules, modules_of, uses_experts_interface
from ..modality_weights.read_out import MODALITIES, placeholders_of
from ..model_size import CHOSEN_EXPERTS
from .choices import choices_by_row
from .counts import RoutingCounts, count_layers
from .layout import EXPERTS, RoutedGroup, RoutedLayer, RoutingLayout, layout_of
from .watch import decoders, watch_routing

ROUTER_LOGITS = "router_logits"


@dataclass(frozen=True)
class LayerChoices:
    """
    The routing of the T tokens of a forward pass in one layer.

    Args:
        logits (`torch.Tensor` of shape `(T, E)`, *optional*): Router logits. `None` if the model does not return them.
        chosen (`torch.Tensor` of shape `(T, k)`): Numbers of the chosen experts; E for an unused slot.
    """

    logits: torch.Tensor | None
    chosen: torch.Tensor


@dataclass(frozen=True)
class RoutedPass:
    """
    The routing of one forward pass over T tokens (all rows together, padding included).

    Args:
        layout ([`RoutingLayout`]): The routed experts of the model.
        ids (`torch.Tensor` of shape `(T,)`): Modality id of every token.
        is_real (`torch.Tensor` of shape `(T,)`): `False` for padding.
        layers (`tuple[LayerChoices, ...]`): Routing of every layer of the layout.
        count (`Callable`): Returns the [`~toolbox.routing.RoutingCounts`] of the pass.
        group_names (`list[str]`): Names of the groups in the order of the last dimension of `entropy` in the counts.
    """

    layout: RoutingLayout
    ids: torch.Tensor
    is_real: torch.Tensor
    layers: tuple[LayerChoices, ...]
    count: Callable[[], RoutingCounts]
    group_names: list[str]


def watch_passes(model: nn.Module, listener: Callable[[RoutedPass], None]) -> list[RemovableHandle]:
    """
    Calls a listener with the routing of every forward pass.

    Args:
        model (`nn.Module`):
            A model of this package, an upcycled model or any mixture of experts of Transformers, with or without
            adapters.
        listener (`Callable`):
            Function that is called with a [`RoutedPass`].

    Returns:
        `list[RemovableHandle]`: Handles of the hooks; remove them to stop watching. Empty if the model has no routed
        experts.
    """
    if not decoders(model):
        return _watch_in_tree(base_model_of(model), listener)

    def listen(config: SparseMoeVlmExpertsConfig, tokens: TokenModalities, layers: Sequence[LayerRouting]) -> None:
        ids, is_real = flat_tokens(tokens.ids, tokens.is_real, len(layers[0].logits), layers[0].logits.device)
        listener(
            RoutedPass(
                layout_of(config),
                ids,
                is_real,
                tuple(LayerChoices(layer.logits, layer.chosen) for layer in layers),
                lambda: count_layers(config, tokens, layers),
                config.routed_group_names,
            )
        )

    return watch_routing(model, listen)


@dataclass(frozen=True)
class Places:
    """
    The modules of a model that route, by name.

    Args:
        routers (`dict[str, tuple[nn.Module, int]]`): Routers, with the position of the logits in their output.
        experts (`dict[str, nn.Module]`): Experts modules.
        layers (`dict[str, int]`): Number of the layer of every module.
    """

    routers: dict[str, tuple[nn.Module, int]]
    experts: dict[str, Any]
    layers: dict[str, int]

    def block_of(self, name: str) -> str:
        """
        Returns the name of the block of a router or an experts module. It is the parent of the module, or a block that
        returns the router logits itself.
        """
        routers = [router for router in self.routers if f"{name}.".startswith(f"{router}.")]
        around = [router for router in routers if any(other.startswith(f"{router}.") for other in self.experts)]
        return around[0] if around else name.rpartition(".")[0]

    def blocks(self) -> dict[str, int]:
        """Returns the number of the layer of each block, by the name of the block, in the order of the layers."""
        blocks = {self.block_of(name): self.layers[name] for name in (*self.routers, *self.experts)}
        return dict(sorted(blocks.items(), key=lambda item: item[1]))


def find_routers(model: PreTrainedModel) -> Places:
    """Finds the routers and the experts modules in the decoder of a model."""
    recorders = [
        recorder
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        for recorder in _recorders(getattr(module, "_can_record_outputs", None) or {})
    ]
    start = f"{decoder_name(model)}." if decoder_name(model) else ""
    routers: dict[str, tuple[nn.Module, int]] = {}
    experts: dict[str, Any] = {}
    for name, module in modules_of(model):
        if not name.startswith(start):
            continue
        for recorder in recorders:
            if isinstance(module, recorder.target_class):
                routers[name] = module, recorder.index
        if uses_experts_interface(module):
            experts[name] = module
    return Places(routers, experts, layers_of_modules(model))


def _recorders(outputs: Mapping[str, Any]) -> list[OutputRecorder]:
    """Returns the recorders of router logits among the outputs that a class can record."""
    found = outputs.get(ROUTER_LOGITS, [])
    found = found if isinstance(found, list) else [found]
    recorders = [item if isinstance(item, OutputRecorder) else OutputRecorder(item, index=1) for item in found]
    return [recorder for recorder in recorders if isinstance(recorder.target_class, type)]


def _watch_in_tree(model: Any, listener: Callable[[RoutedPass], None]) -> list[RemovableHandle]:
    places = find_routers(model)
    blocks = places.blocks()
    if not blocks:
        return []
    tokens: dict[str, Any] = {}
    logits: dict[str, torch.Tensor] = {}
    chosen: dict[str, torch.Tensor] = {}

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens.clear()
        logits.clear()
        chosen.clear()
        tokens.update(dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs)

    def read_router(block: str, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            values = parts[index].detach()
            values = values.reshape(-1, values.shape[-1])
            logits[block] = values
            indices = [part for part in parts if torch.is_tensor(part) and _are_choices(part, values)]
            if indices:
                chosen.setdefault(block, indices[-1].reshape(len(values), -1))

        return hook

    def read_experts(block: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            indices = [value for value in given if torch.is_tensor(value) and not value.is_floating_point()]
            if len(indices) == 1 and indices[0].dim() == 2:
                chosen[block] = indices[0]

        return hook

    def finish(module: nn.Module, args: tuple, output: Any) -> None:
        if logits or chosen:
            listener(_routed_pass(model, places, blocks, tokens, logits, chosen))

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        *(
            router.register_forward_hook(read_router(places.block_of(name), index))
            for name, (router, index) in places.routers.items()
        ),
        *(
            experts.register_forward_pre_hook(read_experts(places.block_of(name)), with_kwargs=True)
            for name, experts in places.experts.items()
        ),
        model.register_forward_hook(finish),
    ]
    return handles


def _are_choices(value: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether an output of a router contains numbers of experts, one row per token."""
    return not value.is_floating_point() and value.dim() >= 2 and value.shape[:-1].numel() == len(logits)


def _routed_pass(
    model: PreTrainedModel,
    places: Places,
    blocks: Mapping[str, int],
    arguments: Mapping[str, Any],
    logits: Mapping[str, torch.Tensor],
    chosen: Mapping[str, torch.Tensor],
) -> RoutedPass:
    """Puts the routing that the hooks have read in order."""
    ids, is_real, modalities = tokens_of(model.config, arguments)
    layers, choices = [], []
    for block, layer in blocks.items():
        if block not in logits and block not in chosen:
            continue
        scores, experts = logits.get(block), chosen.get(block)
        num_experts = _num_experts(places, block, scores)
        if experts is None:
            assert scores is not None
            experts = scores.topk(_experts_per_token(model, places, block), dim=-1).indices
        elif scores is not None:
            experts = _best_first(experts, scores)
        check(
            len(experts) == len(ids),
            f"the router in {block!r} of {type(model).__name__} processes {len(experts)} of the {len(ids)} tokens of a "
            "forward pass, so it is not known which token goes to which expert. Models with separate routers for "
            "text and images are not supported.",
        )
        layers.append(RoutedLayer(layer, (RoutedGroup(EXPERTS, num_experts, modalities),)))
        choices.append(LayerChoices(scores, experts))
    layout, device = RoutingLayout(modalities, tuple(layers)), choices[0].chosen.device
    ids, is_real = ids.to(device), is_real.to(device)
    return RoutedPass(
        layout,
        ids,
        is_real,
        tuple(choices),
        lambda: count_choices(layout, ids, is_real, choices),
        [EXPERTS],
    )


def _best_first(chosen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Sorts the chosen experts of each token by their scores. Unused slots come last."""
    padded = nn.functional.pad(scores.float(), (0, 1), value=-torch.inf)
    order = padded.gather(1, chosen).argsort(dim=1, descending=True, stable=True)
    return chosen.gather(1, order)


def _num_experts(places: Places, block: str, scores: torch.Tensor | None) -> int:
    if scores is not None:
        return scores.shape[-1]
    return next(int(module.num_experts) for name, module in places.experts.items() if places.block_of(name) == block)


def _experts_per_token(model: PreTrainedModel, places: Places, block: str) -> int:
    """Returns the number of experts per token of a router that does not return which experts it chose."""
    routers = [module for name, (module, _) in places.routers.items() if places.block_of(name) == block]
    config = model.config.get_text_config()
    candidates = [getattr(router, "top_k", None) for router in routers]
    candidates += [getattr(config, name, None) for name in CHOSEN_EXPERTS]
    number = next((value for value in candidates if isinstance(value, int)), None)
    if number is None:
        raise ValueError(
            f"the number of experts per token of {type(model).__name__} is not known: its configuration has none of "
            f"the fields {', '.join(CHOSEN_EXPERTS)}."
        )
    return number


def tokens_of(
    config: PreTrainedConfig, arguments: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    """
    Returns the modality of the tokens of a forward pass.

    Args:
        config (`PreTrainedConfig`):
            Configuration of the model, which names the placeholder tokens.
        arguments (`Mapping[str, Any]`):
            Arguments of the forward pass.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]`: The modality id of every token, `(B * T,)`, which tokens
        are real, `(B * T,)` of type bool, and the names of the modalities that the model reads.
    """
    placeholders = placeholders_of(config)
    modalities = MODALITIES[: max(placeholders.values(), default=0) + 1]
    input_ids = arguments.get("input_ids")
    if input_ids is not None:
        ids = torch.zeros_like(input_ids)
        for token, modality_id in placeholders.items():
            ids = ids.masked_fill(input_ids == token, modality_id)
    else:
        given = arguments.get("mm_token_type_ids")
        ids = torch.zeros(arguments["inputs_embeds"].shape[:2], dtype=torch.long) if given is None else given.long()
    mask = arguments.get("attention_mask")
    # With a cache, the mask also covers the tokens in the cache.
    is_real = torch.ones_like(ids).bool() if mask is None else mask[:, -ids.shape[1] :].bool()
    return ids.flatten(), is_real.flatten().to(ids.device), modalities


def count_choices(
    layout: RoutingLayout, ids: torch.Tensor, is_real: torch.Tensor, layers: Sequence[LayerChoices]
) -> RoutingCounts:
    """
    Counts the routing of a forward pass of a model with one group of experts per layer.

    Args:
        layout ([`RoutingLayout`]):
            The routed experts of the model.
        ids (`torch.Tensor` of shape `(T,)`):
            Modality id of every token.
        is_real (`torch.Tensor` of shape `(T,)`):
            `False` for padding, which is not counted.
        layers (`Sequence[LayerChoices]`):
            Routing of every layer.

    Returns:
        [`~toolbox.routing.RoutingCounts`]: The counts. Nothing is dropped. The entropy is that of the softmax of the
        router's logits, and NaN in layers whose logits are not known.
    """
    num_modalities = len(layout.modalities)
    wanted = choices_by_row(layout, ids, is_real, [layer.chosen for layer in layers], num_rows=1)[0]
    entropies = []
    for layer in layers:
        if layer.logits is None:
            entropies.append(torch.full((num_modalities, 1), torch.nan, device=ids.device))
            continue
        probabilities = probabilities_of(layer.logits)
        of_tokens = torch.special.entr(probabilities).sum(dim=-1).masked_fill(~is_real, 0.0)
        entropies.append(torch.zeros(num_modalities, 1, device=ids.device).index_add(0, ids, of_tokens[:, None]))
    return RoutingCounts(
        tokens=torch.zeros(num_modalities, dtype=torch.long, device=ids.device).index_add(0, ids, is_real.long()),
        wanted=wanted,
        dropped=torch.zeros_like(wanted),
        entropy=torch.stack(entropies),
    )


def probabilities_of(values: torch.Tensor) -> torch.Tensor:
    """Returns the softmax of router logits. Some routers return probabilities instead, which do not change."""
    values = values.float()
    are_probabilities = bool((values >= 0).all()) and bool(((values.sum(dim=-1) - 1).abs() < 1e-3).all())
    return values if are_probabilities else values.softmax(dim=-1)
