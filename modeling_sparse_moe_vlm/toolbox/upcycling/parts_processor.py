"""The processor of a model from parts."""

from __future__ import annotations

from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from ...modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from ...processing_sparse_moe_vlm import SparseMoeVlmProcessor
from .errors import UpcyclingError

# Placed before a chat template for text, it joins the content parts of each message. It ends with an expression,
# because a block at the end would remove a line break of the template.
_PARTS_TO_TEXT = """\
{%- set texts = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string or not message['content'] -%}
{%- set texts.messages = texts.messages + [message] -%}
{%- else -%}
{%- set joined = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set joined.text = joined.text + (image_token | default('<image>')) -%}
{%- elif part['type'] == 'text' -%}
{%- set joined.text = joined.text + part['text'] -%}
{%- else -%}
{{- raise_exception("content parts must be of type 'text' or 'image', got '" ~ part['type'] ~ "'") -}}
{%- endif -%}
{%- endfor -%}
{%- set texts.messages = texts.messages + [dict(message, content=joined.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = texts.messages -%}
{{- '' }}"""


def processor_from_parts(
    model: SparseMoeVlmForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BaseImageProcessor,
    *,
    image_token: str = "<image>",
    chat_template: str | dict[str, str] | None = None,
) -> SparseMoeVlmProcessor:
    """
    Builds the processor of a model from [`upcycle_from_parts`].

    Args:
        model (`SparseMoeVlmForConditionalGeneration`):
            The model.
        tokenizer (`PreTrainedTokenizerBase`):
            The language model's tokenizer, with the image token.
        image_processor (`BaseImageProcessor`):
            The vision encoder's image processor.
        image_token (`str`, defaults to `"<image>"`):
            Placeholder token for images.
        chat_template (`str` or `dict[str, str]`, *optional*):
            Chat template. By default, that of the tokenizer, extended to images; ChatML if it has none.

    Returns:
        `SparseMoeVlmProcessor`

    Raises:
        UpcyclingError: If the image token is not the model's, or if the image processor does not return images of the
            vision encoder's size.
    """
    config = model.config
    token_id = tokenizer.get_vocab().get(image_token)
    if token_id != config.image_token_id:
        raise UpcyclingError(
            f"{image_token!r} has the id {token_id} in the tokenizer, but `image_token_id` of the model is "
            f"{config.image_token_id}: give `upcycle_from_parts` the same tokenizer and `image_token`."
        )
    if config.image_sizing == "fixed":
        _check_size(image_processor, config.vision_config.image_size)
    template: Any = chat_template
    if template is None and tokenizer.chat_template:
        template = _with_images(tokenizer.chat_template)
    return SparseMoeVlmProcessor(
        image_processor, tokenizer, chat_template=template, image_token=image_token, **config.image_arguments
    )


def _check_size(image_processor: BaseImageProcessor, size: int) -> None:
    """Raises `UpcyclingError` unless an image processor returns images of the size of the vision encoder."""
    blank = Image.new("RGB", (2 * size, size))
    height, width = image_processor(images=[blank], return_tensors="pt")["pixel_values"].shape[-2:]
    if (height, width) != (size, size):
        raise UpcyclingError(
            f"`image_processor` makes images of {height} × {width} pixels, but the vision encoder takes {size} × "
            f"{size}: set its `size` (and `crop_size`), or use the image processor of the same checkpoint."
        )


def _with_images(template: str | dict[str, str]) -> Any:
    """Extends a chat template for text to messages with content parts."""
    if isinstance(template, dict):
        return {name: _with_images(each) for name, each in template.items()}
    return _PARTS_TO_TEXT + template
