"""Generation of answers to questions about images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..data.rows import apply_chat_template, row_name, with_images
from ..evaluation_mode import evaluating


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Sequence[dict[str, Any]],
    batch_size: int = 64,
    **generate_kwargs: Any,
) -> list[str]:
    """
    Generates the next assistant turn of conversations, in batches and with a progress bar.

    Args:
        model (`PreTrainedModel`):
            Any image-text-to-text model of Transformers. It is in evaluation mode during the call.
        processor (`ProcessorMixin`):
            Processor of the model.
        rows (`Sequence[dict]`):
            Rows in the form that [`~toolbox.data.VisionLanguageCollator`] takes. If the last message is a turn of the
            assistant, it is left out.
        batch_size (`int`, *optional*, defaults to 64):
            Number of conversations per batch.
        generate_kwargs:
            Additional arguments of `model.generate`. Unless they contain a `generation_config`, decoding is greedy and
            generates up to 32 new tokens. Pass `max_new_tokens`, `max_length` or `do_sample` to change this.

    Returns:
        `list[str]`: One answer per row, without special tokens.

    Raises:
        ValueError: If `batch_size` is less than 1, or if a row is malformed (see
            [`~toolbox.data.rows.with_images`]), cannot be processed or contains only the turn of the assistant. The
            message names the row.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    answers: list[str] = []
    with evaluating(model):
        for start in tqdm(range(0, len(rows), batch_size), desc="Answering", unit="batch"):
            batch = {i: rows[i] for i in range(start, min(start + batch_size, len(rows)))}
            answers += answer_batch(model, processor, batch, **generate_kwargs)
    return answers


@torch.no_grad()
def answer_batch(
    model: PreTrainedModel, processor: ProcessorMixin, batch: dict[int, dict[str, Any]], **generate_kwargs: Any
) -> list[str]:
    """
    Generates the next assistant turn of the conversations of one batch.

    Args:
        model (`PreTrainedModel`):
            Model in evaluation mode.
        processor (`ProcessorMixin`):
            Processor of the model.
        batch (`dict[int, dict]`):
            Rows by number, in the form that [`generate_answers`] takes.
        generate_kwargs:
            Additional arguments of `model.generate`, as for [`generate_answers`].

    Returns:
        `list[str]`: One answer per row, without special tokens.

    Raises:
        ValueError: As [`generate_answers`] does.
    """
    if "generation_config" not in generate_kwargs:
        limit = {} if "max_length" in generate_kwargs else {"max_new_tokens": 32}
        generate_kwargs = limit | {"do_sample": False} | generate_kwargs
    inputs = apply_chat_template(
        processor,
        {i: _questions(with_images(row, i), row_name(row, i)) for i, row in batch.items()},
        padding_side="left",
        names={i: row_name(row, i) for i, row in batch.items()},
        add_generation_prompt=True,
    ).to(model.device, dtype=model.dtype)
    output = model.generate(**inputs, **generate_kwargs)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _questions(messages: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    questions = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not questions:
        raise ValueError(
            f"{name} has nothing to answer: its only message is from the assistant. Add a message of the user."
        )
    return questions
