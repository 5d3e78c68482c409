"""Settings of our models that apply to training and are not saved in checkpoints of trained models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig, PreTrainedModel

from ..expert_modules import our_experts_config


def compute_router_losses(model: PreTrainedModel) -> None:
    """
    Makes a model of ours add the router losses to its loss, because checkpoints do not contain this setting. Other
    models are not affected.
    """
    for config in _configs_of_ours(model):
        config.output_router_logits = True


@contextmanager
def no_training_settings(model: PreTrainedModel) -> Iterator[None]:
    """A context in which the configuration of a model of ours does not have the settings of training."""
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
