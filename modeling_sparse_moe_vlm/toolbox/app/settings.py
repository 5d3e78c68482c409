"""Settings for an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NO_ADAPTER = "none"


@dataclass(frozen=True)
class Settings:
    """
    Settings for one answer.

    Args:
        adapter (`str`, defaults to `"none"`):
            Name of the adapter.
        image_prior (`float`, defaults to 1.0):
            Factor on the odds of images, `modality_priors={"image": image_prior}`.
        guidance (`float`, defaults to 0.0):
            `modality_guidance`.
        max_new_tokens (`int`, defaults to 128):
            Largest number of new tokens.
        temperature (`float`, defaults to 0.0):
            Temperature of sampling; 0 for greedy decoding.
    """

    adapter: str = NO_ADAPTER
    image_prior: float = 1.0
    guidance: float = 0.0
    max_new_tokens: int = 128
    temperature: float = 0.0

    @property
    def steering(self) -> dict[str, Any]:
        """Arguments that steer the attention. Empty if the attention is not steered."""
        priors = {} if self.image_prior == 1.0 else {"modality_priors": {"image": self.image_prior}}
        return priors | ({"modality_guidance": self.guidance} if self.guidance else {})

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of `generate` for decoding."""
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        return {"max_new_tokens": self.max_new_tokens} | sampling
