"""Prevents the texts of a conversation from adding control tokens: control tokens that a user types are plain text."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import AddedToken
from transformers.convert_slow_tokenizer import normalizers
from transformers.utils import get_json_schema

# A code point that Unicode reserves for internal use by programs. It is inserted into control tokens that a user typed,
# so that they are not recognised as special tokens or placeholders. The tokenizer removes it after it has looked for
# special tokens.
MARK = "\ufdd0"
# Types of content parts with an image or other media, and the keys that contain the media.
_MEDIA_TYPES = ("image", "image_url", "video", "audio")
_MEDIA_KEYS = ("image", "url", "path", "base64", "image_url", "video", "audio")
_BRACKETED = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)


class ControlTokens:
    """
    Converts texts so that the tokenizer encodes the control tokens in them as plain text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer. A fast tokenizer is changed in place, so that it encodes marked control tokens as plain text.
        special (`Iterable[str]`):
            Control tokens that are plain text in all messages.
        further (`Iterable[str]`, *optional*):
            Control tokens that are plain text except in messages of the assistant, such as `<think>`.
    """

    def __init__(self, tokenizer, special: Iterable[str], further: Iterable[str] = ()):
        special = list(special)
        everything = [*special, *further]
        refused = _set_up(tokenizer, everything)
        self._of_assistant = _Breaker(special, refused)
        self._of_others = _Breaker(everything, refused)

    def as_text(self, node: Any, name: str, is_assistant: bool = False) -> Any:
        """
        Returns a copy of messages, tools or documents (or of a part of them) whose texts contain no control tokens.

        Args:
            node (`Any`):
                A string, or a list, dict, dataclass or Pydantic model that contains strings.
            name (`str`):
                Name of the node in error messages.
            is_assistant (`bool`, *optional*, defaults to `False`):
                Whether the node is part of a message of the assistant.

        Returns:
            `Any`: The copy.

        Raises:
            ValueError: If a text contains lone surrogates or a control token that the tokenizer cannot encode as plain
                text.
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
            # In the rows of a dataset, all parts have the same keys. Those without a value are `None`.
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
                # Templates also render the keys of arguments and schemas.
                new_key = self._of_others.break_name(key, f"a key of {name}") if isinstance(key, str) else key
                copy[new_key] = self.as_text(value, inside, is_assistant)
        return copy


class _Breaker:
    """
    Inserts a mark into certain tokens in texts.

    Args:
        tokens (`list[str]`):
            The tokens.
        refused (`set[str]`):
            Tokens that raise an error instead, because the tokenizer cannot encode them as plain text.
    """

    def __init__(self, tokens: list[str], refused: set[str]):
        breakable = [token for token in tokens if token not in refused]
        rests: dict[str, list[str]] = {}
        for token in breakable:
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
        # Only the first character is matched, so that the mark is inserted into all overlapping tokens.
        self._starts = _any_of(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
        self._prefixes = {token[:length] for token in breakable for length in range(1, len(token))}
        self._longest = max(map(len, self._prefixes), default=0)
        self._refused = _any_of(re.escape(token) for token in sorted(set(tokens) & refused, key=len, reverse=True))

    def break_text(self, text: str, name: str) -> str:
        """Returns a text with marks in all tokens, and after an incomplete token at its end."""
        text = self._break(text, name)
        # The next text can complete the token, and templates can strip this text first.
        stripped = text.rstrip()
        for end in (text, stripped):
            if any(end[-length:] in self._prefixes for length in range(1, self._longest + 1)):
                return end + MARK + text[len(end) :]
        return text

    def break_name(self, text: str, name: str) -> str:
        """Same as `break_text` for a role, type or key. Identifiers, which templates compare, are not changed."""
        return text if text.isidentifier() else self._break(text, name)

    def check_joined(self, parts: list | tuple, name: str) -> None:
        """Raises `ValueError` if joined parts of a message contain a token that cannot be encoded as plain text."""
        given = [part.get("text") if isinstance(part, dict) else part for part in parts]
        # Parts without text, such as images, separate the texts.
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
                f"{name} contains the control token {found.group()!r}, which this tokenizer cannot encode as text: "
                "remove it, or use a fast tokenizer whose control tokens are not ordinary words."
            )


def control_tokens(tokenizer, chat_template: str, image_token: str) -> tuple[list[str], list[str]]:
    """
    Finds the control tokens of a tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        chat_template (`str`):
            The chat template in use.
        image_token (`str`):
            The placeholder token of an image.

    Returns:
        `tuple[list[str], list[str]]`: The special tokens, and other added tokens that are control tokens: those in
        `tokenizer.chat_control_tokens` if it is set, otherwise those in the template and those in brackets, such as
        `<think>`, except for tokens that are words.
    """
    special, further = [image_token], []
    listed = getattr(tokenizer, "chat_control_tokens", None)
    for token in tokenizer.added_tokens_decoder.values():
        content = token.content
        # Whitespace in templates is text, even if it is a token.
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
    """Raises `ValueError` if a text contains lone surrogates, which tokenizers cannot encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} contains a lone surrogate (at character {error.start}), which is not text: decode its source "
            "as UTF-8, or remove it."
        ) from None


def as_schemas(tools: Any) -> Any:
    """Returns a list of tools with functions replaced by their JSON schemas, so that their texts can be checked."""
    if not isinstance(tools, (list, tuple)):
        return tools
    return [get_json_schema(tool) if inspect.isfunction(tool) or inspect.ismethod(tool) else tool for tool in tools]


def _set_up(tokenizer, tokens: list[str]) -> set[str]:
    """
    Changes a tokenizer so that it encodes marked tokens as plain text.

    Returns:
        `set[str]`: The tokens for which this is not possible: all tokens of a slow tokenizer, and ordinary words.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set(tokens)
    known = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    for token in tokens:
        added = known[token]
        if added.normalized:
            # Unnormalised tokens are matched before normalisation, that is, before the marks are removed.
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
    """Converts mappings, dataclasses and Pydantic models to dicts, as Transformers does. Returns others unchanged."""
    if isinstance(node, Mapping):
        return dict(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    if callable(getattr(node, "model_dump", None)):
        return node.model_dump()
    return node


def _any_of(patterns: Iterable[str]) -> re.Pattern:
    """Returns a pattern that matches any of the patterns."""
    return re.compile("|".join(patterns) or "(?!)")  # matches nothing
