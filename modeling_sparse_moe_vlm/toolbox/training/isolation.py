"""Isolation as a guarantee: everything that text uses stays as it is, to the bit, whatever the rest learns."""

from __future__ import annotations

import re

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..expert_modules import expert_banks, name_without_adapters

# What text tokens do not use, apart from experts, and the routers, of which they use some rows.
NOT_FOR_TEXT = re.compile(r"(^|\.)(vision_tower|multi_modal_projector|modality_encoders|mlp\.gate)\.")


def freeze_text(model: PreTrainedModel) -> RemovableHandle:
    """
    Freezes everything that text tokens use. What is left to train is the vision tower with its connector (and encoders
    of further modalities), the expert groups that do not serve text, and the routers' weights for them. A text-only
    output is then bit-identical before and after training.

    A router has one weight for all experts, of which the rows of experts that serve text are put back after every step
    of any of torch's optimizers: weight decay would move them even without a gradient.

    Args:
        model (`PreTrainedModel`):
            A model whose expert groups serve either text or other modalities, as those of `expert_groups="isolated"`.
            Its routers' weights must not be sharded (FSDP, ZeRO-3).

    Returns:
        `RemovableHandle`: its `remove()` ends the watch over the routers' weights. What is frozen stays frozen.

    Raises:
        ValueError: If a group serves text and other modalities, which could then not learn; or if the routers' biases
            for text would move.
    """
    config = model.config.get_text_config()
    shared = {
        group["name"]: group["modalities"]
        for group in config.expert_groups
        if "text" in group["modalities"] and len(group["modalities"]) > 1
    }
    if shared:
        raise ValueError(
            f"`expert_groups` share experts between text and other modalities: {shared}. Frozen for text, they could "
            'learn nothing of the others. Give each its own groups, as `expert_groups="isolated"` does.'
        )
    if config.router_bias_update_rate:
        raise ValueError(
            f"`router_bias_update_rate` is {config.router_bias_update_rate}, so the choice of experts for text would "
            "change in training: set it to 0 to keep the biases as they are, and balance by `router_aux_loss_coef`."
        )

    without_text = {group["name"] for group in config.expert_groups if "text" not in group["modalities"]}
    banks = [bank for bank in expert_banks(model) if bank.group in without_text]
    experts = tuple(f"{name}." for bank in banks for name in bank.parts)
    for name, parameter in model.named_parameters():
        if not (NOT_FOR_TEXT.search(name) or name_without_adapters(name).startswith(experts)):
            parameter.requires_grad_(False)

    kept = []  # the router, the rows of experts that serve text, and what they are to be
    for name, module in model.named_modules():
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.mlp\.gate$", name)
        if layer is not None:
            groups = config.layer_expert_groups(int(layer[1]), always_on=False)
            serves = torch.tensor([group.serves("text") for group in groups for _ in range(group.num_experts)])
            rows = serves.nonzero().squeeze(1)
            kept.append((module, rows, module.weight.detach()[rows.to(module.weight.device)].clone()))

    @torch.no_grad()
    def put_back(*_) -> None:
        for router, rows, weight in kept:
            router.weight.index_copy_(0, rows.to(router.weight.device), weight.to(router.weight))

    return register_optimizer_step_post_hook(put_back)
