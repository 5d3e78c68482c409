"""Processor: chat template, tokenizer and image processor in one, with a modality id for every token."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from transformers import image_utils
from transformers.convert_slow_tokenizer import normalizers
from transformers.models.auto.processing_auto import AutoProcessor
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .configuration_sparse_moe_vlm import SparseMoeVlmConfig

DEFAULT_CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}
{{- image_token | default('<image>') -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
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

# A code point that Unicode keeps for the inside of programs. It marks image tokens that a user typed: no placeholder
# matches a marked one, and the tokenizer drops the mark after it has looked for special tokens.
_MARK = "\ufdd0"


class SparseMoeVlmProcessorKwargs(ProcessingKwargs, total=False):
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
        **kwargs,
    ):
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.get_vocab().get(image_token)
        if self.image_token_id is None:
            raise ValueError(
                f"the tokenizer's vocabulary lacks the image token {image_token!r}: add it with "
                f"`tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}})` and resize the "
                "model's embeddings, or name an existing token with `image_token`."
            )
        _drop_marks(tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or DEFAULT_CHAT_TEMPLATE)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Loads and checks the pictures, and makes lists of single inputs.

        Raises:
            ValueError: For empty texts, for a picture that cannot be read or is absurdly large, and for pictures nested
                by text whose number differs from that text's placeholders. The message names the text or picture.
        """
        if text is not None and (len(text) == 0 or (not isinstance(text, str) and any(len(row) == 0 for row in text))):
            raise ValueError("`text` is empty: give at least one non-empty string.")
        if images is not None:
            images = self._load_images(images)
            rows = [text] if isinstance(text, str) else text
            if isinstance(images, list) and any(isinstance(row, list) for row in images):
                if rows is not None:
                    self._check_rows(images, rows)
                images = [image for row in images for image in (row if isinstance(row, list) else [row])]
            if isinstance(images, list) and not images:
                images = None
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

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

    def apply_chat_template(self, conversation, *args, **kwargs):
        """See [`~transformers.ProcessorMixin.apply_chat_template`]. Image tokens inside texts stay text."""
        kwargs.setdefault("image_token", self.image_token)
        return super().apply_chat_template(self._mark_texts(conversation), *args, **kwargs)

    def _mark_texts(self, node: Any, key: str | None = None) -> Any:
        """A copy of a conversation in which every image token of a text is marked."""
        if isinstance(node, str) and key in ("content", "text"):
            return node.replace(self.image_token, self.image_token[0] + _MARK + self.image_token[1:])
        if isinstance(node, dict):
            return {key: self._mark_texts(value, key) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return [self._mark_texts(item, key) for item in node]
        if hasattr(node, "messages"):  # `transformers.Conversation`-like objects, as pipelines pass them
            node = copy.copy(node)
            node.messages = self._mark_texts(node.messages)
        return node

    def _load_images(self, images: Any, position: str = "") -> Any:
        if isinstance(images, (list, tuple)):
            return [self._load_images(image, f"{position}[{i}]") for i, image in enumerate(images)]
        name = f"images{position}"
        pil = image_utils.PIL.Image
        try:
            with warnings.catch_warnings():
                # Pillow only warns of a picture between one and two times its limit.
                warnings.simplefilter("error", pil.DecompressionBombWarning)
                image = self.image_processor.fetch_images(images)
                if isinstance(image, pil.Image):
                    self._check_size(name, *image.size)
                    image.load()
        except (pil.DecompressionBombWarning, pil.DecompressionBombError) as error:
            raise ValueError(f"{name} is absurdly large: {error}") from error
        except OSError as error:
            raise ValueError(f"{name} cannot be read as a picture: {error}") from error
        return image

    @staticmethod
    def _check_size(name: str, width: int, height: int) -> None:
        limit = image_utils.PIL.Image.MAX_IMAGE_PIXELS
        if width == 0 or height == 0:
            raise ValueError(f"{name} is empty: its size is {width}×{height} pixels.")
        if limit is not None and width * height > limit:
            raise ValueError(
                f"{name} is absurdly large: {width}×{height} pixels, the limit is {limit} "
                "(PIL.Image.MAX_IMAGE_PIXELS). Shrink the picture, or raise the limit if you trust it."
            )

    def _check_rows(self, images: list, text: list[str]) -> None:
        if len(images) != len(text):
            raise ValueError(f"`images` holds pictures for {len(images)} texts, but `text` has {len(text)}.")
        for row, (pictures, sample) in enumerate(zip(images, text, strict=True)):
            num_pictures = len(pictures) if isinstance(pictures, list) else 1
            num_tokens = sample.count(self.image_token)
            if num_pictures != num_tokens:
                raise ValueError(
                    f"text[{row}] has {num_tokens} {self.image_token} tokens, but {num_pictures} images were passed "
                    "for it."
                )


def _drop_marks(tokenizer) -> None:
    """Makes the tokenizer drop marks. It normalises text after it has taken the special tokens out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    normalizer = backend.normalizer
    if normalizer is None or _MARK in normalizer.normalize_str(f"a{_MARK}a"):
        drop = normalizers.Replace(_MARK, "")
        backend.normalizer = drop if normalizer is None else normalizers.Sequence([drop, normalizer])


AutoProcessor.register(SparseMoeVlmConfig, SparseMoeVlmProcessor, exist_ok=True)
SparseMoeVlmProcessor.register_for_auto_class()

__all__ = ["SparseMoeVlmProcessor"]
