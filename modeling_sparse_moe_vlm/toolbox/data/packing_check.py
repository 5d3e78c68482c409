"""Measures on a model whether it supports packed rows: whether each row gets the logits that it gets on its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .packing import RowPacker, RowPositions
from .rows import apply_chat_template, with_images
from .videos import takes_videos

logger = logging.get_logger(__name__)

# Largest effect of other rows on the logits of a row, relative to the effect that they have without separation.
LARGEST_EFFECT = 0.02
_IMAGE_SIZE = (64, 48)


def check_packing(model: PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
    """
    Checks that a model supports packed rows. It runs the model on a few short rows, packed and padded, and compares the
    logits, the loss and the router losses. The state of the model and of the random number generators is not changed.

    Args:
        model (`PreTrainedModel`):
            The model.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of the model.

    Raises:
        ValueError: If the model does not support packed rows. The message names the reason.
    """
    make_packer(model, processor)


def make_packer(model: PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase) -> RowPacker:
    """
    Returns a packer for a model, after checking that the model supports packed rows: see [`check_packing`]. If it only
    supports a single sequence per batch, as Flash Attention does, the packer makes a single sequence.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    reads_images = not isinstance(processor, PreTrainedTokenizerBase)
    try:
        rows = [_inputs_of(processor, messages) for messages in _conversations(1 if reads_images else 0)]
        two_images = _inputs_of(processor, _conversations(2 if reads_images else 0)[0])
    except ValueError as error:
        raise ValueError(f"packing cannot be checked: a short row of the check fails: {error}") from error
    wrong = [name for name, value in two_images.items() if not torch.is_tensor(value)]
    if wrong:
        raise ValueError(f"the processor does not return `{wrong[0]}` as a tensor. Set `packing=False`.")
    layouts = {name: value.shape[0] == 1 for name, value in two_images.items()}
    packer = RowPacker(tokenizer.pad_token_id, layouts, RowPositions(model))
    fit_packer(packer, model, rows)
    if takes_videos(processor) and getattr(model.config, "video_token_id", None) is not None:
        _allow_videos(packer, model, processor)
    return packer


def _allow_videos(packer: RowPacker, model: PreTrainedModel, processor: Any) -> None:
    """Adds the fields of videos to the layouts of a packer, if the model supports packed rows with videos."""
    layouts = packer.layouts
    try:
        rows = [_inputs_of(processor, messages) for messages in _conversations(1, num_videos=1)]
        two_videos = _inputs_of(processor, _conversations(0, num_videos=2)[1])
        packer.layouts = {name: value.shape[0] == 1 for name, value in two_videos.items()} | layouts
        with _undisturbed(model):
            expected = _run(model, _padded(rows, packer))
            sequences = [[0, 1, 2]] if packer.one_sequence else [[0, 1], [2]]
            reason = _difference(model, packer, rows, sequences, expected)
    except Exception as error:
        reason = f"it fails with {type(error).__name__}: {error}"
    if reason is not None:
        packer.layouts = layouts  # so that rows with videos are refused
        logger.info(f"{type(model).__name__} does not support packed rows with videos: {reason}")


