"""The normalisation layer of the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SparseMoeVlmRMSNorm(nn.RMSNorm):
    """
    Root mean square normalisation (arXiv 1910.07467) with the function of torch, which is a single kernel on GPUs. The
    output has the dtype of the input, even if the weight has another dtype (mixed precision).
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalises the hidden states."""
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight.to(hidden_states.dtype), self.eps)
