"""Routing statistics: which experts the tokens of each modality go to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from tqdm.auto import tqdm

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
            Model inputs.

    Returns:
        `dict[str, torch.Tensor]`: by modality, `(sparse layers, num_experts)`, the share of the modality's expert
        slots that went to each expert; rows sum to 1, or are 0 where no such token came.
    """
    config = model.config.text_config
    load: dict[str, torch.Tensor] = {}
    for batch in tqdm(batches, desc="Measuring routing", unit="batch"):
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        outputs = model(**inputs, output_router_logits=True)
        type_ids = inputs["mm_token_type_ids"].flatten()
        real = inputs["attention_mask"].flatten().bool()
        for modality_id, modality in enumerate(config.modalities):
            tokens = real & (type_ids == modality_id)
            counts = torch.stack([_count(config, logits[tokens], modality) for logits in outputs.router_logits])
            load[modality] = load.get(modality, 0) + counts
    return {modality: counts / counts.sum(dim=1, keepdim=True).clamp(min=1) for modality, counts in load.items()}


def _count(config, logits: torch.Tensor, modality: str) -> torch.Tensor:
    """Number of slots per expert, `(num_experts,)`."""
    num_experts = logits.shape[1]
    _, index = route(logits, top_k=config.experts_per_token(modality), router=config.router, top_p=config.router_top_p)
    return torch.bincount(index.flatten(), minlength=num_experts + 1)[:num_experts].float().cpu()
