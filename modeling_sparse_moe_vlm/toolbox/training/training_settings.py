"""Settings of our models that belong to training, and not into a trained model's checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig, PreTrainedModel

from ..expert_modules import our_experts_config


def compute_router_losses(model: PreTrainedModel) -> None:
    """Sets a model of ours to add the router losses to its loss, which checkpoints do not say; leaves others alone."""
    for config in _configs_of_ours(model):
        config.output_router_logits = True


@contextmanager
def no_training_settings(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the configuration of a model of ours is that of a trained model."""
    before = [(config, config.output_router_logits) for config in _configs_of_ours(model)]
    for config, _ in before:
        config.output_router_logits = False
    try:
        yield
    finally:
        for config, output_router_logits in before:
            config.output_router_logits = output_router_logits


def _configs_of_ours(model: PreTrainedModel) -> list[PreTrainedConfig]:
    config = our_experts_config(model.config)
    return [] if config is None else [config]
