"""Processor: chat template, tokenizer and image processor in one, with a modality id for every token."""

from __future__ import annotations

from .versions import SUPPORTED_TRANSFORMERS  # noqa: F401

# isort: split

import re
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import AddedToken, image_utils
from transformers.convert_slow_tokenizer import normalizers
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

DEFAULT_CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}
{{- image_token | default('<image>') -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- else -%}
{{- raise_exception("content parts must be of type 'text' or 'image', got '" ~ part['type'] ~ "'") -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- render(message['content']) + '<|im_end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- render(message['content']) + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# A code point that Unicode keeps for the inside of programs. It breaks image tokens that a user typed: no placeholder
# matches a broken one, and the tokenizer drops the mark after it has looked for special tokens.
_MARK = "\ufdd0"
_MEDIA_TYPES = ("image", "image_url", "video", "audio")


class SparseMoeVlmProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    _defaults = {"text_kwargs": {"padding": False, "return_mm_token_type_ids": True}}


class SparseMoeVlmProcessor(ProcessorMixin):
    r"""
    Makes model inputs from text, pictures and conversations.

    The text holds one image token per picture, which becomes `image_seq_length` of them. In conversations
    (`apply_chat_template`) only content parts of type `"image"` are pictures: the image token typed inside a text part
    stays text.

    Args:
        image_processor (`BaseImageProcessor`):
            The image processor of the vision tower.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of the decoder; its vocabulary must hold the image token.
        image_seq_length (`int`):
            Number of tokens that one picture becomes: `config.image_seq_length`.
        chat_template (`str`, *optional*):
            Jinja template; ChatML by default.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            Placeholder of a picture in the text.

    Raises:
        ValueError: If the vocabulary lacks the image token.

    ```python
    >>> processor = SparseMoeVlmProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    >>> inputs = processor(text="<image> What is this?", images=picture, return_tensors="pt")
    >>> sorted(inputs)
    ['attention_mask', 'input_ids', 'mm_token_type_ids', 'pixel_values']
    ```
    """

    valid_processor_kwargs = SparseMoeVlmProcessorKwargs
    return_mm_token_type_ids = True

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 49,
        chat_template: str | None = None,
        image_token: str = "<image>",
    ):
        if image_token not in tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizer's vocabulary lacks the image token {image_token!r}: add it with "
                f"`tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}})` and resize the "
                "model's embeddings, or name an existing token with `image_token`."
            )
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self._can_be_text = _tell_from_text(tokenizer, image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or DEFAULT_CHAT_TEMPLATE)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]

    @property
    def unused_input_names(self) -> list[str]:
        return ["token_type_ids"]

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Loads and checks the pictures, and makes lists of single inputs.

        Raises:
            ValueError: For videos and audio, for empty texts, for a picture that cannot be read or is absurdly large,
                and for a number of pictures that differs from that of the placeholders. The message names the text or
                picture.
        """
        if videos is not None or audio is not None:
            raise ValueError("the processor takes pictures and texts, neither `videos` nor `audio`.")
        rows = None
        if text is not None:
            rows = list(text) if isinstance(text, Sequence) and not isinstance(text, str) else [text]
            for position, row in enumerate(rows):
                if not isinstance(row, str) or not row:
                    raise ValueError(f"`text` must be non-empty strings, but text[{position}] is {row!r}.")
            if not rows:
                raise ValueError("`text` is empty: give at least one string.")
        if images is not None:
            images = self._load_images(images)
            images = images if isinstance(images, list) else [images]
        if rows is not None:
            _check_numbers(images or [], [row.count(self.image_token) for row in rows], self.image_token)
        if images is not None:
            images = [image for row in images for image in (row if isinstance(row, list) else [row])] or None
        return super().prepare_inputs_layout(images=images, text=rows, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """
        Number of placeholder tokens of pictures of the given sizes (every picture is resized to the same number).

        Args:
            image_sizes (`list[list[int]]`, *optional*): Height and width of each picture.
        """
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """
        See [`~transformers.ProcessorMixin.apply_chat_template`]. Image tokens inside texts stay text.

        Raises:
            ValueError: If the conversation is empty, or if a text holds the image token and the tokenizer cannot encode
                it as text.
        """
        if len(conversation) == 0:
            raise ValueError("`conversation` is empty: give at least one message.")
        kwargs |= {key: self._as_text(kwargs[key]) for key in ("tools", "documents") if kwargs.get(key)}
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        # Given to another template, the variable would pass for an argument of the tokenizer.
        if "image_token" in (named.get(chat_template or "default") or chat_template or ""):
            kwargs.setdefault("image_token", self.image_token)
        return super().apply_chat_template(self._as_text(conversation), chat_template, **kwargs)

    def _as_text(self, node: Any) -> Any:
        """A copy of (a part of) a conversation in which no text can become an image token."""
        if isinstance(node, str):
            return self._break_image_tokens(node)
        if isinstance(node, (list, tuple)):
            return [self._as_text(item) for item in node]
        if isinstance(node, dict):
            kind = node.get("type")
            if kind == "text" or kind in _MEDIA_TYPES:
                # Rows of a table have every key of every part.
                node = {key: value for key, value in node.items() if value is not None}
            if kind in _MEDIA_TYPES:
                return node
            return {key: value if key in ("role", "type") else self._as_text(value) for key, value in node.items()}
        return node

    def _break_image_tokens(self, text: str) -> str:
        first, rest = self.image_token[:1], self.image_token[1:]
        if not self._can_be_text:
            if self.image_token in text:
                raise ValueError(
                    f"a text of the conversation holds the image token {self.image_token!r}, which this tokenizer "
                    "cannot encode as text: remove it, or use a fast tokenizer whose image token is no ordinary word."
                )
            return text
        text = re.sub(f"{re.escape(first)}(?={re.escape(rest)})", rf"\g<0>{_MARK}", text)
        # The next text may go on where this one ends.
        if any(text.endswith(self.image_token[:length]) for length in range(1, len(self.image_token))):
            text += _MARK
        return text

    def _load_images(self, images: Any, position: str = "") -> Any:
        if isinstance(images, (list, tuple)):
            return [self._load_images(image, f"{position}[{i}]") for i, image in enumerate(images)]
        name = f"images{position}"
        pil = image_utils.PIL.Image
        try:
            with warnings.catch_warnings():
                # Pillow only warns of a picture between one and two times its limit.
                warnings.simplefilter("error", pil.DecompressionBombWarning)
                if isinstance(images, str):
                    images = image_utils.load_image(images)
                is_empty = 0 in (images.size if isinstance(images, pil.Image) else getattr(images, "shape", ()))
                if isinstance(images, pil.Image) and not is_empty:
                    limit = pil.MAX_IMAGE_PIXELS
                    if limit is not None and images.width * images.height > limit:
                        raise pil.DecompressionBombError(
                            f"{images.width} × {images.height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS ({limit})"
                        )
                    images.load()
        except (pil.DecompressionBombWarning, pil.DecompressionBombError) as error:
            raise ValueError(f"{name} is absurdly large: {error}") from error
        except Exception as error:  # Pillow lets any error of a decoder through
            raise ValueError(f"{name} cannot be read as a picture: {error}") from error
        if is_empty:
            raise ValueError(f"{name} is empty: it has no pixels.")
        if not image_utils.is_valid_image(images):
            raise ValueError(f"{name} is no picture: give a PIL image, an array, a path or a URL, not {type(images)}.")
        return images


def _check_numbers(images: list, num_tokens: list[int], image_token: str) -> None:
    """Raises `ValueError` unless there are as many pictures as image tokens, in every text if nested by text."""
    rule = f"the number of {image_token} tokens in the prompts should be the same as the number of images passed"
    if any(isinstance(row, list) for row in images):
        if len(images) != len(num_tokens):
            raise ValueError(f"{rule}: `images` is for {len(images)} texts, but `text` has {len(num_tokens)}.")
        for row, (pictures, number) in enumerate(zip(images, num_tokens, strict=True)):
            num_pictures = len(pictures) if isinstance(pictures, list) else 1
            if num_pictures != number:
                raise ValueError(f"{rule}: text[{row}] has {number} tokens, but {num_pictures} images.")
    elif len(images) != sum(num_tokens):
        raise ValueError(f"{rule}: there are {sum(num_tokens)} tokens, but {len(images)} images.")


def _tell_from_text(tokenizer, image_token: str) -> bool:
    """
    Sets the tokenizer up so that a broken image token is encoded as text.

    Returns:
        `bool`: Whether that is possible: not with slow tokenizers, nor if the image token is an ordinary word.
    """
    known = tokenizer.added_tokens_decoder.get(tokenizer.convert_tokens_to_ids(image_token))
    if known is None or known.normalized or not known.special:
        # Looked for before normalisation, so before the marks are dropped.
        tokenizer.add_tokens([AddedToken(image_token, normalized=False, special=True)], special_tokens=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or len(image_token) < 2:
        return False
    normalizer = backend.normalizer
    if normalizer is None or _MARK in normalizer.normalize_str(f"a{_MARK}a"):
        drop = normalizers.Replace(_MARK, "")
        backend.normalizer = drop if normalizer is None else normalizers.Sequence([drop, normalizer])
    broken = image_token[0] + _MARK + image_token[1:]
    token_id = tokenizer.convert_tokens_to_ids(image_token)
    return token_id not in tokenizer(broken, add_special_tokens=False)["input_ids"]


SparseMoeVlmProcessor.register_for_auto_class()

__all__ = ["SparseMoeVlmProcessor"]
