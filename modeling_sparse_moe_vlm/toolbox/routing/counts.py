"""Counts the routing of forward passes. Counts stay on the device and can be added over batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...experts_config import SparseMoeVlmExpertsConfig, experts_config_of
from ...parallel_plans import is_one_of_several_processes
from ...routing import LayerRouting, RoutingRule, chosen_experts, router_biases
from ...token_modalities import TokenModalities, flat_tokens, padding_mask
from .watch import watch_routing


@dataclass(frozen=True)
class RoutingCounts:
    """
    Routing counts of L sparse layers, M modalities, G routed groups (of the whole model, in the order of the
    configuration) and E experts (the largest number in any layer). The operator `+` adds the counts of batches.

    Args:
        tokens (`torch.Tensor` of shape `(M,)`):
            Number of tokens of each modality, without padding, of type int64.
        wanted (`torch.Tensor` of shape `(L, M, E)`):
            Number of tokens that chose each expert, of type int64.
        dropped (`torch.Tensor` of shape `(L, M, E)`):
            Number of these tokens that exceeded the capacity of the expert, of type int64.
        entropy (`torch.Tensor` of shape `(L, M, G)`):
            Entropy of the router's probabilities within each group, in nats, summed over tokens, of type float32.
    """

    tokens: torch.Tensor
    wanted: torch.Tensor
    dropped: torch.Tensor
    entropy: torch.Tensor

    def _tensors(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        return RoutingCounts(*(mine + its.to(mine.device) for mine, its in zip(self._tensors(), other._tensors())))

    def over_processes(self) -> RoutingCounts:
        """
        Returns the sum over data-parallel processes, all of which must call this method. With a single process, returns
        the counts themselves.
        """
        if not is_one_of_several_processes():
            return self
        tensors = [tensor.clone() for tensor in self._tensors()]
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
        return RoutingCounts(*tensors)


@torch.no_grad()
def count_routing(
    config: SparseMoeVlmExpertsConfig,
    router_logits: Sequence[torch.Tensor],
    mm_token_type_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    biases: Sequence[torch.Tensor] | None = None,
    *,
    router_indices: Sequence[torch.Tensor] | None = None,
    router_dropped: Sequence[torch.Tensor] | None = None,
) -> RoutingCounts:
    """
    Counts the routing of one forward pass from its outputs. Gradient checkpointing, which runs layers twice, therefore
    counts nothing twice.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        router_logits (`Sequence[torch.Tensor]`):
            Router logits that the model returned, `(batch_size * sequence_length, num_experts)` for each sparse layer.
        mm_token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Modality id of every token. By default, all tokens are text.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Mask that is 0 for padding, which is not counted. By default, there is no padding.
        biases (`Sequence[torch.Tensor]`, *optional*):
            Biases of the routers in this forward pass ([`~routing.router_biases`]). Only used without
            `router_indices`.
        router_indices (`Sequence[torch.Tensor]`, *optional*):
            Numbers of the chosen experts that the model returned, `(batch_size * sequence_length, k)` for each sparse
            layer. By default, they are computed from the logits.
        router_dropped (`Sequence[torch.Tensor]`, *optional*):
            Whether each chosen expert had no capacity for the token, as the model returned it, in the same shape and of
            type bool. By default, nothing was dropped; without `router_indices`, this is computed from the logits.

    Returns:
        [`RoutingCounts`]: The counts, on the device of the first router logits.
    """
    device = router_logits[0].device
    ids, real = flat_tokens(mm_token_type_ids, attention_mask, router_logits[0].shape[0], device)
    if router_indices is None:
        router_indices = chosen_experts(config, router_logits, ids, biases)
        if config.expert_capacity_factor is not None:
            router_dropped = _dropped(config, router_logits, router_indices, ids, real)

    wanted, dropped, entropies = [], [], []
    for number, (layer, logits) in enumerate(zip(config.sparse_layers, router_logits, strict=True)):
        logits = logits.to(device)
        groups = config.layer_expert_groups(layer, always_on=False)
        num_experts, shape = logits.shape[1], (len(config.modalities), config.num_experts)
        chosen = router_indices[number].to(device).masked_fill(~real[:, None], num_experts)
        wanted.append(_count(chosen, num_experts, ids, shape))
        if router_dropped is None:
            dropped.append(torch.zeros_like(wanted[-1]))
        else:
            lost = chosen.masked_fill(~router_dropped[number].to(device), num_experts)
            dropped.append(_count(lost, num_experts, ids, shape))

        entropy = torch.zeros(len(config.modalities), len(config.routed_group_names), device=device)
        first = 0
        for group in groups:
            part = logits[:, first : first + group.num_experts].float()
            first += group.num_experts
            log_probs = torch.log_softmax(F.logsigmoid(part) if config.router == "sigmoid" else part, dim=-1)
            of_tokens = -(log_probs.exp() * log_probs).sum(dim=-1).masked_fill(~real | part[:, 0].isneginf(), 0.0)
            entropy[:, config.routed_group_names.index(group.name)].index_add_(0, ids, of_tokens)
        entropies.append(entropy)
    return RoutingCounts(
        tokens=torch.zeros(len(config.modalities), dtype=torch.long, device=device).index_add(0, ids, real.long()),
        wanted=torch.stack(wanted),
        dropped=torch.stack(dropped),
        entropy=torch.stack(entropies),
    )


def _dropped(
    config: SparseMoeVlmExpertsConfig,
    router_logits: Sequence[torch.Tensor],
    router_indices: Sequence[torch.Tensor],
    ids: torch.Tensor,
    real: torch.Tensor,
) -> list[torch.Tensor]:
    """Returns, for each sparse layer, which of the chosen experts have no capacity for the token, `(T, k)`."""
    dropped = []
    for layer, logits, chosen in zip(config.sparse_layers, router_logits, router_indices, strict=True):
        rule = RoutingRule.of(config, config.layer_expert_groups(layer, always_on=False))
        logits, chosen = logits.to(ids.device), chosen.to(ids.device)
        _, kept = rule.drop(logits, torch.zeros_like(chosen).float(), chosen, modality_ids=ids, real=real)
        dropped.append(kept != chosen)
    return dropped


def _count(index: torch.Tensor, num_experts: int, modality_ids: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Returns how often each expert of a layer is among the chosen experts `(T, k)`, by modality, `(M, E)`."""
    num_modalities, width = shape
    column = index.masked_fill(index == num_experts, width)  # sentinels
    cell = (modality_ids[:, None] * (width + 1) + column).flatten()
    counts = torch.zeros(num_modalities * (width + 1), dtype=torch.long, device=index.device)
    return counts.index_add(0, cell, torch.ones_like(cell)).view(num_modalities, width + 1)[:, :width]


