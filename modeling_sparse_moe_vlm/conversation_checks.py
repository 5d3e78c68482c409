"""Checks of the inputs of the processor: conversations, and the numbers of images and image tokens."""

from __future__ import annotations

from typing import Any

# Types that cannot be a message or a content part. Other objects, such as dataclasses and Pydantic models, can be.
_PLAIN = (str, bytes, int, float, list, tuple, type(None))


def messages_of(conversation: Any) -> Any:
    """Returns the lists of messages, including those of objects with an attribute `messages`."""
    conversation = getattr(conversation, "messages", conversation)
    if isinstance(conversation, (list, tuple)):
        return [getattr(item, "messages", item) for item in conversation]
    return conversation


def check_conversation(conversation: Any, parts: bool) -> None:
    """Raises `ValueError` if this is not a conversation or a list of them. `parts`: also checks the content parts."""
    if not isinstance(conversation, list):
        raise ValueError(f"`conversation` must be a list of messages, got {type(conversation)}.")
    if not conversation:
        raise ValueError("`conversation` is empty: pass at least one message.")
    if isinstance(conversation[0], (list, tuple)):
        named = {f"conversation[{i}]": messages for i, messages in enumerate(conversation)}
    else:
        named = {"conversation": conversation}
    for name, messages in named.items():
        if not isinstance(messages, (list, tuple)):
            raise ValueError(f"{name} must be a list of messages, got {type(messages)}.")
        for i, message in enumerate(messages):
            if isinstance(message, _PLAIN):
                raise ValueError(f"{name}[{i}] must be a message with `role` and `content`, got {message!r}.")
            content = message.get("content") if isinstance(message, dict) else None
            if parts and content is not None and not isinstance(content, str):
                _check_parts(content, f"{name}[{i}]['content']")


def _check_parts(content: Any, name: str) -> None:
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{name} must be a string or a list of parts, got {content!r}.")
    for i, part in enumerate(content):
        if isinstance(part, _PLAIN):
            raise ValueError(f"{name}[{i}] must be a dict, such as {{'type': 'text', 'text': …}}, got {part!r}.")
        if isinstance(part, dict) and not isinstance(part.get("type"), str):
            raise ValueError(f"{name}[{i}] lacks `type`: add 'text' or 'image'.")


def check_numbers(images: list, num_tokens: list[int], image_token: str, kind: str = "images") -> None:
    """
    Raises `ValueError` if the numbers of images and image tokens differ, in total or in any text.

    Args:
        images (`list`):
            For each text an image, a list of images or `None`, or all images.
        num_tokens (`list[int]`):
            Number of image tokens of each text.
        image_token (`str`):
            The image token.
        kind (`str`, *optional*, defaults to `"images"`):
            What is counted, for error messages.
    """
    rule = f"the number of {image_token} tokens in the prompts should be the same as the number of {kind} passed"
    if any(image is None or isinstance(image, list) for image in images):
        if len(images) != len(num_tokens):
            raise ValueError(f"{rule}: `{kind}` is for {len(images)} texts, but `text` has {len(num_tokens)}.")
        for i, (row, number) in enumerate(zip(images, num_tokens, strict=True)):
            num_images = sum(image is not None for image in (row if isinstance(row, list) else [row]))
            if num_images != number:
                raise ValueError(f"{rule}: text[{i}] has {number} tokens, but {num_images} {kind}.")
    elif len(images) != sum(num_tokens):
        raise ValueError(f"{rule}: there are {sum(num_tokens)} tokens, but {len(images)} {kind}.")
