"""Freezes everything that text uses, so that training leaves text-only outputs bit-identical."""

from __future__ import annotations

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ...experts_config import experts_config_of
from ..expert_modules import expert_banks, name_without_adapters, names_for_text, sparse_blocks


def freeze_text(model: PreTrainedModel) -> RemovableHandle:
    """
    Freezes everything that text tokens use: the decoder, the embeddings and the head. The modules outside of these (a
    vision encoder and its connector, encoders of further modalities), the expert groups that do not serve text, and
    the router weights of these groups remain trainable. Text-only outputs are bit-identical before and after training.

    A router has a single weight matrix for all experts. Its rows for experts that serve text are restored after every
    step of any torch optimizer, because weight decay would change them even without a gradient.

    Args:
        model (`PreTrainedModel`):
            A model of this package or an upcycled model. Each of its expert groups must serve either text or other
            modalities, as with `expert_groups="isolated"`. The router weights must not be sharded (FSDP, ZeRO-3).

    Returns:
        `RemovableHandle`: Handle whose `remove()` stops restoring the router weights. Frozen parameters stay frozen.

    Raises:
        ValueError: If an expert group serves text and other modalities, which could not learn with frozen experts, or
            if training would update the router biases of text.
    """
    config = experts_config_of(model.config)
    shared = {
        group["name"]: group["modalities"]
        for group in config.expert_groups
        if "text" in group["modalities"] and len(group["modalities"]) > 1
    }
    if shared:
        raise ValueError(
            f"`expert_groups` share experts between text and other modalities: {shared}. If they were frozen for text, "
            'the other modalities could not train them. Give each its own groups, as `expert_groups="isolated"` does.'
        )
    if config.router_bias_update_rate:
        raise ValueError(
            f"`router_bias_update_rate` is {config.router_bias_update_rate}, so the choice of experts for text would "
            "change in training: set it to 0 to keep the biases, and use `router_aux_loss_coef` for load balancing."
        )

    without_text = {group["name"] for group in config.expert_groups if "text" not in group["modalities"]}
    banks = [bank for bank in expert_banks(model) if bank.group in without_text]
    blocks = sparse_blocks(model)
    routers = [f"{name}.gate" for name in blocks]  # text uses some of their rows
    left = tuple(f"{name}." for name in (*(name for bank in banks for name in bank.parts), *routers))
    for_text = names_for_text(model)
    for name, parameter in model.named_parameters():
        name = name_without_adapters(name)
        if name.startswith(for_text) and not name.startswith(left):
            parameter.requires_grad_(False)

    kept = []  # the router, its rows for experts that serve text, and the values of these rows
    for block in blocks.values():
        router = block.gate
        groups = config.layer_expert_groups(block.layer_idx, always_on=False)
        serves = torch.tensor([group.serves("text") for group in groups for _ in range(group.num_experts)])
        rows = serves.nonzero().squeeze(1)
        kept.append((router, rows, router.weight.detach()[rows.to(router.weight.device)].clone()))

    @torch.no_grad()
    def put_back(*_) -> None:
        for router, rows, weight in kept:
            router.weight.index_copy_(0, rows.to(router.weight.device), weight.to(router.weight))

    return register_optimizer_step_post_hook(put_back)
