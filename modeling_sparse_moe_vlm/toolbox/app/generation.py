"""Runs `generate` and records α, the attention and the routing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from ...configuration_sparse_moe_vlm import SparseMoeVlmConfig
from ..evaluation_mode import evaluating
from ..expert_modules import base_model_of
from ..modality_weights import MODALITIES, modality_weights
from .recording import Recording, recording
from .settings import Settings

IMAGE_ID = MODALITIES.index("image")


@dataclass
class Generation:
    """
    The new tokens of one row, with their α, attention and routing.

    Args:
        tokens (`torch.Tensor` of shape `(new tokens,)`):
            The new tokens, of type int64.
        recording ([`~recording.Recording`]):
            Attention and routing.
        alpha (`list[float]`), count_free_alpha (`list[float]`):
            α of every new token, averaged over layers and heads: the share of attention that went to images when the
            token was chosen. Empty without images.
        alpha_note (`str`):
            Why `alpha` is empty.
    """

    tokens: torch.Tensor
    recording: Recording
    alpha: list[float] = field(default_factory=list)
    count_free_alpha: list[float] = field(default_factory=list)
    alpha_note: str = ""


@torch.inference_mode()
def generate_recorded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Any],
    settings: Settings,
    *,
    has_images: bool,
    on_text: Callable[[str], None] = lambda text: None,
    stop: threading.Event | None = None,
) -> Generation:
    """
    Continues a prompt and records α, the attention and the routing. If the attention of a model cannot be read out, the
    model generates without being steered.

    Args:
        model (`PreTrainedModel`):
            The model, with or without adapters.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        inputs (`Mapping[str, Any]`):
            Inputs of one row.
        settings ([`~settings.Settings`]):
            Settings of decoding and steering.
        has_images (`bool`):
            Whether the prompt has images.
        on_text (`Callable[[str], None]`, *optional*):
            Called with every new piece of text.
        stop (`threading.Event`, *optional*):
            Ends the generation once it is set.

    Returns:
        [`Generation`]: The new tokens and the recording.
    """
    base = base_model_of(model)
    stopping = StoppingCriteriaList([_Stopped(stop or threading.Event())])

    def generate(**kwargs: Any) -> Any:
        streamer = _Pieces(tokenizer, on_text)
        return base.generate(**inputs, **settings.decoding, stopping_criteria=stopping, streamer=streamer, **kwargs)

    def without_weights(record: Recording, note: str) -> Generation:
        return Generation(_new_tokens(generate(), inputs["input_ids"]), record, alpha_note=note)

    with evaluating(model), recording(model) as record:
        if not has_images:
            return without_weights(record, "There is no image in the conversation: all attention is on the text.")
        try:
            output, weights = _generate_with_weights(base, generate, settings)
        except Exception as error:  # from the read-out; an error of the model itself is raised again by the next line
            record.attention.clear()
            return without_weights(record, f"The attention of this model can be neither read nor steered: {error}")
    tokens = _new_tokens(output, inputs["input_ids"])
    if any(len(steps) != len(tokens) for steps in weights):
        record.attention.clear()
        passes = f"{len(tokens)} new tokens, but {len(weights[0])} forward passes with weights"
        return Generation(tokens, record, alpha_note=f"α of the words is not known: there were {passes}.")
    alpha, count_free = ([_mean_alpha(layers) for layers in steps] for steps in weights)
    return Generation(tokens, record, alpha, count_free)


def _new_tokens(output: Any, prompt: torch.Tensor) -> torch.Tensor:
    """Returns the new tokens `(T,)` in the output of `generate`. In some models, the prompt precedes them."""
    tokens, first = getattr(output, "sequences", output)[0], prompt[0]
    if torch.equal(tokens[: len(first)], first.to(tokens.device)):
        tokens = tokens[len(first) :]
    return tokens.cpu()


def _generate_with_weights(
    model: PreTrainedModel, generate: Callable[..., Any], settings: Settings
) -> tuple[Any, tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]]:
    """Returns the output of `generate`, and the modality weights and count-free weights by forward pass and layer."""
    if model.config.model_type == SparseMoeVlmConfig.model_type:
        # Without `output_attentions`, the model may use a faster implementation that does not compute the matrices.
        output = generate(
            output_modality_weights=True, output_attentions=True, return_dict_in_generate=True, **settings.steering
        )
        return output, (output.modality_weights, output.count_free_modality_weights)
    with modality_weights(model, **settings.steering) as weights:
        output = generate()
    return output, (
        [list(step.modality_weights.values()) for step in weights.steps],
        [list(step.count_free_modality_weights.values()) for step in weights.steps],
    )


def _mean_alpha(layers: Sequence[torch.Tensor]) -> float:
    """Returns the weight of images for the last token, averaged over layers `(B, heads, T, modalities)` and heads."""
    return float(torch.stack([weights[0, :, -1, IMAGE_ID] for weights in layers]).mean())


class _Pieces(TextStreamer):
    """Streamer that passes new text to a function, word by word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


class _Stopped(StoppingCriteria):
    """Stopping criterion that stops once an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
