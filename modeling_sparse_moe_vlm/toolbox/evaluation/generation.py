"""Evaluation: a model answers questions about pictures, and its answers are scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..data.collator import with_images

METRICS = Path(__file__).parent / "metrics"


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
            Arguments of `model.generate`; greedy decoding with 32 new tokens by default.

    Returns:
        `list[str]`: one answer per row.

    Raises:
        ValueError: If the pictures of a row are not as many as its placeholders; the message names the row.
    """
    generate_kwargs = {"max_new_tokens": 32, "do_sample": False} | generate_kwargs
    was_training = model.training
    model.eval()
    answers: list[str] = []
    try:
        for start in tqdm(range(0, len(rows), batch_size), desc="Answering", unit="batch"):
            batch = range(start, min(start + batch_size, len(rows)))
            inputs = processor.apply_chat_template(
                [_questions(with_images(rows[i], i)) for i in batch],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            ).to(model.device, dtype=model.dtype)
            output = model.generate(**inputs, **generate_kwargs)
            answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    finally:
        model.train(was_training)
    return answers


def _questions(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages
