"""The data collator, which turns conversations with images and videos into training batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .blank_images import BLANK_ROW, is_sharded_by_accelerate, mask_last_row
from .packing import IGNORE_INDEX, RowPacker
from .packing_check import make_packer
from .row_sizes import RowSize, SizedBatch, check_batch, check_limits, count_parts, find_excess, sizes_of
from .rows import has_origin, row_name, with_images
from .targets import apply_marked_template


@dataclass
class VisionLanguageCollator:
    """
    Data collator that turns conversations with images and videos into training batches.

    Only the turns of the assistant have labels. All other tokens have the label -100, which the loss ignores. If the
    chat template of the processor does not mark the turns with `{% generation %}`, they are found by rendering the
    beginning of the conversation before and after each turn.

    Args:
        processor (`ProcessorMixin`):
            Processor of the model.
        max_length (`int`, *optional*):
            Largest number of tokens in a row. Longer rows are an error: rows are never truncated.
        max_image_tokens (`int`, *optional*):
            Largest number of image tokens in a row, those of videos included. Rows with more are an error: image tokens
            are never cut.
        max_image_tokens_per_batch (`int`, *optional*):
            Largest number of image tokens in a batch. Batches with more are an error, before the model receives them.
        packing (`bool`, *optional*, defaults to `False`):
            Whether to pack the rows of a batch into fewer sequences with less padding. The logits, the losses and the
            gradients are those of the padded batch.
        model (`PreTrainedModel`, *optional*):
            The model, which packing needs: it runs a few short rows to check that the model separates packed rows (see
            [`~toolbox.data.check_packing`]). The collator does not keep the model.
        blank_images (`bool`, *optional*):
            Whether batches without images and videos get a row with a blank image, which has no weight. Processes that
            each have only a part of the model (FSDP) must all run the vision encoder in a step, or none. By default,
            they do if several processes use Accelerate's FSDP, in any trainer. `SparseMoeTrainer` also sets it for a
            model that `distributed_config` shards, and not for models of our architecture, which do not need it in
            training. With other trainers, set it to `True` for models that `distributed_config` shards.

    Raises:
        ValueError: With `packing=True`, if there is no model or if the model does not support packed rows. With
            `blank_images=True`, if the processor is a tokenizer.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    max_image_tokens: int | None = None
    max_image_tokens_per_batch: int | None = None
    packing: bool = False
    model: InitVar[PreTrainedModel | None] = None
    blank_images: bool | None = None

    def __post_init__(self, model: PreTrainedModel | None) -> None:
        check_limits(
            max_length=self.max_length,
            max_image_tokens=self.max_image_tokens,
            max_image_tokens_per_batch=self.max_image_tokens_per_batch,
        )
        if self.blank_images and isinstance(self.processor, PreTrainedTokenizerBase):
            raise ValueError("`blank_images=True` needs a processor that reads images, but got a tokenizer.")
        self._packer: RowPacker | None = None
        if self.packing:
            if model is None:
                raise ValueError("`packing=True` needs `model`, to check that it separates packed rows.")
            self._packer = make_packer(model, self.processor)

    @property
    def adds_blank_images(self) -> bool:
        """Whether batches without images and videos get a row with a blank image."""
        if self.blank_images is None:
            return is_sharded_by_accelerate() and not isinstance(self.processor, PreTrainedTokenizerBase)
        return self.blank_images

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> SizedBatch:
        """
        Makes a batch of rows.

        Args:
            rows (`Sequence[Mapping]`):
                Rows with the fields `messages`, `images` and `videos`. `messages` is a list of chat messages, whose
                content parts of type `"image"` and `"video"` are placeholders, unless they contain an image or a video
                themselves. `images` is the list of images for the placeholders, in order (PIL images, arrays, paths or
                URLs), and `videos` that of the videos (see [`~video_reading.read_video`]), which are decoded now. They
                may be missing or `None` if there are no placeholders.

        Returns:
            [`~toolbox.data.row_sizes.SizedBatch`]: The inputs of the model, as the processor returns them, padded on
            the right, and the `labels`, an int64 tensor of shape `(batch_size, sequence_length)`. With packing,
            `position_ids` replace `attention_mask`: they restart in each row and are -1 for padding, and `use_cache` is
            `False`. The attribute `row_sizes` has the name and the size of each row, which errors about memory name.

        Raises:
            ValueError: If there are no rows, if a row is malformed (see [`~toolbox.data.rows.with_images`]), cannot be
                processed, exceeds a limit or has no assistant turn, or if the batch exceeds its limit. The message
                names the row by its `source` and `row` if it has these fields, otherwise by its position in the batch.
        """
        if not rows:
            raise ValueError("the batch has no rows: pass at least one.")
        conversations = {number: with_images(row, number) for number, row in enumerate(rows)}
        adds_blank = self.adds_blank_images and not any(
            count_parts(kind, messages) for messages in conversations.values() for kind in ("image", "video")
        )
        if adds_blank:
            conversations[len(rows)], rows = with_images(BLANK_ROW, len(rows)), [*rows, {}]
        # Packing needs each row on its own, because padding and the images of other rows cannot be told apart later.
        calls = [list(conversations)] if self._packer is None else [[number] for number in conversations]
        batches, targets, sizes = [], [], []
        for call in calls:
            batch, has_target, its_sizes = self._process(rows, {number: conversations[number] for number in call})
            batches.append(batch)
            targets += has_target
            sizes += its_sizes
        without_target = [number for number, has_target in enumerate(targets) if not has_target]
        if without_target:
            raise ValueError(
                f"{_names_in_batch(rows, without_target)} have no assistant turn, so there is nothing to learn from "
                "them: drop them, or mark what the assistant says with `{% generation %}` in the chat template."
            )
        tokens = [size.tokens for size in sizes]
        if adds_blank:
            sizes.pop()  # it does not count for limits
        for size in sizes:
            if fault := find_excess(size, self.max_length, self.max_image_tokens):
                raise ValueError(f"{size.name} {fault.reason}")
        check_batch(sizes, self.max_image_tokens_per_batch)
        if self._packer is None:
            batch = mask_last_row(batches[0]) if adds_blank else batches[0]
        else:
            padding = {len(rows) - 1} if adds_blank else set()
            batch = self._packer.pack(batches, self._packer.assign(tokens), padding)
        return SizedBatch(batch, row_sizes=sizes)

    def _process(
        self, rows: Sequence[Mapping[str, Any]], conversations: dict[int, list[dict[str, Any]]]
    ) -> tuple[dict[str, Any], list[bool], list[RowSize]]:
        """Returns padded inputs of some rows, with labels, and which rows have a target, and the sizes of the rows."""
        batch = apply_marked_template(
            self.processor, conversations, {number: row_name(rows[number], number) for number in conversations}
        )
        is_target = torch.as_tensor(batch.pop("assistant_masks")).bool()
        batch["labels"] = batch["input_ids"].masked_fill(~is_target, IGNORE_INDEX)
        names = [_name_in_batch(rows[number], number) for number in conversations]
        sizes = sizes_of(self.processor, batch, list(conversations.values()), names)
        return batch.data, is_target.any(dim=1).tolist(), sizes


def _name_in_batch(row: Mapping[str, Any], number: int) -> str:
    return row_name(row, number) if has_origin(row) else f"row {number} of the batch"


def _names_in_batch(rows: Sequence[Mapping[str, Any]], numbers: list[int]) -> str:
    if any(has_origin(rows[number]) for number in numbers):
        return "; ".join(_name_in_batch(rows[number], number) for number in numbers)
    return f"rows {numbers} of the batch"
