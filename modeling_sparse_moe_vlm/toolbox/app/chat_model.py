"""A model for chatting, with its adapters, that records attention and routing for each answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...checks import check
from ...control_tokens import check_encodable
from ...image_reading import read_images
from ..expert_modules import base_model_of
from ..modality_weights.read_out import placeholders_of
from .answers import Answer, explained
from .generation import IMAGE_ID, Generation, generate_recorded
from .image_tokens import TokenGrid, token_grids
from .loading import load_adapters, load_model, max_length
from .settings import NO_ADAPTER, Settings
from .words import words_of


class ChatModel:
    """
    A model for chatting. Several threads can call it; the calls run one after the other.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, with its adapters.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Its processor, or its tokenizer if it reads only text.
        adapters (`Sequence[str]`, *optional*):
            Names of its adapters.
    """

    def __init__(self, model: Any, processor: Any, adapters: Sequence[str] = ()):
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.adapters = [NO_ADAPTER, *adapters]
        self.reads_images = hasattr(processor, "image_processor")
        self.lock = threading.Lock()

    @classmethod
    def load(cls, path: str, adapters: Mapping[str, str] | None = None, trust_remote_code: bool = False) -> ChatModel:
        """
        Loads a model and its adapters.

        Args:
            path (`str`):
                Folder of the model, or its name on the Hub.
            adapters (`Mapping[str, str]`, *optional*):
                Folders of adapters, or their names on the Hub, by name.
            trust_remote_code (`bool`, defaults to `False`):
                Whether to run the code that comes with the checkpoint.
        """
        adapters = adapters or {}
        model, processor = load_model(path, trust_remote_code)
        return cls(load_adapters(model, adapters), processor, list(adapters))

    def answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        settings: Settings | None = None,
        on_text: Callable[[str], None] = lambda text: None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """
        Answers the last message of a conversation.

        Args:
            messages (`Sequence[Mapping]`):
                Chat messages, whose content is a list of parts of type `"text"` and `"image"`, with a PIL image.
            settings ([`~settings.Settings`], *optional*):
                Settings of decoding and steering.
            on_text (`Callable[[str], None]`, *optional*):
                Called with every new piece of the answer.
            stop (`threading.Event`, *optional*):
                Ends the answer once it is set.

        Returns:
            [`Answer`]: The answer.

        Raises:
            ValueError: If the model cannot read a message, or the conversation is too long.
        """
        settings = settings or Settings()
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        for message in messages:
            for part in message["content"]:
                check_encodable(part.get("text", ""), "the message")
        check(self.reads_images or not images, "This model reads only text: remove the images.")
        with self.lock, self._adapter(settings.adapter):
            inputs = self._inputs(messages, images)
            length, limit = inputs["input_ids"].shape[1], max_length(self.model)
            check(
                limit is None or length + settings.max_new_tokens <= limit,
                f"The conversation is too long: it has {length} tokens, and with up to {settings.max_new_tokens} new "
                f"tokens it exceeds the {limit} tokens that the model can read. Start a new conversation, or reduce "
                "the maximum number of new tokens.",
            )
            generation = generate_recorded(
                self.model, self.tokenizer, inputs, settings, has_images=bool(images), on_text=on_text, stop=stop
            )
            return self._explained(generation, inputs, images)

    @contextmanager
    def _adapter(self, name: str) -> Iterator[None]:
        check(name in self.adapters, f"There is no adapter {name!r}: choose one of {', '.join(self.adapters)}.")
        if len(self.adapters) == 1:
            yield
        elif name == NO_ADAPTER:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(name)
            yield

    def _inputs(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> dict[str, Any]:
        """Returns the model inputs of a conversation, on the device and in the dtype of the model."""
        if getattr(self.processor, "chat_template", None):
            chat = [dict(message) for message in messages]
            if not self.reads_images:  # templates of language models take strings
                chat = [message | {"content": _text_of(message)} for message in chat]
            inputs = self.processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        elif self.reads_images:
            prompt = getattr(self.processor, "image_token", "") * len(images) + "\n".join(map(_text_of, messages))
            inputs = self.processor(text=prompt, images=list(images) or None, return_tensors="pt")
        else:
            inputs = self.processor("\n".join(map(_text_of, messages)), return_tensors="pt")
        base = base_model_of(self.model)
        return {
            name: value.to(base.device, base.dtype if value.is_floating_point() else None)
            if torch.is_tensor(value)
            else value
            for name, value in inputs.items()
        }

    def _explained(self, generation: Generation, inputs: Mapping[str, Any], images: Sequence[Image.Image]) -> Answer:
        tokens = generation.tokens.tolist()
        words = words_of(tokens, self._decode)
        try:
            grids: list[TokenGrid] | str = self._grids(inputs, images) if images else []
        except ValueError as error:
            grids = f"It is not known which tokens cover which part of the image: {error}"
        return explained(self._decode(tokens).strip(), words, generation, grids, inputs["input_ids"].shape[1])

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _grids(self, inputs: Mapping[str, Any], images: Sequence[Image.Image]) -> list[TokenGrid]:
        """Returns the tokens of every image of a prompt."""
        shapes, is_image = None, self._is_image(inputs)
        if "image_grid_thw" in inputs:
            merge = getattr(self.processor, "merge_size", None) or self.processor.image_processor.merge_size
            shapes = [(int(rows) // merge, int(columns) // merge) for _, rows, columns in inputs["image_grid_thw"]]
            lengths = [rows * columns for rows, columns in shapes]
        elif len(images) == 1:
            lengths = [int(is_image.sum())]
        else:  # images may differ in their number of tiles
            lengths = [int(self._is_image(self._inputs([_message_of(image)], [image])).sum()) for image in images]
        tile_length = getattr(self.processor, "image_seq_length", getattr(self.processor, "image_seq_len", None))
        layouts = None
        if hasattr(self.processor, "tile_grid"):
            layouts = [self.processor.tile_grid(image.height, image.width) for image in images]
        sizes = [image.size for image in images]
        return token_grids(is_image, lengths, sizes, tile_length=tile_length, shapes=shapes, layouts=layouts)

    def _is_image(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Returns which tokens of a prompt are image tokens, `(T,)` of type bool."""
        placeholders = placeholders_of(base_model_of(self.model).config)
        of_images = [token for token, modality in placeholders.items() if modality == IMAGE_ID]
        return np.isin(inputs["input_ids"][0].cpu().numpy(), of_images)


def read_image(path: str) -> Image.Image:
    """
    Reads an image from a file, the way an image viewer shows it.

    Args:
        path (`str`):
            Path to the file.

    Returns:
        `PIL.Image.Image`: An upright RGB image.

    Raises:
        ValueError: If the file cannot be read as an image; the message names it, without its folder.
    """
    try:
        return read_images([path])[0]
    except ValueError as error:
        name = Path(path).name
        raise ValueError(str(error).replace("images[0]", name).replace(path, name)) from error


def _text_of(message: Mapping[str, Any]) -> str:
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def _message_of(image: Image.Image) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "image": image}]}
