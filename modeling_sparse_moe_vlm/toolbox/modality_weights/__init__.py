"""α and β of any Transformers vision-language model: read out and steered."""

from .read_out import MODALITIES, ModalityWeights, Step, modality_weights

__all__ = [
    "MODALITIES",
    "ModalityWeights",
    "Step",
    "modality_weights",
]
