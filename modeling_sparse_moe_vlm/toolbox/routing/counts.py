"""Counts of what routers do, from the router logits that a model returns: added up over batches, without waiting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...experts_config import SparseMoeVlmExpertsConfig
from ...parallel_plans import is_one_of_several_processes
from ...routing import RoutingRule, bias_of_tokens, real_tokens, router_biases, slots_per_token


@dataclass(frozen=True)
class RoutingCounts:
    """
    Counts of L sparse layers, M modalities, G routed groups (of the whole model, in order) and E experts (of the layer
    with the most). Counts of several batches are added with `+`.

    Args:
        tokens (`torch.Tensor` of shape `(M,)`): Number of tokens, without padding, of type int64.
        wanted (`torch.Tensor` of shape `(L, M, E)`): Number of tokens that chose each expert, of type int64.
        dropped (`torch.Tensor` of shape `(L, M, E)`): Of these, how many the expert had no capacity for.
        entropy (`torch.Tensor` of shape `(L, M, G)`):
            Sum over tokens of the entropy, in nats, of the router's probabilities within each group, of type float32.
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
        """The sum over data-parallel processes, all of which must call this; the counts themselves where it is one."""
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
) -> RoutingCounts:
    """
    Counts the routing of one forward pass. Since the logits are those that the model returned, activation checkpointing
    counts nothing twice, and micro-batches add up.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        router_logits (`Sequence[torch.Tensor]`):
            One tensor `(batch_size * sequence_length, num_experts)` per sparse layer, as the model returns them.
        mm_token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Modality id of every token; all text when `None`.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            0 for padding, which does not count.
        biases (`Sequence[torch.Tensor]`, *optional*):
            The routers' biases when the logits were made ([`~routing.router_biases`]).

    Returns:
        [`RoutingCounts`], on the device of the first logits.
    """
    device, num_tokens = router_logits[0].device, router_logits[0].shape[0]
    real = real_tokens(attention_mask, num_tokens)
    real = torch.ones(num_tokens, dtype=torch.bool, device=device) if real is None else real.to(device)
    ids = torch.zeros(num_tokens, dtype=torch.long, device=device)
    if mm_token_type_ids is not None:
        ids = mm_token_type_ids.reshape(-1).to(device)
    slots = slots_per_token(ids, [config.experts_per_token(modality) for modality in config.modalities])

    wanted, dropped, entropies = [], [], []
    for number, (layer, logits) in enumerate(zip(config.sparse_layers, router_logits, strict=True)):
        logits = logits.to(device)
        groups = config.layer_expert_groups(layer, always_on=False)
        rule = RoutingRule.of(config, groups)
        bias = None if biases is None else bias_of_tokens(biases[number].to(device), ids)
        weights, chosen = rule.choose(logits, num_slots=slots, bias=bias)
        _, kept = rule.drop(logits, weights, chosen, modality_ids=ids, real=real)
        num_experts, shape = logits.shape[1], (len(config.modalities), config.num_experts)
        chosen, kept = (index.masked_fill(~real[:, None], num_experts) for index in (chosen, kept))
        wanted.append(_count(chosen, num_experts, ids, shape))
        dropped.append(wanted[-1] - _count(kept, num_experts, ids, shape))

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


def _count(index: torch.Tensor, num_experts: int, modality_ids: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """How often each of a layer's experts is among the chosen ones `(T, k)`, by modality, in the shape `(M, E)`."""
    num_modalities, width = shape
    column = index.masked_fill(index == num_experts, width)  # sentinels
    cell = (modality_ids[:, None] * (width + 1) + column).flatten()
    counts = torch.zeros(num_modalities * (width + 1), dtype=torch.long, device=index.device)
    return counts.index_add(0, cell, torch.ones_like(cell)).view(num_modalities, width + 1)[:, :width]


@torch.inference_mode()
def measure_routing(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> RoutingCounts | None:
    """
    Runs the model over batches and counts its routing.

    Args:
        model (`PreTrainedModel`):
            The model.
        batches (`Iterable[Mapping[str, torch.Tensor]]`):
            Model inputs. Without `attention_mask` there is no padding; without `mm_token_type_ids` the placeholders
            tell which tokens are images.

    Returns:
        [`RoutingCounts`], or `None` for a model without sparse layers, or without batches.
    """
    total = None
    for batch in tqdm(batches, desc="Measuring routing", unit="batch"):
        inputs = send_to_device({name: value for name, value in batch.items() if name != "labels"}, model.device)
        counts = count_batch(model, inputs, model(**inputs, output_router_logits=True).router_logits)
        if counts is not None:
            total = counts if total is None else total + counts
    return total


def count_batch(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    router_logits: Sequence[torch.Tensor] | None,
) -> RoutingCounts | None:
    """Counts the routing of a model's forward pass with these inputs; `None` where it returned no router logits."""
    if not router_logits:
        return None
    ids = inputs.get("mm_token_type_ids")
    if ids is None or getattr(model.config, "modality_encoders", None):
        # Wherever it is: the model may be wrapped, or a decoder alone, which reads nothing but text.
        readers = [module for module in model.modules() if hasattr(module, "get_mm_token_type_ids")]
        if readers:
            ids = readers[-1].get_mm_token_type_ids(inputs.get("input_ids"), inputs.get("inputs_embeds"), ids)
    config = model.config.get_text_config()
    return count_routing(config, router_logits, ids, inputs.get("attention_mask"), router_biases(model))
