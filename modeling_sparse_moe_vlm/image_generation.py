"""Generation from prompts with images."""

from __future__ import annotations

import inspect
from typing import Any

from transformers.generation import GenerationMixin
from transformers.utils import logging

from .cache_name import CACHE_NAME
from .continuous_batching import ContinuousTextBatching
from .language_head import SparseMoeVlmLanguageHead

logger = logging.get_logger(__name__)


class SparseMoeVlmImageGeneration(ContinuousTextBatching, SparseMoeVlmLanguageHead, GenerationMixin):
    """Base class of the whole model with a language head, which generates text from prompts with images."""

    model: Any

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, mm_token_type_ids=None, **kwargs):
        """
        Same as in Transformers, but warns if the prompt has image placeholders and `generate` does not pass the images,
        which is the case for assistant models. The model then reads the prompt without images.
        """
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds, mm_token_type_ids, **kwargs)
        if model_inputs.get("pixel_values") is None and model_inputs.get("mm_encoder_outputs") is None:
            if self.model.has_placeholders(model_inputs.get("input_ids"), model_inputs.get(CACHE_NAME)):
                logger.warning_once("The prompt has image placeholders, but it is continued without any images.")
            model_inputs["mm_encoder_outputs"] = {}
        cache = model_inputs.get(CACHE_NAME)
        if cache is not None and cache.get_seq_length() > 0:
            model_inputs.pop("modality_values", None)  # their tokens are already in the cache
        return model_inputs

    def placeholder_tokens(self) -> set[int]:
        """
        Returns the ids of the placeholder tokens of images and further modalities.

        Returns:
            `set[int]`: The ids.
        """
        return set(self.config.placeholder_ids.values())

    def _get_candidate_generator(self, *args, **kwargs):
        """Same as in Transformers, but does not pass modality ids to an assistant that would refuse them."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        assistant = getattr(generator, "assistant_model", None)
        if assistant is not None:
            methods = (assistant.prepare_inputs_for_generation, assistant.forward)
            if not any("mm_token_type_ids" in inspect.signature(method).parameters for method in methods):
                generator.assistant_kwargs.pop("mm_token_type_ids", None)
        return generator

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Same as in Transformers, but also repeats the values of further modalities, which are in a dict."""
        values = model_kwargs.get("modality_values")
        if values and expand_size > 1:
            embeds = model_kwargs.get("inputs_embeds")
            ids = self.model.get_mm_token_type_ids(
                input_ids if embeds is None else None, embeds, model_kwargs.get("mm_token_type_ids")
            )
            model_kwargs["modality_values"] = self.model.modality_encoders.repeat(values, ids, expand_size)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
