"""Continuous batching of Transformers (`generate_batch`, `transformers serve --continuous-batching`): text only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class ContinuousTextBatching:
    """
    Mixin for generative models with images. Continuous batching passes only token ids to the model, so the mixin
    refuses prompts with placeholders, which the model would otherwise read as text.
    """

    def placeholder_tokens(self) -> set[int]:
        """
        Returns the ids of the placeholder tokens of images and further modalities.

        Returns:
            `set[int]`: The ids.
        """
        raise NotImplementedError

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """
        Creates a manager for continuous batching, which only supports text: see
        [`~transformers.ContinuousMixin.init_continuous_batching`].

        Args:
            args (`Any`):
                Arguments of [`~transformers.ContinuousMixin.init_continuous_batching`].
            kwargs (`Any`):
                Keyword arguments of [`~transformers.ContinuousMixin.init_continuous_batching`].

        Returns:
            `ContinuousBatchingManager`: The manager. It raises `ValueError` for prompts with placeholders.
        """
        manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        add_request = type(manager).add_request

        def add_text_request(input_ids, *args, **kwargs):
            self._refuse_placeholders([input_ids])
            return add_request(manager, input_ids, *args, **kwargs)

        manager.add_request = add_text_request
        return manager

    def generate_batch(self, inputs: Iterable[Iterable[int]], *args: Any, **kwargs: Any) -> Any:
        """
        Generates text for a batch of prompts with continuous batching, which only supports text: see
        [`~transformers.ContinuousMixin.generate_batch`].

        Args:
            inputs (`list[list[int]]`):
                Token ids of the prompts.
            args (`Any`):
                Other arguments of [`~transformers.ContinuousMixin.generate_batch`].
            kwargs (`Any`):
                Other keyword arguments of [`~transformers.ContinuousMixin.generate_batch`].

        Returns:
            `dict`: The generated outputs.

        Raises:
            ValueError: If a prompt has placeholders of images or further modalities.
        """
        self._refuse_placeholders(inputs)
        return super().generate_batch(inputs, *args, **kwargs)  # type: ignore[misc]

    def _refuse_placeholders(self, prompts: Iterable[Iterable[int]]) -> None:
        """Raises `ValueError` if a prompt has placeholders of images or further modalities."""
        placeholders = self.placeholder_tokens()
        for number, prompt in enumerate(prompts):
            found = sorted(placeholders.intersection(int(token) for token in prompt))
            if found:
                raise ValueError(
                    f"prompt {number} has placeholder tokens {found}, but continuous batching does not support "
                    "images: use `generate` for prompts with images."
                )
