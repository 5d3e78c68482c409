"""Routed experts of quantised models: a warning if they are not quantised, and the implementation if they are."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .checkpoint_conversion import MATRICES, expert_stacks

logger = logging.get_logger(__name__)


def warn_of_unquantised_experts(model: PreTrainedModel, quantizer: Any) -> None:
    """
    Logs a warning if a model was loaded with a `quantization_config` that does not quantise its routed experts.

    Args:
        model (`PreTrainedModel`):
            The model with its weights loaded.
        quantizer (`HfQuantizer`, *optional*):
            The quantiser.
    """
    left = [weight for weight in _weights(model, quantizer) if _is_plain(weight)]
    if not left:
        return
    size = sum(weight.numel() * weight.element_size() for weight in left)
    decoder = next((name for name, module in model.named_modules() if module is model.get_decoder()), "")
    share = sum(weight.numel() for weight in left) / sum(weight.numel() for weight in model.parameters())
    logger.warning_once(
        f"`quantization_config` leaves the routed experts as they are: {size / 1e6:,.1f} MB, {share:.0%} of the "
        "model's parameters. Quantisers convert linear layers, but the routed experts are stacked parameters. Pass "
        "`unfused_experts=True` to `from_pretrained` to load them as linear layers. torchao can also quantise the "
        "stacks with `TorchAoConfig(FqnToConfig({r're:.*experts.*(gate_up|down)_proj': Int8WeightOnlyConfig()}))` and "
        "`experts_implementation='eager'`. Add a pattern for the linear layers of the decoder as well, such as "
        rf"`r're:.*{decoder.rpartition('.')[2]}.*_proj\.weight'`."
    )


def run_quantised_experts_eagerly(model: PreTrainedModel, quantizer: Any) -> None:
    """
    Sets `experts_implementation="eager"` if a model was loaded with quantised stacks of experts, which the other
    implementations do not support.

    Args:
        model (`PreTrainedModel`):
            The model with its weights loaded.
        quantizer (`HfQuantizer`, *optional*):
            The quantiser.
    """
    if not all(map(_is_plain, _weights(model, quantizer))):
        model.set_experts_implementation("eager")


def _weights(model: PreTrainedModel, quantizer: Any) -> list[nn.Parameter]:
    """Returns the stacked weights of the routed experts; an empty list if the model is not quantised."""
    if quantizer is None or getattr(quantizer.quantization_config, "dequantize", False):
        return []
    names = [f"{part}.{name}" for stack in expert_stacks(model) for part in stack.parts for name in MATRICES]
    return [model.get_parameter(name) for name in names]


def _is_plain(weight: nn.Parameter) -> bool:
    # Quantised weights have another class or a dtype of one byte.
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1
