"""Reads and steers the attention weights of modalities (α: image, β: text) in Transformers vision-language models."""

from .read_out import MODALITIES, ModalityWeights, Step, modality_weights

__all__ = [
    "MODALITIES",
    "ModalityWeights",
    "Step",
    "modality_weights",
]
