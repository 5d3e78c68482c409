"""Marks what the assistant says, for chat templates that do not mark it with `{% generation %}`."""

from __future__ import annotations

import re
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .rows import apply_chat_template, joined_texts

# A template that joins the segments of a rendered conversation.
SEGMENTS_TEMPLATE = (
    "{%- for segment in messages[0].segments -%}"
    "{%- if segment[0] -%}{%- generation -%}{{- segment[1] -}}{%- endgeneration -%}"
    "{%- else -%}{{- segment[1] -}}{%- endif -%}{%- endfor -%}"
)


def marks_targets(processor: ProcessorMixin | PreTrainedTokenizerBase) -> bool:
    """Whether the chat template of a processor marks the turns of the assistant, or there is no template."""
    template = getattr(processor, "chat_template", None)
    return not isinstance(template, str) or re.search(r"\{%-?\s*generation\b", template) is not None


def with_segments(
    processor: ProcessorMixin | PreTrainedTokenizerBase, messages: list[dict[str, Any]], name: str
) -> list[dict[str, Any]]:
    """
    Renders a conversation and adds its segments to its first message, where [`SEGMENTS_TEMPLATE`] reads them. What the
    assistant says starts after the prompt for it (`add_generation_prompt`), and ends with the turn, without white
    space after it.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of the model.
        messages (`list[dict]`):
            The conversation.
        name (`str`):
            Name of the row in error messages.

    Returns:
        `list[dict]`: The messages. The first one has `segments`: pairs of a boolean, whether the assistant says it, and
        a text.

    Raises:
        ValueError: If the chat template fails, or renders an earlier part of a conversation differently than the part
            of the whole conversation, so that the turns of the assistant cannot be found.
    """
    if isinstance(processor, PreTrainedTokenizerBase):
        messages = joined_texts(messages, name)
    try:
        whole = _render(processor, messages, False)
        segments: list[tuple[bool, str]] = []
        position = 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = _render(processor, messages[:number], True) if number else ""
            until = _render(processor, messages[: number + 1], False)
            if not (until.startswith(before) and whole.startswith(until) and len(before) >= position):
                raise ValueError(
                    "the chat template renders the beginning of a conversation in different ways, so the turns of the "
                    "assistant cannot be found. Mark them with `{% generation %}` in the chat template."
                )
            answer = until[len(before) :].rstrip()
            segments += [(False, whole[position : len(before)]), (True, answer)]
            position = len(before) + len(answer)
    except Exception as error:  # a template raises errors of Jinja
        raise ValueError(f"{name} cannot be processed: {error}") from error
    segments.append((False, whole[position:]))
    return [messages[0] | {"segments": segments}, *messages[1:]]


def apply_marked_template(
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    conversations: dict[int, list[dict[str, Any]]],
    names: dict[int, str],
) -> BatchFeature:
    """
    Makes inputs of a model of conversations, padded on the right, with `assistant_masks`.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of the model.
        conversations (`dict[int, list[dict]]`):
            Messages of each conversation, by the number of its row.
        names (`dict[int, str]`):
            Name of each row in error messages.

    Raises:
        ValueError: If a conversation cannot be processed. The message names its row.
    """
    options: dict[str, Any] = {}
    if not marks_targets(processor):
        options["chat_template"] = SEGMENTS_TEMPLATE
        conversations = {i: with_segments(processor, own, names[i]) for i, own in conversations.items()}
    return apply_chat_template(
        processor, conversations, padding_side="right", names=names, return_assistant_tokens_mask=True, **options
    )


def _render(processor: Any, messages: list[dict[str, Any]], is_prompt: bool) -> str:
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