def fit_packer(packer: RowPacker, model: PreTrainedModel, rows: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """
    Measures how a model supports packed rows, and sets `one_sequence` and `separators` of the packer accordingly.

    Args:
        packer ([`RowPacker`]):
            The packer.
        model (`PreTrainedModel`):
            The model.
        rows (`Sequence[Mapping]`):
            Model inputs of three rows, with `labels`.

    Raises:
        ValueError: If the model does not support packed rows. The message names the reason.
    """
    padded = _padded(rows, packer)
    with _undisturbed(model):
        try:
            expected = _run(model, padded)
        except Exception as error:
            raise ValueError(
                f"packing cannot be checked: {type(model).__name__} fails on short padded rows with "
                f"{type(error).__name__}: {error}"
            ) from error
        reasons = []
        for packer.one_sequence, packer.separators in product((False, True), repeat=2):
            sequences = [[0, 1, 2]] if packer.one_sequence else [[0, 1], [2]]
            reason = _difference(model, packer, rows, sequences, expected)
            if reason is None:
                return
            reasons.append(reason)
    raise ValueError(f"{type(model).__name__} does not support packed rows: {reasons[0]} Set `packing=False`.")


def _conversations(num_images: int, num_videos: int = 0) -> list[list[dict[str, Any]]]:
    """Returns the messages of three rows. The first one has images, and the second one videos."""
    images = [Image.new("RGB", _IMAGE_SIZE, color) for color in ("red", "blue")][:num_images]
    frames = [Image.new("RGB", _IMAGE_SIZE, color) for color in ("green", "white")]
    videos = [{"frames": frames, "fps": 1.0}] * num_videos
    rows: list[tuple[str, str, list[Any], list[Any]]] = [
        ("What is this?", "A color.", images, []),
        ("Name three numbers.", "One, two and three.", [], videos),
        ("Who?", "Me.", [], []),
    ]
    conversations = []
    for question, answer, its_images, its_videos in rows:
        placeholders = [*({"type": "image"} for _ in its_images), *({"type": "video"} for _ in its_videos)]
        messages = [
            {"role": "user", "content": [*placeholders, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        conversations.append(with_images({"messages": messages, "images": its_images, "videos": its_videos}, 0))
    return conversations


def _inputs_of(
    processor: ProcessorMixin | PreTrainedTokenizerBase, messages: list[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """Returns the inputs of a row, in which all tokens are targets."""
    inputs = dict(apply_chat_template(processor, {0: messages}, padding_side="right"))
    return inputs | {"labels": inputs["input_ids"]}


def _padded(rows: Sequence[Mapping[str, torch.Tensor]], packer: RowPacker) -> dict[str, Any]:
    """Returns rows as a padded batch."""
    # One row per sequence is a padded batch, apart from the way in which padding is marked.
    batch = dict(packer.pack(rows, [[row] for row in range(len(rows))]))
    positions = batch.pop("position_ids")
    text_positions = positions[0] if positions.dim() == 3 else positions
    return batch | {"attention_mask": (text_positions >= 0).long()}


def _run(model: PreTrainedModel, batch: Mapping[str, Any]) -> Any:
    def placed(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        return value.to(model.device, model.dtype if value.is_floating_point() else None)

    return model(**{name: placed(value) for name, value in batch.items()})


def _difference(
    model: PreTrainedModel,
    packer: RowPacker,
    rows: Sequence[Mapping[str, torch.Tensor]],
    sequences: list[list[int]],
    expected: Any,
) -> str | None:
    """Returns how the outputs for packed rows differ from those for padded rows, or `None` if they agree."""
    packed = packer.pack(rows, sequences)
    unseparated = dict(packed)
    positions = packed["position_ids"].clone()
    counted = torch.arange(positions.shape[-1]).expand(positions.shape[-2:])
    (positions[0] if positions.dim() == 3 else positions)[:] = counted
    unseparated["position_ids"] = positions
    try:
        outputs, mixed = _run(model, packed), _run(model, unseparated)
    except Exception as error:
        return f"it fails with {type(error).__name__}: {error}".rstrip(".") + "."

    effects, mixed_effects, sizes = [], [], []
    for number, sequence in enumerate(sequences):
        start = 0
        for row in sequence:
            length = rows[row]["input_ids"].shape[1]
            its = expected.logits[row, :length].float()
            effects.append(_distance(outputs.logits[number, start : start + length], its))
            mixed_effects.append(_distance(mixed.logits[number, start : start + length], its))
            sizes.append(its.norm(dim=-1).mean().item())
            start += length + packer.separators
    rounding = torch.finfo(expected.logits.dtype).eps
    allowed = max(max(LARGEST_EFFECT, 32 * rounding) * max(mixed_effects), 8 * rounding * max(sizes))
    if not max(effects) <= allowed:  # also for NaN
        share = max(effects) / max(mixed_effects) if max(mixed_effects) else float("nan")
        return (
            f"the logits of a row depend on the rows packed with it (by {share:.0%} of the effect without separation), "
            "so its attention or another layer does not separate rows."
        )
    for name in ("loss", "aux_loss"):
        ours, theirs = getattr(outputs, name, None), getattr(expected, name, None)
        if ours is None or theirs is None or float(ours) == float(theirs):
            continue
        if not abs(float(ours) - float(theirs)) <= max(1e-3, 32 * rounding) * abs(float(theirs)):
            return f"its `{name}` is {float(ours):.4g} for packed rows, but {float(theirs):.4g} for padded rows."
    return None


def _distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return (logits.float() - expected).norm(dim=-1).mean().item()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Context manager for running a model in evaluation mode without gradients. It restores the state afterwards."""
    modes = {module: module.training for module in model.modules()}
    # Models with multimodal rotary embeddings remember the offset of the positions in the last call.
    offsets = {module: module.rope_deltas for module in model.modules() if "rope_deltas" in vars(module)}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for module, offset in offsets.items():
                module.rope_deltas = offset
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
