"""Converts a conversation to the messages of the model and to the messages of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .answers import Answer
from .chat_model import read_image


@dataclass
class Turn:
    """
    A question with its answer.

    Args:
        question (`str`):
            Text of the question.
        images (`list[str]`):
            Paths of the images that came with it.
        answer ([`~answers.Answer`], *optional*):
            The answer, once it is complete.
    """

    question: str
    images: list[str]
    answer: Answer | None = None


def image_paths(turns: Sequence[Turn]) -> list[str]:
    """Returns the paths of all images of a conversation, in order."""
    return [path for turn in turns for path in turn.images]


def to_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """
    Converts a conversation to chat messages, with its images as PIL images.

    Args:
        turns (`Sequence[Turn]`):
            The conversation.

    Returns:
        `list[dict]`: Two messages per turn, or one if the answer is missing.

    Raises:
        ValueError: If an image cannot be read; the message names its file.
    """
    messages: list[dict[str, Any]] = []
    for turn in turns:
        content: list[dict[str, Any]] = [{"type": "image", "image": read_image(path)} for path in turn.images]
        if turn.question:
            content.append({"type": "text", "text": turn.question})
        messages.append({"role": "user", "content": content})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer.text}]})
    return messages


def to_bubbles(turns: Sequence[Turn], answer_so_far: str = "") -> list[dict[str, Any]]:
    """
    Converts a conversation to the messages of gradio's `Chatbot`.

    Args:
        turns (`Sequence[Turn]`):
            The conversation.
        answer_so_far (`str`, *optional*):
            Beginning of an answer that is not yet complete.

    Returns:
        `list[dict]`: For each turn, its images, its question and its answer.
    """
    bubbles: list[dict[str, Any]] = []
    for turn in turns:
        bubbles += [{"role": "user", "content": {"path": path}} for path in turn.images]
        if turn.question:
            bubbles.append({"role": "user", "content": turn.question})
        text = answer_so_far if turn.answer is None else turn.answer.text or "(no words)"
        bubbles.append({"role": "assistant", "content": text or "…"})
    return bubbles


def turn_of_bubble(turns: Sequence[Turn], index: int) -> int:
    """Returns the number of the turn that a message of [`to_bubbles`] belongs to."""
    ends = 0
    for number, turn in enumerate(turns):
        ends += len(turn.images) + bool(turn.question) + 1
        if index < ends:
            return number
    return len(turns) - 1
