"""Routing statistics: which experts the tokens of each modality go to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..configuration_sparse_moe_vlm import SparseMoeVlmTextConfig
from ..modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from ..routing import route


@torch.inference_mode()
def expert_load(
    model: SparseMoeVlmForConditionalGeneration, batches: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """
    Measures how the tokens of each modality spread over the routed experts. Padding does not count.

    Args:
        model (`SparseMoeVlmForConditionalGeneration`):
            The model.
        batches (`Iterable[Mapping[str, torch.Tensor]]`):
            Model inputs. Without `attention_mask` there is no padding; without `mm_token_type_ids` the placeholders
            tell which tokens are images.

    Returns:
        `dict[str, torch.Tensor]`: by modality, `(sparse layers, num_experts)`, the share of the modality's expert slots
        that went to each expert. Rows sum to 1, or are 0 where no such token came, and are NaN where the layer has no
        such expert, or one that does not serve the modality. Empty for a model without sparse layers.
    """
    config = model.config.text_config
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_sparse_layer(layer)]
    if not layers:
        return {}
    # NaN stays NaN, whatever is added to it.
    counts = {modality: [_no_slots(config, layer, modality) for layer in layers] for modality in config.modalities}
    for batch in tqdm(batches, desc="Measuring routing", unit="batch"):
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        if "mm_token_type_ids" not in inputs:
            inputs["mm_token_type_ids"] = model.model.get_mm_token_type_ids(
                inputs.get("input_ids"), inputs.get("inputs_embeds")
            )
        router_logits = model(**inputs, output_router_logits=True).router_logits
        type_ids = inputs["mm_token_type_ids"]
        real = inputs.get("attention_mask", torch.ones_like(type_ids)).bool()
        for modality_id, modality in enumerate(config.modalities):
            tokens = (real & (type_ids == modality_id)).flatten()
            for count, logits in zip(counts[modality], router_logits, strict=True):
                count += _count(config, logits[tokens], modality)
    return {
        modality: pad_sequence(
            [count / count.nansum().clamp(min=1) for count in of_layers], batch_first=True, padding_value=torch.nan
        )
        for modality, of_layers in counts.items()
    }


def _no_slots(config: SparseMoeVlmTextConfig, layer: int, modality: str) -> torch.Tensor:
    """A count of 0 for the experts of a layer that serve the modality, NaN for the others, `(num_experts,)`."""
    groups = config.layer_expert_groups(layer, always_on=False)
    start = [0.0 if group.serves(modality) else torch.nan for group in groups for _ in range(group.num_experts)]
    return torch.tensor(start)


def _count(config: SparseMoeVlmTextConfig, logits: torch.Tensor, modality: str) -> torch.Tensor:
    """Number of slots per expert, `(num_experts,)`."""
    num_experts = logits.shape[1]
    _, index = route(logits, top_k=config.experts_per_token(modality), router=config.router, top_p=config.router_top_p)
    return torch.bincount(index.flatten(), minlength=num_experts + 1)[:num_experts].float().cpu()
