"""Router losses per modality, computed from the recorded router logits. Padding is ignored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from .experts_config import SparseMoeVlmExpertsConfig
from .routing import LayerRouting, chosen_experts
from .token_modalities import TokenModalities, flat_tokens

logger = logging.get_logger(__name__)

_LOSSES_LEFT_OUT = (
    "The model computes router losses, but got no `labels`, so it returns no loss to add them to. With training "
    "arguments such as `label_smoothing_factor` and `compute_loss_func`, `Trainer` does not pass the labels to the "
    "model and does not add the router losses: use `SparseMoeTrainer` (`from modeling_sparse_moe_vlm.toolbox.training "
    "import SparseMoeTrainer`), which adds them. In your own training loop, add `outputs.router_loss` to your loss; "
    "you can then ignore this message."
)


class RouterLosses(NamedTuple):
    """
    The router losses, each averaged over layers and over the modalities in the batch.

    Args:
        aux_loss (`torch.Tensor`):
            Load balancing loss, a scalar.
        z_loss (`torch.Tensor`):
            Router z-loss, a scalar.
        aux_loss_by_modality (`torch.Tensor` of shape `(num_modalities,)`):
            Load balancing loss of each modality, for monitoring: detached, and NaN for modalities without tokens in the
            batch.
        entropy_loss (`torch.Tensor`, *optional*):
            Sum of the local and global entropy losses of LIMoE, a scalar. It is already multiplied by the coefficients,
            because they can differ by modality. `None` if all coefficients are 0.
    """

    aux_loss: torch.Tensor
    z_loss: torch.Tensor
    aux_loss_by_modality: torch.Tensor
    entropy_loss: torch.Tensor | None = None

    def total(self, config: SparseMoeVlmExpertsConfig) -> torch.Tensor:
        """
        Returns the sum of the losses, multiplied by their coefficients, which is added to the language loss.

        Args:
            config (`SparseMoeVlmExpertsConfig`):
                Configuration of the experts.

        Returns:
            `torch.Tensor`: A scalar.
        """
        total = config.router_aux_loss_coef * self.aux_loss + config.router_z_loss_coef * self.z_loss
        return total if self.entropy_loss is None else total + self.entropy_loss

    def outputs(self, config: SparseMoeVlmExpertsConfig) -> dict[str, torch.Tensor]:
        """
        Returns the losses as model outputs.

        Args:
            config (`SparseMoeVlmExpertsConfig`):
                Configuration of the experts.

        Returns:
            `dict[str, torch.Tensor]`: `aux_loss`, `z_loss`, `aux_loss_by_modality` and `router_loss` (see `total`).
        """
        return {
            "aux_loss": self.aux_loss,
            "z_loss": self.z_loss,
            "aux_loss_by_modality": self.aux_loss_by_modality,
            "router_loss": self.total(config),
        }


def load_balancing_loss(
    *, router_probs: torch.Tensor, index: torch.Tensor, tokens: torch.Tensor, num_serving: int
) -> torch.Tensor:
    """
    Computes the load balancing loss of one layer over the given tokens: N·Σ_e f_e·P_e, where f_e is the mean number of
    slots per token routed to expert e, and P_e is the mean probability of expert e (Switch Transformer, arXiv
    2101.03961, eq. 4–6). For balanced routing, its value is k, the number of experts per token, as in
    `load_balancing_loss_func` of Transformers.

    Args:
        router_probs (`torch.Tensor` of shape `(T, E)`):
            Router probabilities; 0 where an expert does not serve the token.
        index (`torch.Tensor` of shape `(T, k)`):
            Ids of the chosen experts; the sentinel E for an unused slot.
        tokens (`torch.Tensor` of shape `(T,)`):
            1 for the tokens to take into account and 0 for other tokens, in the dtype of the probabilities.
        num_serving (`int`):
            Number N of experts that serve these tokens.

    Returns:
        `torch.Tensor`: A scalar; 0 if there are no such tokens.
    """
    return _balance(tokens.sum(), _load(router_probs, index, tokens), _importance(router_probs, tokens), num_serving)


def _load(router_probs: torch.Tensor, index: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the number of slots of the given tokens that are routed to each expert, `(E,)`."""
    num_experts = router_probs.shape[-1]
    slots = tokens[:, None].expand_as(index).reshape(-1)
    return router_probs.new_zeros(num_experts + 1).index_add(0, index.reshape(-1), slots)[:num_experts]