@torch.no_grad()
def measure_routing(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> RoutingCounts | None:
    """
    Runs the model over batches and counts its routing. The model keeps its mode (training or evaluation).

    Args:
        model (`PreTrainedModel`):
            The model.
        batches (`Iterable[Mapping[str, torch.Tensor]]`):
            Model inputs, which are moved to the model's device; `labels` are ignored. Without `attention_mask`, there
            is no padding. Without `mm_token_type_ids`, the placeholders define which tokens are images.

    Returns:
        [`RoutingCounts`]: The counts over all batches, or `None` if the model has no sparse layers or there are no
        batches.
    """
    passes: list[RoutingCounts] = []
    handles = watch_routing(model, lambda config, tokens, layers: passes.append(count_layers(config, tokens, layers)))
    try:
        for batch in tqdm(batches, desc="Measuring routing", unit="batch"):
            model(**send_to_device({name: value for name, value in batch.items() if name != "labels"}, model.device))
            passes[:] = [sum(passes[1:], passes[0])] if passes else []
    finally:
        for handle in handles:
            handle.remove()
    return passes[0] if passes else None


def count_layers(
    config: SparseMoeVlmExpertsConfig, tokens: TokenModalities, layers: Sequence[LayerRouting]
) -> RoutingCounts:
    """Counts the routing that the routers recorded in one forward pass."""
    dropped = [layer.dropped for layer in layers if layer.dropped is not None]
    return count_routing(
        config,
        [layer.logits for layer in layers],
        tokens.ids,
        tokens.is_real,
        router_indices=[layer.chosen for layer in layers],
        router_dropped=dropped or None,
    )


def count_batch(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    router_logits: Sequence[torch.Tensor] | None,
    router_indices: Sequence[torch.Tensor] | None = None,
    router_dropped: Sequence[torch.Tensor] | None = None,
) -> RoutingCounts | None:
    """
    Counts the routing of a model's forward pass, for custom training loops.

    Args:
        model (`PreTrainedModel`):
            The model, without a wrapper for parallelism.
        inputs (`Mapping[str, torch.Tensor]`):
            Inputs of the forward pass.
        router_logits (`Sequence[torch.Tensor]`, *optional*):
            `outputs.router_logits` of the forward pass.
        router_indices (`Sequence[torch.Tensor]`, *optional*):
            `outputs.router_indices` of the forward pass. By default, the chosen experts are computed from the logits
            and the current biases of the routers.
        router_dropped (`Sequence[torch.Tensor]`, *optional*):
            `outputs.router_dropped` of the forward pass.

    Returns:
        [`RoutingCounts`]: The counts, or `None` without router logits.
    """
    if not router_logits:
        return None
    ids = inputs.get("mm_token_type_ids")
    config = experts_config_of(model.config)
    if ids is None or getattr(model.config, "modality_encoders", None) or hasattr(config, "placeholders"):
        # Search all modules: the model may be wrapped, or it may be only our decoder, which reads only text.
        readers = [module for module in model.modules() if hasattr(module, "get_mm_token_type_ids")]
        if readers:
            ids = readers[-1].get_mm_token_type_ids(inputs.get("input_ids"), inputs.get("inputs_embeds"), ids)
    tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    shape = (1, router_logits[0].shape[0]) if tokens is None else tokens.shape[:2]
    return count_routing(
        config,
        router_logits,
        ids,
        padding_mask(inputs.get("attention_mask"), inputs.get("position_ids"), shape),
        router_biases(model),
        router_indices=router_indices,
        router_dropped=router_dropped,
    )
