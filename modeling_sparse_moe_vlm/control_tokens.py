"""Keeps the texts of a conversation from writing control tokens: what a user types stays text."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import AddedToken
from transformers.convert_slow_tokenizer import normalizers
from transformers.utils import get_json_schema

# A code point that Unicode keeps for the inside of programs. It breaks control tokens that a user typed: no placeholder
# matches a broken one, and the tokenizer drops the mark after it has looked for special tokens.
MARK = "\ufdd0"
# Parts of a message that hold an image or other media, and where.
_MEDIA_TYPES = ("image", "image_url", "video", "audio")
_MEDIA_KEYS = ("image", "url", "path", "base64", "image_url", "video", "audio")
_BRACKETED = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)


class ControlTokens:
    """
    The tokens that steer a conversation, and how texts are written without them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer. A fast one is set up so that it encodes broken tokens as text.
        special (`Iterable[str]`):
            Tokens that no text may write.
        further (`Iterable[str]`):
            Tokens that only the assistant's texts may write, such as `<think>`.
    """

    def __init__(self, tokenizer, special: Iterable[str], further: Iterable[str] = ()):
        special = list(special)
        everything = [*special, *further]
        refused = _set_up(tokenizer, everything)
        self._of_assistant = _Breaker(special, refused)
        self._of_others = _Breaker(everything, refused)

    def as_text(self, node: Any, name: str, is_assistant: bool = False) -> Any:
        """
        A copy of messages, tools or documents (or of a part of them) in which no text can become a control token.

        Args:
            node:
                A string, or lists, dicts, dataclasses and Pydantic models that hold strings.
            name (`str`):
                What the message of an error calls the node.

        Raises:
            ValueError: If a text holds lone surrogates, or a control token that the tokenizer cannot encode as text.
        """
        breaker = self._of_assistant if is_assistant else self._of_others
        if isinstance(node, str):
            return breaker.break_text(node, name)
        if isinstance(node, (list, tuple)):
            copies = [self.as_text(item, f"{name}[{i}]", is_assistant) for i, item in enumerate(node)]
            breaker.check_joined(node, name)
            return copies
        node = _as_dict(node)
        if not isinstance(node, dict):
            return node
        if node.get("type") == "text" or node.get("type") in _MEDIA_TYPES:
            # Rows of a table have every key of every part.
            node = {key: value for key, value in node.items() if value is not None}
        is_media = node.get("type") in _MEDIA_TYPES
        is_assistant = is_assistant or node.get("role") == "assistant"
        copy = {}
        for key, value in node.items():
            if is_media and key in _MEDIA_KEYS:
                copy[key] = value
                continue
            inside = f"{name}[{key!r}]"
            if key in ("role", "type") and isinstance(value, str):
                copy[key] = self._of_others.break_name(value, inside)
            else:
                # Templates write the keys of arguments and schemas, too.
                new_key = self._of_others.break_name(key, f"a key of {name}") if isinstance(key, str) else key
                copy[new_key] = self.as_text(value, inside, is_assistant)
        return copy


class _Breaker:
    """Breaks some tokens in texts."""

    def __init__(self, tokens: list[str], refused: set[str]):
        breakable = [token for token in tokens if token not in refused]
        rests: dict[str, list[str]] = {}
        for token in breakable:
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
        # Only the first character is consumed, so that tokens that overlap are all broken.
        self._starts = _any_of(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
        self._prefixes = {token[:length] for token in breakable for length in range(1, len(token))}
        self._longest = max(map(len, self._prefixes), default=0)
        self._refused = _any_of(re.escape(token) for token in sorted(set(tokens) & refused, key=len, reverse=True))

    def break_text(self, text: str, name: str) -> str:
        text = self._break(text, name)
        # The next text may go on where this one ends, and templates may strip it first.
        stripped = text.rstrip()
        for end in (text, stripped):
            if any(end[-length:] in self._prefixes for length in range(1, self._longest + 1)):
                return end + MARK + text[len(end) :]
        return text

    def break_name(self, text: str, name: str) -> str:
        """The same for a role, type or key, which templates compare: plain names stay as they are."""
        return text if text.isidentifier() else self._break(text, name)

    def check_joined(self, parts: list | tuple, name: str) -> None:
        """Raises `ValueError` if parts of a message make up a token that the tokenizer cannot encode as text."""
        given = [part.get("text") if isinstance(part, dict) else part for part in parts]
        # What is not text, such as an image, keeps texts apart.
        texts = [text if isinstance(text, str) else "\0" for text in given]
        for joined in ("".join(texts), "".join(text.strip() for text in texts)):
            self._refuse(joined, name)

    def _break(self, text: str, name: str) -> str:
        check_encodable(text, name)
        self._refuse(text, name)
        return self._starts.sub(rf"\g<0>{MARK}", text)

    def _refuse(self, text: str, name: str) -> None:
        found = self._refused.search(text)
        if found:
            raise ValueError(
                f"{name} holds the control token {found.group()!r}, which this tokenizer cannot encode as text: remove "
                "it, or use a fast tokenizer whose control tokens are not ordinary words."
            )


def control_tokens(tokenizer, chat_template: str, image_token: str) -> tuple[list[str], list[str]]:
    """
    Finds the tokens that steer a conversation.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        chat_template (`str`):
            The chat template in use.
        image_token (`str`):
            The placeholder of an image.

    Returns:
        `tuple[list[str], list[str]]`: the special tokens, and further added tokens that are not words: those that
        `tokenizer.chat_control_tokens` lists, or else those of the template and those in brackets, such as `<think>`.
    """
    special, further = [image_token], []
    listed = getattr(tokenizer, "chat_control_tokens", None)
    for token in tokenizer.added_tokens_decoder.values():
        content = token.content
        # Templates write white space as text, even where it is a token.
        if content == image_token or not content.strip():
            continue
        if token.special:
            special.append(content)
        elif listed is not None:
            if content in listed:
                further.append(content)
        elif not content.isalnum() and (_BRACKETED.fullmatch(content) or content in chat_template):
            further.append(content)
    return special, further


def check_encodable(text: str, name: str) -> None:
    """Raises `ValueError` if a text holds lone surrogates, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds a lone surrogate (at character {error.start}), which is not text: decode its source as "
            "UTF-8, or drop it."
        ) from None


