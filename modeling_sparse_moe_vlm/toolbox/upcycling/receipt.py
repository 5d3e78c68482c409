"""Parity receipts: how far the logits of an upcycled model are from those of the dense model that it was made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from ...token_modalities import TokenModalities
from ...upcycled_layers import TokenPlan, token_plan
from ..evaluation_mode import evaluating
from .errors import UpcyclingError
from .starts import seeded_generator

ROWS, LENGTH = 2, 16
# Relative to the dense model's logits. In full precision, sums in another order differ by this much. In half precision,
# the dense model differs by a few steps of the type from its own results in full precision.
FULL_PRECISION_BOUND = 1e-5
STEPS_OF_HALF_PRECISION = 4


@dataclass(frozen=True)
class ParityReceipt:
    """
    The difference between an upcycled model and its dense model on one batch, in evaluation mode.

    Args:
        relative_difference (`float`):
            ‖sparse − dense‖ / ‖dense‖ over all logits (hidden states, if the model has no head).
        max_difference (`float`): Largest difference of two logits.
        same_tokens (`float`): Share of the positions at which both models predict the same token.
        bound (`float`, *optional*): Largest `relative_difference` that was accepted; `None` if the start is not exact.
        dtype (`str`): Type of the weights.
        num_tokens (`int`): Number of tokens of the batch, without padding.
        batch (`str`): `"given"` for a batch of the user, or `"made"` for random tokens of every modality.
        transformers_version (`str`): Version of Transformers that was used.
    """

    relative_difference: float
    max_difference: float
    same_tokens: float
    bound: float | None
    dtype: str
    num_tokens: int
    batch: str
    transformers_version: str = transformers_version

    @property
    def holds(self) -> bool:
        return self.bound is None or self.relative_difference <= self.bound

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        batch = "random" if self.batch == "made" else self.batch
        bound = "not exact by design" if self.bound is None else f"bound {self.bound:.1e}"
        return (
            f"parity on {self.num_tokens} tokens ({batch} batch, {self.dtype}): relative difference "
            f"{self.relative_difference:.1e} ({bound}), largest {self.max_difference:.1e}, the same token at "
            f"{self.same_tokens:.1%} of the positions"
        )


def default_bound(dtype: torch.dtype) -> float:
    """Returns the largest relative difference of outputs that counts as exact, for weights of a type."""
    eps = torch.finfo(dtype).eps
    return FULL_PRECISION_BOUND if eps <= torch.finfo(torch.float32).eps else STEPS_OF_HALF_PRECISION * eps


@torch.no_grad()
def dense_outputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor:
    """Returns the logits `(B, T, V)` of a model in evaluation mode (hidden states, if it has no head), on the CPU."""
    with evaluating(model):
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    found = outputs.get("logits")
    return (outputs.last_hidden_state if found is None else found).float().cpu()


def made_batch(model: PreTrainedModel, placeholders: set[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Draws tokens for a model, `(2, 16)`, none of which is a placeholder for an image or another modality."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    allowed = torch.tensor([token for token in range(min(vocabulary, 4096)) if token not in placeholders])
    chosen = torch.randint(len(allowed), (ROWS, LENGTH), generator=seeded_generator(seed, "parity batch"))
    input_ids = allowed[chosen].to(model.device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def parity(
    dense: torch.Tensor, model: Any, batch: Mapping[str, Any], *, is_given: bool, bound: float | None
) -> ParityReceipt:
    """
    Compares an upcycled model with the outputs of its dense model. In a batch of random tokens, the tokens are assigned
    to all modalities in turn, so that the experts of all modalities run. This does not affect the dense model.

    Args:
        dense (`torch.Tensor` of shape `(B, T, V)`):
            Outputs of the dense model: see [`dense_outputs`].
        model (`PreTrainedModel`):
            The upcycled model.
        batch (`Mapping[str, Any]`):
            Inputs of both models.
        is_given (`bool`):
            Whether the user gave the batch.
        bound (`float`, *optional*):
            See [`ParityReceipt`].
    """
    if is_given:
        sparse = dense_outputs(model, batch)
    else:
        with token_plan(_plan_of_all_modalities(model, batch["input_ids"])):
            sparse = dense_outputs(model, batch)
    mask = batch.get("attention_mask")
    is_real = torch.ones(dense.shape[:2], dtype=torch.bool)
    if torch.is_tensor(mask) and mask.shape == dense.shape[:2]:
        is_real = mask.bool().cpu()
    dense, sparse = dense[is_real], sparse[is_real]
    difference = (sparse - dense).double()
    relative = (difference.norm() / dense.double().norm().clamp(min=torch.finfo(torch.float64).tiny)).item()
    return ParityReceipt(
        relative_difference=relative if math.isfinite(relative) else math.inf,
        max_difference=difference.abs().max().item(),
        same_tokens=(sparse.argmax(-1) == dense.argmax(-1)).float().mean().item(),
        bound=bound,
        dtype=str(model.dtype).removeprefix("torch."),
        num_tokens=int(is_real.sum()),
        batch="given" if is_given else "made",
    )


def _plan_of_all_modalities(model: Any, input_ids: torch.Tensor) -> TokenPlan:
    config = model.experts_config
    ids = (torch.arange(input_ids.numel(), device=input_ids.device) % len(config.modalities)).view(input_ids.shape)
    return TokenPlan.of(config, model.routing_planner, TokenModalities(ids, None), input_ids.device)


def check_receipt(receipt: ParityReceipt) -> None:
    """Raises `UpcyclingError` if the upcycled model does not compute what the dense model computes."""
    if not receipt.holds:
        raise UpcyclingError(
            f"the upcycled model's outputs are not those of the dense model: {receipt}. It is not returned. Pass a "
            "larger `parity_bound` to accept the difference, or `parity_bound=float('inf')` to accept any."
        )
