"""Processor: chat template, tokenizer and image processor in one, with a modality id for every token."""

from __future__ import annotations

from .versions import SUPPORTED_TRANSFORMERS  # noqa: F401

# isort: split

from collections.abc import Sequence
from typing import Any

from transformers import AddedToken
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .control_tokens import ControlTokens, as_schemas, check_encodable, control_tokens
from .image_reading import CHANNELS_LAST, read_images

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


# What is neither a message nor a part of one. Objects of dataclasses and Pydantic models may be.
_PLAIN = (str, bytes, int, float, list, tuple, type(None))


class SparseMoeVlmProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    _defaults = {"text_kwargs": {"padding": False, "return_mm_token_type_ids": True}}


class SparseMoeVlmProcessor(ProcessorMixin):
    r"""
    Makes model inputs from text, images and conversations.

    The text holds one image token per image, which becomes `image_seq_length` of them. In conversations
    (`apply_chat_template`) only content parts of type `"image"` are images, and only the chat template writes control
    tokens: special tokens that are typed inside a text stay text.

    Images may have any form (PIL images, paths, URLs, base64 text, bytes, arrays and tensors) and mode. The image
    processor gets them as RGB images of Pillow that look as they do to a person: upright by their EXIF orientation,
    transparency on white, 16 bits and floats scaled to 8 bits.

    Args:
        image_processor (`BaseImageProcessor`):
            The image processor of the vision tower.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of the decoder; its vocabulary must hold the image token.
        image_seq_length (`int`):
            Number of tokens that one image becomes: `config.image_seq_length`.
        chat_template (`str`, *optional*):
            Jinja template; ChatML by default.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            Placeholder of an image in the text.

    Raises:
        ValueError: If the vocabulary lacks the image token.

    ```python
    >>> processor = SparseMoeVlmProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    >>> inputs = processor(text="<image> What is this?", images=image, return_tensors="pt")
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
                f"`tokenizer.add_special_tokens({{'extra_special_tokens': [{image_token!r}]}}, "
                "replace_extra_special_tokens=False)`, or name an existing token with `image_token`. For a new token, "
                "then tell the model, and give it more embeddings unless it has spare ones:\n"
                f"    model.config.image_token_id = tokenizer.convert_tokens_to_ids({image_token!r})\n"
                "    if len(tokenizer) > model.get_input_embeddings().num_embeddings:\n"
                "        model.resize_token_embeddings(len(tokenizer))"
            )
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        known = tokenizer.added_tokens_decoder.get(self.image_token_id)
        if known is None or known.normalized or not known.special:
            tokenizer.add_tokens([AddedToken(image_token, normalized=False, special=True)], special_tokens=True)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or DEFAULT_CHAT_TEMPLATE)
        self._last_control_tokens: tuple[Any, ControlTokens] | None = None
        self._control_tokens(self._template(None) or "")  # sets the tokenizer up

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]

    @property
    def unused_input_names(self) -> list[str]:
        return ["token_type_ids"]

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Reads and checks the images (see `image_reading.read_images`), and makes lists of single inputs.

        Args:
            images:
                An image, a list of images in the order of the image tokens, or a list with an image, a list of images
                or `None` for each text.
            text (`str` or `list[str]`):
                The texts.

        Raises:
            ValueError: For videos and audio, for empty texts and lone surrogates, for an image that cannot be read or
                is absurdly large, and for a number of images that differs from that of the placeholders. The message
                names the text or image.
        """
        if videos is not None or audio is not None:
            raise ValueError("the processor takes images and texts, neither `videos` nor `audio`.")
        rows = None
        if text is not None:
            rows = list(text) if isinstance(text, Sequence) and not isinstance(text, str) else [text]
            for position, row in enumerate(rows):
                if not isinstance(row, str) or not row:
                    raise ValueError(f"`text` must be non-empty strings, but text[{position}] is {row!r}.")
                check_encodable(row, f"text[{position}]")
            if not rows:
                raise ValueError("`text` is empty: give at least one string.")
        if images is not None:
            options = kwargs | (kwargs.get("images_kwargs") or {})
            do_rescale = options.get("do_rescale")
            if do_rescale is None:
                do_rescale = getattr(self.image_processor, "do_rescale", True)
            images = read_images(images, options.get("input_data_format"), do_rescale)
        if rows is not None:
            _check_numbers(images or [], [row.count(self.image_token) for row in rows], self.image_token)
        if images is not None:
            flat = [image for row in images for image in (row if isinstance(row, list) else [row])]
            if rows is None and any(image is None for image in flat):
                raise ValueError("`images` holds None, which is no image, but there is no `text` whose row it is for.")
            images = [image for image in flat if image is not None] or None
        return super().prepare_inputs_layout(images=images, text=rows, **kwargs)

    def _process_images(self, images, **kwargs):
        # What was read has the channels last, whatever the user's arrays had.
        kwargs.pop("input_data_format", None)
        if any(not hasattr(image, "mode") for image in images):
            kwargs["input_data_format"] = CHANNELS_LAST
        return super()._process_images(images, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """
        Number of placeholder tokens of images of the given sizes (every image is resized to the same number).

        Args:
            image_sizes (`list[list[int]]`, *optional*): Height and width of each image.
        """
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """
        See [`~transformers.ProcessorMixin.apply_chat_template`].

        Control tokens that are typed in messages (of any role), in roles, `tools` and `documents` stay text, with and
        without `tokenize`. These are the special tokens and, except in what the assistant says, the added tokens that
        look like control tokens: those in `tokenizer.chat_control_tokens` if it is set, or else those that the template
        writes and those in brackets (`<think>`). Other template variables are rendered as they are.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                The messages of a conversation, or of several.
            chat_template (`str`, *optional*):
                A template, or the name of one; the processor's by default.
            sanitize_control_tokens (`bool`, *optional*, defaults to `True`):
                `False` lets texts write control tokens. Only image tokens stay text.

        Raises:
            ValueError: If the conversation is empty or is not made of messages, or if a text holds lone surrogates, or
                a control token that the tokenizer cannot encode as text. The message names the text.
        """
        conversation = _messages(conversation)
        _check_conversation(conversation, parts=bool(kwargs.get("tokenize")))
        template = self._template(chat_template) or chat_template or ""
        tokens = self._control_tokens(template, kwargs.pop("sanitize_control_tokens", True))
        if kwargs.get("tools"):
            kwargs["tools"] = tokens.as_text(as_schemas(kwargs["tools"]), "tools")
        if kwargs.get("documents"):
            kwargs["documents"] = tokens.as_text(kwargs["documents"], "documents")
        # Given to another template, the variable would pass for an argument of the tokenizer.
        if "image_token" in template:
            kwargs.setdefault("image_token", self.image_token)
        return super().apply_chat_template(tokens.as_text(conversation, "conversation"), chat_template, **kwargs)

    def _template(self, name: str | None) -> str | None:
        """The processor's template of a name; `None` if there is none."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        return named.get(name or "default")

    def _control_tokens(self, template: str, sanitize: bool = True) -> ControlTokens:
        tokens = control_tokens(self.tokenizer, template, self.image_token) if sanitize else ([self.image_token], [])
        key = (id(self.tokenizer), tokens)
        if self._last_control_tokens is None or self._last_control_tokens[0] != key:
            self._last_control_tokens = (key, ControlTokens(self.tokenizer, *tokens))
        return self._last_control_tokens[1]


def _messages(conversation: Any) -> Any:
    """Lists of messages, also of objects that hold them."""
    conversation = getattr(conversation, "messages", conversation)
    if isinstance(conversation, (list, tuple)):
        return [getattr(item, "messages", item) for item in conversation]
    return conversation


def _check_conversation(conversation: Any, parts: bool) -> None:
    """Raises `ValueError` unless this is a conversation, or several; checks the parts of contents if they are read."""
    if not isinstance(conversation, list):
        raise ValueError(f"`conversation` must be a list of messages, got {type(conversation)}.")
    if not conversation:
        raise ValueError("`conversation` is empty: give at least one message.")
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


def _check_numbers(images: list, num_tokens: list[int], image_token: str) -> None:
    """Raises `ValueError` unless there are as many images as image tokens, in every text if they are given by text."""
    rule = f"the number of {image_token} tokens in the prompts should be the same as the number of images passed"
    if any(image is None or isinstance(image, list) for image in images):
        if len(images) != len(num_tokens):
            raise ValueError(f"{rule}: `images` is for {len(images)} texts, but `text` has {len(num_tokens)}.")
        for i, (row, number) in enumerate(zip(images, num_tokens, strict=True)):
            num_images = sum(image is not None for image in (row if isinstance(row, list) else [row]))
            if num_images != number:
                raise ValueError(f"{rule}: text[{i}] has {number} tokens, but {num_images} images.")
    elif len(images) != sum(num_tokens):
        raise ValueError(f"{rule}: there are {sum(num_tokens)} tokens, but {len(images)} images.")


SparseMoeVlmProcessor.register_for_auto_class()

__all__ = ["SparseMoeVlmProcessor"]
