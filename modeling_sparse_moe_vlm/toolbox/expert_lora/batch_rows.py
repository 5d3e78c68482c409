"""Which rows of the batch the tokens of an experts module are of, where its model hands it only some of them."""

from __future__ import annotations

from typing import Any

from torch import nn

# ERNIE-4.5-VL-MoE: in every block a bank of experts for text, and one for pictures.
BANKS = {"text_moe": False, "vision_moe": True}


def tell_token_rows(model: nn.Module) -> None:
    """
    Lets the blocks of ERNIE-4.5-VL-MoE tell the adapters of their two banks of experts which tokens each gets, so that
    rows of a batch can have an adapter each. Models of other types are left as they are.
    """
    for module in model.modules():
        if all(hasattr(module, bank) for bank in BANKS) and _tell not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_tell, with_kwargs=True)


def _tell(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden_states, is_image = (*args, *kwargs.values(), None)[:2]
    for bank, of_images in BANKS.items():
        experts = getattr(block, bank).experts
        if not hasattr(experts, "token_rows"):
            continue
        experts.token_rows = None
        if is_image is not None and is_image.any():
            places = (is_image.bool().flatten() == of_images).nonzero().squeeze(1)
            experts.token_rows = places, hidden_states.shape[:-1].numel()
