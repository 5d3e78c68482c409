"""Normalisation of the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SparseMoeVlmRMSNorm(nn.RMSNorm):
    """
    Root-mean-square normalisation (arXiv 1910.07467) by torch's own function, which is one kernel on GPUs. The result
    has the dtype of the input, whatever that of the weight (mixed precision).
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight.to(hidden_states.dtype), self.eps)