def _importance(router_probs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the sum of the probabilities of each expert over the given tokens, `(E,)`."""
    return (router_probs * tokens[:, None]).sum(dim=0)


def _balance(count: torch.Tensor, load: torch.Tensor, importance: torch.Tensor, num_serving: int) -> torch.Tensor:
    """Returns the load balancing loss of `count` tokens from their sums."""
    count = count.clamp(min=1.0)
    return num_serving * (load / count * (importance / count)).sum()


def router_z_loss(*, router_logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    Computes the router z-loss over the given tokens: the mean of the squared logsumexp of the router logits, which
    keeps the logits small (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        router_logits (`torch.Tensor` of shape `(T, E)`):
            Router logits; minus infinity where an expert does not serve the token.
        tokens (`torch.Tensor` of shape `(T,)`):
            1 for the tokens to take into account and 0 for other tokens.

    Returns:
        `torch.Tensor`: A scalar; 0 if there are no such tokens.
    """
    return _squared_logsumexp(router_logits, tokens) / tokens.sum().clamp(min=1.0)


def _squared_logsumexp(router_logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return (torch.logsumexp(router_logits, dim=-1).square() * tokens).sum()


def local_entropy_loss(*, router_probs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    Computes the local entropy loss of LIMoE (arXiv 2206.02770, Ω_local): the mean entropy of the router probabilities
    of the given tokens, in nats. The smaller it is, the more confident the router is about each token.

    Args:
        router_probs (`torch.Tensor` of shape `(T, E)`):
            Router probabilities; 0 where an expert does not serve the token.
        tokens (`torch.Tensor` of shape `(T,)`):
            1 for the tokens to take into account and 0 for other tokens, in the dtype of the probabilities.

    Returns:
        `torch.Tensor`: A scalar; 0 if there are no such tokens.
    """
    return (_entropy(router_probs) * tokens).sum() / tokens.sum().clamp(min=1.0)


def global_entropy_loss(*, router_probs: torch.Tensor, tokens: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    Computes the global entropy loss of LIMoE (arXiv 2206.02770, Ω_global with a threshold): max(0, τ − H(p̄)), where p̄
    is the mean of the router probabilities of the given tokens, and H its entropy in nats. It is 0 once the tokens are
    spread over about exp(τ) experts.

    Args:
        router_probs (`torch.Tensor` of shape `(T, E)`):
            See [`local_entropy_loss`].
        tokens (`torch.Tensor` of shape `(T,)`):
            See [`local_entropy_loss`].
        threshold (`float`):
            The threshold τ, in nats.

    Returns:
        `torch.Tensor`: A scalar; 0 if there are no such tokens.
    """
    return _missing_entropy(tokens.sum(), _importance(router_probs, tokens), threshold)


def _missing_entropy(count: torch.Tensor, importance: torch.Tensor, threshold: float) -> torch.Tensor:
    """Returns the global entropy loss of `count` tokens from the sums of their probabilities."""
    return torch.relu(threshold - _entropy(importance / count.clamp(min=1.0))) * (count > 0)


def _entropy(probs: torch.Tensor) -> torch.Tensor:
    # Defines 0·log 0 as 0, with a finite gradient.
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(dim=-1)


def router_losses(
    config: SparseMoeVlmExpertsConfig,
    router_logits: Sequence[torch.Tensor],
    mm_token_type_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    biases: Sequence[torch.Tensor] | None = None,
    *,
    router_indices: Sequence[torch.Tensor] | None = None,
) -> RouterLosses:
    """
    Computes the router losses of a forward pass.

    The losses are computed per layer and modality, because a loss over all modalities together would hide the collapse
    of one modality. The tokens of a modality are balanced over all experts that serve the modality, and over no other
    experts: over the modality's own group if groups are isolated, or over that group and the joint group if both serve
    the modality. Layers that share their experts are balanced together, so that the shared experts are used evenly
    (UniPool, arXiv 2605.06665).

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        router_logits (`Sequence[torch.Tensor]`):
            Router logits as returned by the model, one tensor `(batch_size * sequence_length, num_experts)` per sparse
            layer.
        mm_token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Modality id of every token. By default, all tokens are text.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            0 for padding. A mask with another number of dimensions is ignored: all tokens are taken into account.
        biases (`Sequence[torch.Tensor]`, *optional*):
            Router biases with which the experts were chosen, one tensor `(num_modalities, num_experts)` per sparse
            layer (see [`~routing.router_biases`]). Only needed without `router_indices`.
        router_indices (`Sequence[torch.Tensor]`, *optional*):
            Ids of the chosen experts as returned by the model, one tensor `(batch_size * sequence_length, k)` per
            sparse layer. By default, they are computed from the logits.

    Returns:
        [`RouterLosses`]: The losses.
    """
    device = router_logits[0].device
    ids, real = flat_tokens(mm_token_type_ids, attention_mask, router_logits[0].shape[0], device)
    weight = real.to(torch.float32)
    if router_indices is None:
        router_indices = chosen_experts(config, router_logits, ids, biases)

    counted = [weight * (ids == modality_id) for modality_id in range(len(config.modalities))]
    has_entropy = bool(config.router_local_entropy_coef or config.router_global_entropy_coef)
    numbers = {layer: number for number, layer in enumerate(config.sparse_layers)}
    sums: list[torch.Tensor] = []  # of each set of layers that share experts and of each modality
    for layers in config.layers_by_experts:
        logits = _join([router_logits[numbers[layer]].to(device).float() for layer in layers])
        index = _join([router_indices[numbers[layer]].to(device) for layer in layers])
        # With the sigmoid router, the affinities normalised to sum to 1 (DeepSeek-V3, arXiv 2412.19437, eq. 19).
        probs = torch.softmax(F.logsigmoid(logits) if config.router == "sigmoid" else logits, dim=-1)
        for tokens in counted:
            tokens = _join([tokens] * len(layers))
            entropies = (_entropy(probs) * tokens).sum() if has_entropy else probs.new_zeros(())
            scalars = [tokens.sum(), _squared_logsumexp(logits, tokens), entropies]
            sums += [torch.stack(scalars), _load(probs, index, tokens), _importance(probs, tokens)]
    sums = list(_over_processes(torch.cat(sums)).split([len(part) for part in sums]))

    aux_losses, z_losses, entropy_losses = [], [], []  # of each layer, (num_modalities,)
    present = torch.stack([scalars[0] > 0 for scalars in sums[: 3 * len(counted) : 3]]).float()
    for layers in config.layers_by_experts:
        groups = config.layer_expert_groups(layers[0], always_on=False)
        aux, z, entropy = [], [], []
        for modality in config.modalities:
            (count, squares, entropies), load, importance = sums.pop(0), sums.pop(0), sums.pop(0)
            num_serving = sum(group.num_experts for group in groups if group.serves(modality))
            aux.append(_balance(count, load, importance, num_serving))
            z.append(squares / count.clamp(min=1.0))
            if has_entropy:
                entropy.append(_entropy_losses(config, modality, count, entropies, importance, num_serving))
        # Layers that share experts have the same total weight as the same number of layers with their own experts.
        aux_losses += [torch.stack(aux)] * len(layers)
        z_losses += [torch.stack(z)] * len(layers)
        if has_entropy:
            entropy_losses += [torch.stack(entropy)] * len(layers)
    weights = present / (present.sum().clamp(min=1.0))
    by_modality = torch.stack(aux_losses).mean(dim=0)
    return RouterLosses(
        aux_loss=(by_modality * weights).sum(),
        z_loss=(torch.stack(z_losses).mean(dim=0) * weights).sum(),
        aux_loss_by_modality=by_modality.detach().masked_fill(present == 0, torch.nan),
        entropy_loss=(torch.stack(entropy_losses).mean(dim=0) * weights).sum() if has_entropy else None,
    )


def _join(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _entropy_losses(
    config: SparseMoeVlmExpertsConfig,
    modality: str,
    count: torch.Tensor,
    entropies: torch.Tensor,
    importance: torch.Tensor,
    num_serving: int,
) -> torch.Tensor:
    """Returns the sum of the two entropy losses of one modality, multiplied by their coefficients."""

    def of_modality(value, default: float) -> float:
        value = value.get(modality) if isinstance(value, dict) else value
        return default if value is None else value

    threshold = of_modality(config.router_global_entropy_threshold, math.log(num_serving))
    local_loss = entropies / count.clamp(min=1.0)
    return of_modality(config.router_local_entropy_coef, 0.0) * local_loss + of_modality(
        config.router_global_entropy_coef, 0.0
    ) * _missing_entropy(count, importance, threshold)


def losses_of_layers(
    config: SparseMoeVlmExpertsConfig, tokens: TokenModalities, layers: Sequence[LayerRouting]
) -> dict[str, torch.Tensor]:
    """
    Computes the router losses of a forward pass whose routing was recorded.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        tokens ([`~token_modalities.TokenModalities`]):
            The modalities of the tokens.
        layers (`Sequence[LayerRouting]`):
            The routing of each sparse layer.

    Returns:
        `dict[str, torch.Tensor]`: The losses as model outputs (see `RouterLosses.outputs`).
    """
    return router_losses(
        config,
        [layer.logits for layer in layers],
        tokens.ids,
        tokens.is_real,
        router_indices=[layer.chosen for layer in layers],
    ).outputs(config)


def add_router_losses(
    config: SparseMoeVlmExpertsConfig,
    router_logits: Sequence[torch.Tensor],
    router_indices: Sequence[torch.Tensor] | None,
    tokens: TokenModalities,
    *,
    loss: torch.Tensor | None,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
    is_asked_for: bool,
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """
    Adds the router losses of a forward pass to the language loss. Logs a warning in training if there is no language
    loss and the caller did not request the router losses.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        router_logits (`Sequence[torch.Tensor]`):
            See [`router_losses`].
        router_indices (`Sequence[torch.Tensor]`, *optional*):
            See [`router_losses`].
        tokens ([`~token_modalities.TokenModalities`]):
            The tokens of the forward pass.
        loss (`torch.Tensor`, *optional*):
            The language loss, a scalar.
        labels (`torch.Tensor`, *optional*):
            See [`share_of_batch`].
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            See [`share_of_batch`].
        is_asked_for (`bool`):
            Whether the caller requested the router losses.

    Returns:
        `tuple[torch.Tensor | None, dict[str, torch.Tensor]]`: The loss, and the model outputs `aux_loss`, `z_loss`,
        `aux_loss_by_modality` and `router_loss` (the sum that was added to the loss) by name.
    """
    losses = router_losses(config, router_logits, tokens.ids, tokens.is_real, router_indices=router_indices)
    outputs = losses.outputs(config)
    if labels is not None and loss is not None:
        loss = loss + weighted_router_loss(outputs["router_loss"].to(loss.device), labels, num_items_in_batch)
    elif not is_asked_for and torch.is_grad_enabled() and not is_tracing(router_logits[0]):
        logger.warning_once(_LOSSES_LEFT_OUT)
    return loss, outputs


def share_of_batch(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | float:
    """
    Returns the weight of the router losses of a micro-batch in the loss of the whole batch.

    With gradient accumulation, `Trainer` divides the sum of the language loss by the number of targets of all
    micro-batches, whereas the router losses are means over one micro-batch. Weighted by the micro-batch's share of the
    targets, they add up to a mean over the batch. (For the z-loss, this equals the loss of the whole batch if all
    micro-batches have the same number of tokens of each modality per target. The load balancing loss is a product of
    two means, computed per micro-batch.)

    Args:
        labels (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            Target tokens of the micro-batch; -100 is ignored.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Number of targets of the whole batch. `None` if the language loss is a mean over the micro-batch.

    Returns:
        `torch.Tensor` or `float`: The share; 1.0 without `num_items_in_batch`.
    """
    if num_items_in_batch is None:
        return 1.0
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(labels.device)
    return (labels[..., 1:] != -100).sum() / num_items_in_batch


def weighted_router_loss(
    router_loss: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """
    Returns what is added to the language loss of a micro-batch: the router loss multiplied by [`share_of_batch`].

    In [`router_losses_over_processes`], the router loss is that of all processes, and its gradient is the part of this
    process. It is weighted like the language loss: data parallelism averages the gradients, and `Trainer` multiplies
    the loss by the number of processes if `num_items_in_batch` counts the targets of all of them. The processes then
    have the gradient of one process with the whole batch, and the mean of their losses is the loss of that process.

    Args:
        router_loss (`torch.Tensor`):
            The sum of the router losses, a scalar.
        labels (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            See [`share_of_batch`].
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            See [`share_of_batch`].

    Returns:
        `torch.Tensor`: A scalar.
    """
    share = share_of_batch(labels, num_items_in_batch)
    if not _is_over_processes:
        return share * router_loss
    number = torch.distributed.get_world_size()
    if torch.is_tensor(share):
        torch.distributed.all_reduce(share)
    else:
        share = share * number
    value = router_loss.detach() / number
    return share * (value + (router_loss - router_loss.detach()))


# A global variable, which `torch.compile` can read.
_is_over_processes = False


@contextmanager
def router_losses_over_processes(is_active: bool = True) -> Iterator[None]:
    """
    Context manager in which router losses are computed from the tokens of all processes, so that the experts are
    balanced over the global batch (arXiv 2501.11873). All processes must run the same forward passes in it, and must be
    data parallel: the gradients of a process are those of its own tokens.

    Args:
        is_active (`bool`, *optional*, defaults to `True`):
            `False` for a context without effect.
    """
    global _is_over_processes
    before, _is_over_processes = _is_over_processes, is_active
    try:
        yield
    finally:
        _is_over_processes = before


def _over_processes(sums: torch.Tensor) -> torch.Tensor:
    """Returns sums over the tokens of all processes, whose gradient is the part of this process."""
    if not _is_over_processes:
        return sums
    total = sums.detach().clone()
    torch.distributed.all_reduce(total)
    return total + (sums - sums.detach())
