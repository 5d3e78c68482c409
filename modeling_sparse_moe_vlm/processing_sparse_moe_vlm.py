"""The processor: combines the chat template, the tokenizer and the image processor, and adds modality ids."""

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


# Types that cannot be a message or a content part. Other objects, such as dataclasses and Pydantic models, can be.
_PLAIN = (str, bytes, int, float, list, tuple, type(None))


class SparseMoeVlmProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of [`SparseMoeVlmProcessor`] and their default values."""

    _defaults = {"text_kwargs": {"padding": False, "return_mm_token_type_ids": True}}


class SparseMoeVlmProcessor(ProcessorMixin):
    r"""
    Converts text, images and conversations to model inputs.

    A text contains one image token per image, which the processor expands to `image_seq_length` tokens. In
    conversations (see [`SparseMoeVlmProcessor.apply_chat_template`]), only content parts of type `"image"` are images,
    and only the chat template can add control tokens: special tokens typed inside a text are tokenized as plain text.

    Images can be PIL images, paths, URLs, base64 strings, bytes, arrays or tensors, in any mode. They are converted to
    RGB PIL images that look the way an image viewer shows them: rotated according to their EXIF orientation, with
    transparent areas on a white background, and with 16-bit and float values scaled to 8 bits.

    Args:
        image_processor (`BaseImageProcessor`):
            The image processor of the vision tower.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of the decoder. Its vocabulary must contain the image token.
        image_seq_length (`int`, *optional*, defaults to 49):
            Number of tokens per image. Set it to `config.image_seq_length`.
        chat_template (`str`, *optional*):
            Jinja template for conversations. Defaults to a ChatML template.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            Placeholder token of an image in the text.

    Raises:
        ValueError: If the vocabulary does not contain the image token.

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
                "replace_extra_special_tokens=False)`, or choose an existing token with `image_token`. After you add a "
                "token, set its id in the model's configuration and resize the embeddings if they are too few:\n"
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
        self._control_tokens(self._template(None) or "")  # prepares the tokenizer

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs that the processor can return."""
        return [*super().model_input_names, "mm_token_type_ids"]

    @property
    def unused_input_names(self) -> list[str]:
        """Names of tokenizer outputs that the model does not use and the processor therefore drops."""
        return ["token_type_ids"]

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """
        Reads and checks the images (see `image_reading.read_images`), and converts single inputs to lists.

        Args:
            images (`Any`, *optional*):
                An image, a list of images in the order of the image tokens, or a list with one entry per text: an
                image, a list of images, or `None`.
            text (`str` or `list[str]`, *optional*):
                The texts.
            videos (`Any`, *optional*):
                Not supported.
            audio (`Any`, *optional*):
                Not supported.
            kwargs (`Any`):
                Other arguments of the call, such as `images_kwargs`.

        Returns:
            `tuple`: The inputs in the format of [`~transformers.ProcessorMixin.prepare_inputs_layout`].

        Raises:
            ValueError: If there are videos or audio, if a text is empty or contains lone surrogates, if an image cannot
                be read or is absurdly large, or if the number of images differs from the number of image tokens. The
                message names the text or the image.
        """
        if videos is not None or audio is not None:
            raise ValueError("the processor accepts images and text, but neither `videos` nor `audio`.")
        rows = None
        if text is not None:
            rows = list(text) if isinstance(text, Sequence) and not isinstance(text, str) else [text]
            for position, row in enumerate(rows):
                if not isinstance(row, str) or not row:
                    raise ValueError(f"`text` must be non-empty strings, but text[{position}] is {row!r}.")
                check_encodable(row, f"text[{position}]")
            if not rows:
                raise ValueError("`text` is empty: pass at least one string.")
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
                raise ValueError(
                    "`images` contains None, which stands for a text without images, but there is no `text`: pass "
                    "`text`, or remove None."
                )
            images = [image for image in flat if image is not None] or None
        return super().prepare_inputs_layout(images=images, text=rows, **kwargs)

    def _process_images(self, images, **kwargs):
        # The images that were read have the channels last, regardless of the format of the user's arrays.
        kwargs.pop("input_data_format", None)
        if any(not hasattr(image, "mode") for image in images):
            kwargs["input_data_format"] = CHANNELS_LAST
        return super()._process_images(images, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Returns the text that replaces one image token: the image token, repeated `image_seq_length` times."""
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """
        Returns the number of image tokens for images of the given sizes. It is the same for every image, because all
        images are resized to the same size.

        Args:
            image_sizes (`list[list[int]]`, *optional*):
                Height and width of each image.

        Returns:
            `MultiModalData`: The number of image tokens and of patches of each image.
        """
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """
        Applies a chat template to a conversation: see [`~transformers.ProcessorMixin.apply_chat_template`].

        Control tokens typed in messages (of any role), in roles, in `tools` and in `documents` are kept as plain text,
        with and without `tokenize`. Control tokens are the special tokens and, except in messages of the assistant, the
        added tokens that look like control tokens: those in `tokenizer.chat_control_tokens` if it is set, otherwise
        those in the template and those in brackets (`<think>`). Other template variables are rendered unchanged.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                The messages of one conversation or of several conversations.
            chat_template (`str`, *optional*):
                A template or the name of one of the processor's templates. Defaults to the processor's template.
            kwargs (`Any`):
                Other arguments of [`~transformers.ProcessorMixin.apply_chat_template`], and
                `sanitize_control_tokens` (`bool`, *optional*, defaults to `True`): whether to keep typed control tokens
                as plain text. With `False`, only typed image tokens are kept as plain text.

        Returns:
            `str`, `list[str]` or `BatchFeature`: The rendered conversation, or with `tokenize=True` the
            token ids, or with `return_dict=True` all model inputs.

        Raises:
            ValueError: If the conversation is empty or does not consist of messages, or if a text contains lone
                surrogates or a control token that the tokenizer cannot encode as plain text. The message names the
                text.
        """
        conversation = _messages(conversation)
        _check_conversation(conversation, parts=bool(kwargs.get("tokenize")))
        template = self._template(chat_template) or chat_template or ""
        tokens = self._control_tokens(template, kwargs.pop("sanitize_control_tokens", True))
        if kwargs.get("tools"):
            kwargs["tools"] = tokens.as_text(as_schemas(kwargs["tools"]), "tools")
        if kwargs.get("documents"):
            kwargs["documents"] = tokens.as_text(kwargs["documents"], "documents")
        # Other templates do not use this variable. It would be passed to the tokenizer as an argument.
        if "image_token" in template:
            kwargs.setdefault("image_token", self.image_token)
        return super().apply_chat_template(tokens.as_text(conversation, "conversation"), chat_template, **kwargs)

    def _template(self, name: str | None) -> str | None:
        """Returns the processor's template with this name, or `None` if there is none."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        return named.get(name or "default")

    def _control_tokens(self, template: str, sanitize: bool = True) -> ControlTokens:
        tokens = control_tokens(self.tokenizer, template, self.image_token) if sanitize else ([self.image_token], [])
        key = (id(self.tokenizer), tokens)
        if self._last_control_tokens is None or self._last_control_tokens[0] != key:
            self._last_control_tokens = (key, ControlTokens(self.tokenizer, *tokens))
        return self._last_control_tokens[1]


def _messages(conversation: Any) -> Any:
    """Returns the lists of messages, including those of objects with an attribute `messages`."""
    conversation = getattr(conversation, "messages", conversation)
    if isinstance(conversation, (list, tuple)):
        return [getattr(item, "messages", item) for item in conversation]
    return conversation


def _check_conversation(conversation: Any, parts: bool) -> None:
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


def _check_numbers(images: list, num_tokens: list[int], image_token: str) -> None:
    """Raises `ValueError` if the numbers of images and image tokens differ, in total or in any text."""
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
