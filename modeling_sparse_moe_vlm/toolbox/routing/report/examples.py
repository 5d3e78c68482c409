"""The rows that a routing report shows: their texts and images, and the model's answers with what is behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ....image_reading import read_images
from ...app.answers import Answer
from ...app.chat_model import ChatModel
from ...app.generation import Generation
from ...app.loading import read_attention_matrices
from ...app.recording import decoder_of
from ...app.settings import Settings
from ...data.rows import IMAGE_KEYS, row_name, with_images
from ...expert_modules import base_model_of
from ..passes import RoutedPass, watch_passes
from .contents import Example, ShownRow

Rows = Sequence[Mapping[str, Any]]
ONLY_VIDEOS = "The row has a video and no image. Videos are not drawn."


def shown_row(row: Mapping[str, Any], number: int) -> ShownRow:
    """Returns the texts and images of a row."""
    messages = with_images(row, number)
    texts = [(str(message["role"]), _text_of(message.get("content"))) for message in messages]
    return ShownRow(row_name(row, number), texts, read_images(_images_of(messages)))


def _text_of(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def _images_of(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    parts = [part for message in messages for part in message.get("content") or [] if isinstance(part, dict)]
    return [next(part[key] for key in IMAGE_KEYS if key in part) for part in parts if part["type"] == "image"]


def draw_examples(model: Any, processor: Any, rows: Rows, numbers: Sequence[int], max_new_tokens: int) -> list[Example]:
    """
    Lets the model answer rows, and records the attention and the routing.

    Args:
        model (`PreTrainedModel`):
            The model.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Its processor.
        rows (`Sequence[Mapping]`):
            All rows.
        numbers (`Sequence[int]`):
            Numbers of the rows to answer.
        max_new_tokens (`int`):
            Largest number of tokens of an answer.

    Returns:
        `list[Example]`: The answers. If the model cannot answer a row, the notes of the answer say why.
    """
    chat, settings = _Chat(model, processor), Settings(max_new_tokens=max_new_tokens)
    handles = watch_passes(model, chat.passes.append)
    examples = []
    try:
        with _attention_matrices(model):
            for number in tqdm(numbers, desc="Drawing examples", unit="row", disable=not numbers):
                shown = shown_row(rows[number], number)
                chat.passes.clear()
                prompt = _prompt_of(rows[number], number, shown)
                try:
                    answer = chat.answer(prompt, settings)
                    if not shown.images and any(part["type"] == "video" for turn in prompt for part in turn["content"]):
                        answer.alpha_note = answer.heat_note = answer.experts_note = ONLY_VIDEOS
                except ValueError as error:
                    note = f"The model cannot answer this row: {error}"
                    answer = Answer("", alpha_note=note, heat_note=note, experts_note=note)
                examples.append(Example(shown, answer))
    finally:
        for handle in handles:
            handle.remove()
    return examples


class _Chat(ChatModel):
    """A model for chatting whose answers also have the experts of mixtures of experts of Transformers."""

    def __init__(self, model: Any, processor: Any):
        super().__init__(model, processor)
        self.passes: list[RoutedPass] = []  # of the answer in progress

    def _explained(self, generation: Generation, inputs: Mapping[str, Any], images: Sequence[Image.Image]) -> Answer:
        if self.passes:
            prompt = self.passes[0]
            record = generation.recording
            record.experts = [layer.chosen[:, 0].cpu() for layer in prompt.layers]
            record.layers = [layer.number for layer in prompt.layout.layers]
            record.groups = [
                [(group.name, group.num_experts) for group in layer.groups] for layer in prompt.layout.layers
            ]
        return super()._explained(generation, inputs, images)


def spread_evenly(numbers: Sequence[int], size: int) -> list[int]:
    """Returns some of the numbers, from the first to the last at equal distances."""
    size = min(size, len(numbers))
    if size < 2:
        return list(numbers[:size])
    return [numbers[round(i * (len(numbers) - 1) / (size - 1))] for i in range(size)]


def _prompt_of(row: Mapping[str, Any], number: int, shown: ShownRow) -> list[dict[str, Any]]:
    """Returns the messages before the last answer, with images that are open."""
    messages = with_images(row, number)
    images = iter(shown.images)
    opened: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [{"type": "image", "image": next(images)} if part["type"] == "image" else part for part in parts]
        opened.append({"role": message["role"], "content": parts})
    return opened[:-1] if len(opened) > 1 and opened[-1]["role"] == "assistant" else opened


@contextmanager
def _attention_matrices(model: Any) -> Iterator[None]:
    """A context in which the decoder of a model returns its attention matrices, if it can."""
    decoder = decoder_of(base_model_of(model))
    before = decoder.config._attn_implementation if isinstance(decoder, PreTrainedModel) else None
    read_attention_matrices(base_model_of(model))
    try:
        yield
    finally:
        if before is not None and isinstance(decoder, PreTrainedModel):
            decoder.set_attn_implementation(before)