def as_schemas(tools: Any) -> Any:
    """Tools with the JSON schemas of those that are functions, whose texts would else go unread."""
    if not isinstance(tools, (list, tuple)):
        return tools
    return [get_json_schema(tool) if inspect.isfunction(tool) or inspect.ismethod(tool) else tool for tool in tools]


def _set_up(tokenizer, tokens: list[str]) -> set[str]:
    """
    Sets a tokenizer up so that broken tokens are encoded as text.

    Returns:
        `set[str]`: The tokens that cannot be: all of a slow tokenizer, and those that are ordinary words.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set(tokens)
    known = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    for token in tokens:
        added = known[token]
        if added.normalized:
            # Looked for before normalisation, so before the marks are dropped.
            options = {key: getattr(added, key) for key in ("special", "single_word", "lstrip", "rstrip")}
            tokenizer.add_tokens([AddedToken(token, normalized=False, **options)], special_tokens=added.special)
    normalizer = backend.normalizer
    if normalizer is None or MARK in normalizer.normalize_str(f"a{MARK}a"):
        drop = normalizers.Replace(MARK, "")
        backend.normalizer = drop if normalizer is None else normalizers.Sequence([drop, normalizer])
    refused = {token for token in tokens if len(token) < 2}
    broken = [token for token in tokens if len(token) >= 2 and token != tokenizer.unk_token]
    if broken:
        texts = [token[0] + MARK + token[1:] for token in broken]
        all_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = tokenizer.convert_tokens_to_ids(broken)
        refused |= {token for token, i, found in zip(broken, ids, all_ids, strict=True) if i in found}
    return refused


def _as_dict(node: Any) -> Any:
    """Dicts of objects that stand for messages, as Transformers makes them; anything else as it is."""
    if isinstance(node, Mapping):
        return dict(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    if callable(getattr(node, "model_dump", None)):
        return node.model_dump()
    return node


def _any_of(patterns: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(patterns) or "(?!)")  # which matches nothing
