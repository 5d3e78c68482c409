"""A model answers questions about images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..data.rows import apply_chat_template, with_images
from ..evaluation_mode import evaluating


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Sequence[dict[str, Any]],
    batch_size: int = 64,
    **generate_kwargs: Any,
) -> list[str]:
    """
    Lets a model continue conversations, in batches and with a progress bar.

    Args:
        model (`PreTrainedModel`):
            Any image-text-to-text model.
        processor (`ProcessorMixin`):
            Its processor.
        rows (`Sequence[dict]`):
            Rows as [`~toolbox.data.VisionLanguageCollator`] takes them; a final assistant turn is left out.
        batch_size (`int`, defaults to 64):
            Number of conversations per batch.
        generate_kwargs:
            Arguments of `model.generate`. By default, without a `generation_config`, greedy decoding of up to 32 new
            tokens (or up to `max_length`, if given).

    Returns:
        `list[str]`: one answer per row.

    Raises:
        ValueError: If a row is wrong (see [`~toolbox.data.rows.with_images`]), cannot be processed or has nothing to
            answer; the message names the row.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if "generation_config" not in generate_kwargs:
        limit = {} if "max_length" in generate_kwargs else {"max_new_tokens": 32}
        generate_kwargs = limit | {"do_sample": False} | generate_kwargs
    answers: list[str] = []
    with evaluating(model):
        for start in tqdm(range(0, len(rows), batch_size), desc="Answering", unit="batch"):
            batch = range(start, min(start + batch_size, len(rows)))
            inputs = apply_chat_template(
                processor,
                {i: _questions(with_images(rows[i], i), i) for i in batch},
                padding_side="left",
                add_generation_prompt=True,
            ).to(model.device, dtype=model.dtype)
            output = model.generate(**inputs, **generate_kwargs)
            answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _questions(messages: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    questions = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not questions:
        raise ValueError(f"row {number} has nothing to answer: its only message is the assistant's.")
    return questions
