"""Router rows of an upcycled block: random, or computed from the inputs of the dense block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ...expert_groups import ExpertGroup, served_as
from ...experts_config import SparseMoeVlmExpertsConfig
from ...token_modalities import check_range, listed_ids
from ..evaluation_mode import evaluating
from .errors import UpcyclingError

MAX_TOKENS = 2048
_ITERATIONS = 50
_SAME = 1e-6  # directions are the same if their cosine differs from 1 by less


class BlockInputs(NamedTuple):
    """A sample of the inputs of a dense block.

    Args:
        hidden_states (`torch.Tensor` of shape `(N, D)`): The inputs for N tokens.
        modality_ids (`torch.Tensor` of shape `(N,)`): Modality ids of the tokens, of type int64.
    """

    hidden_states: torch.Tensor
    modality_ids: torch.Tensor


def router_std(config: SparseMoeVlmExpertsConfig) -> float:
    """
    Returns the standard deviation of random router rows: the model's `initializer_range`, but at most 1/√D, for which
    inputs of unit scale have logits of unit scale.
    """
    return min(config.initializer_range, 1 / math.sqrt(config.hidden_size))


def random_rows(
    config: SparseMoeVlmExpertsConfig, groups: Sequence[ExpertGroup], granularity: int, generator: torch.Generator
) -> torch.Tensor:
    """
    Draws small random router rows.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        groups (`Sequence[ExpertGroup]`):
            The routed groups of the layer.
        granularity (`int`):
            Number of consecutive experts that have the same row.
        generator (`torch.Generator`):
            Random number generator.

    Returns:
        `torch.Tensor` of shape `(E, D)`, in float32.
    """
    num_rows = sum(group.num_experts for group in groups) // granularity
    rows = torch.randn(num_rows, config.hidden_size, generator=generator) * router_std(config)
    return rows.repeat_interleave(granularity, dim=0)


def data_rows(
    config: SparseMoeVlmExpertsConfig,
    groups: Sequence[ExpertGroup],
    granularity: int,
    inputs: BlockInputs,
    generator: torch.Generator,
) -> torch.Tensor:
    """
    Computes router rows from data: the centroids of spherical k-means over the inputs of the dense block
    (arXiv 2604.13508), for each group over the tokens that it serves.

    The mean of the centroids of a layer is subtracted, which changes neither the chosen experts nor normalised softmax
    weights. All rows are then multiplied by the same number, so that the logits of a token have a standard deviation of
    1 over the experts that serve it, on average. It is smaller if a row would be longer than √D times [`router_std`].

    Args:
        config, groups, granularity, generator:
            See [`random_rows`].
        inputs ([`BlockInputs`]):
            Inputs of the layer's dense block.

    Returns:
        `torch.Tensor` of shape `(E, D)`, in float32.

    Raises:
        UpcyclingError: If there are no tokens that a group serves, or inputs are not finite.
    """
    states, ids = inputs.hidden_states.float().cpu(), inputs.modality_ids.cpu()
    if not states.isfinite().all():
        raise UpcyclingError(
            '`router_init` is "data", but the hidden states of the dense model for `batch` are not finite.'
        )
    rows = []
    for group in groups:
        served = torch.tensor([config.modalities.index(modality) for modality in group.modalities])
        tokens = states[torch.isin(ids, served)]
        if len(tokens) == 0:
            raise UpcyclingError(
                f'`router_init` is "data", but `batch` has no tokens of {list(group.modalities)}, which the experts '
                f'of group {group.name!r} serve: add examples with some, or use `router_init="random"`.'
            )
        rows.append(spherical_k_means(tokens, group.num_experts // granularity, generator))
    return _scaled(torch.cat(rows), config, groups, granularity, states, ids).repeat_interleave(granularity, dim=0)


def spherical_k_means(vectors: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """
    Clusters directions: every vector belongs to the centroid with the largest cosine, and a centroid is the mean of its
    vectors' directions, scaled to unit length. The first centroids are drawn as in k-means++. An empty cluster gets the
    vector that is farthest from its own centroid. If there are fewer different directions than clusters, the last
    centroids are random.

    Args:
        vectors (`torch.Tensor` of shape `(N, D)`):
            The vectors, in float32. Zero vectors are ignored.
        num_clusters (`int`):
            Number n of clusters.
        generator (`torch.Generator`):
            Random number generator.

    Returns:
        `torch.Tensor` of shape `(n, D)`: The centroids, which are unit vectors.
    """
    lengths = vectors.norm(dim=1, keepdim=True)
    directions = (vectors / lengths)[lengths[:, 0] > 0]
    centroids = _first_centroids(directions, num_clusters, generator)
    members = None
    for _ in range(_ITERATIONS if len(centroids) else 0):
        cosines, nearest = (directions @ centroids.T).max(dim=1)
        if members is not None and torch.equal(nearest, members):
            break
        members = nearest
        is_member = nn.functional.one_hot(members, len(centroids)).to(directions.dtype)
        sums = is_member.T @ directions
        norms = sums.norm(dim=1, keepdim=True)
        centroids = torch.where(norms > _SAME, sums / norms.clamp_min(_SAME), centroids)
        farthest = cosines.argsort(stable=True).tolist()
        for cluster in (is_member.sum(dim=0) == 0).nonzero().flatten().tolist():
            centroids[cluster] = directions[farthest.pop(0)]
    missing = torch.randn(num_clusters - len(centroids), vectors.shape[1], generator=generator)
    return torch.cat([centroids, nn.functional.normalize(missing, dim=1)])


def _first_centroids(directions: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Draws up to `num_clusters` different directions, each with a probability by its distance to the previous ones."""
    if len(directions) == 0:
        return directions
    chosen = [int(torch.randint(len(directions), (1,), generator=generator))]
    nearest = directions @ directions[chosen[0]]
    while len(chosen) < num_clusters:
        distances = 1 - nearest
        distances[distances < _SAME] = 0.0
        if not distances.any():
            break
        chosen.append(int(torch.multinomial(distances, 1, generator=generator)))
        nearest = torch.maximum(nearest, directions @ directions[chosen[-1]])
    return directions[chosen]


def _scaled(
    centroids: torch.Tensor,
    config: SparseMoeVlmExpertsConfig,
    groups: Sequence[ExpertGroup],
    granularity: int,
    states: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    longest = router_std(config) * math.sqrt(config.hidden_size)
    if len(centroids) == 1:
        return centroids * longest
    rows = centroids - centroids.mean(dim=0)
    scale = longest / rows.norm(dim=1).max().clamp_min(_SAME)
    spreads = []
    for modality_id, modality in enumerate(config.modalities):
        serves = [group.serves(modality) for group in groups for _ in range(group.num_experts // granularity)]
        if sum(serves) > 1:
            logits = states[ids == modality_id] @ rows[torch.tensor(serves)].T
            spreads.append(logits.std(dim=1, correction=0))
    if spreads:
        scale = torch.minimum(scale, 1 / torch.cat(spreads).mean())
    return rows * scale


class _Block(Protocol):
    """The attributes of a dense block that [`collect_block_inputs`] needs: its name in the model, and its layer."""

    @property
    def name(self) -> str: ...

    @property
    def layer(self) -> int: ...


def collect_block_inputs(
    model: PreTrainedModel,
    batch: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    blocks: Iterable[_Block],
    *,
    modalities: Sequence[str],
    placeholder_ids: Mapping[str, Sequence[int]] | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> dict[int, BlockInputs]:
    """
    Runs the dense model on examples and samples the inputs of its feed-forward blocks. The tokens are the same in all
    layers and contain no padding.

    Args:
        model (`PreTrainedModel`):
            The dense model. It runs in evaluation mode, without gradients.
        batch (`Mapping` or iterable of `Mapping`):
            Inputs of the model, as its processor returns them.
        blocks (`Iterable[GatedBlock]`):
            The feed-forward blocks.
        modalities (`Sequence[str]`):
            Names of the modalities, in the order of their ids.
        placeholder_ids (`Mapping[str, Sequence[int]]`, *optional*):
            Ids of the placeholder tokens of each modality, for inputs without `mm_token_type_ids`. All other tokens are
            text. Video counts as image if `modalities` does not contain it.
        max_tokens (`int`, defaults to 2048):
            Number of tokens of each modality to sample.
        seed (`int`, defaults to 0):
            Seed of the sample.

    Returns:
        `dict[int, BlockInputs]`: The sample of each layer, on the CPU.

    Raises:
        UpcyclingError: If there are no examples, or the tokens of a block are not those of the inputs.
        ValueError: If a modality id is unknown.
    """
    blocks = list(blocks)
    generator = torch.Generator().manual_seed(seed)
    samples: dict[int, _Sample] = {block.layer: _Sample(len(modalities), max_tokens) for block in blocks}
    for inputs in [batch] if isinstance(batch, Mapping) else batch:
        inputs = {name: _send(value, model.device) for name, value in inputs.items() if name != "labels"}
        ids, is_real = _tokens(inputs, modalities, placeholder_ids or {})
        priorities = torch.rand(ids.shape, generator=generator)
        seen: dict[int, torch.Tensor] = {}
        with evaluating(model), _hooks(model, blocks, seen.__setitem__), torch.no_grad():
            model(**inputs | {"use_cache": False})  # a cache would only need memory
        for block in blocks:
            states = seen.get(block.layer)
            if states is None or states[..., 0].numel() != len(ids):
                saw = "nothing" if states is None else f"inputs of shape {tuple(states.shape)}"
                raise UpcyclingError(
                    f"block {block.name!r} saw {saw} "
                    f'for {len(ids)} tokens of `batch`, so `router_init="data"` cannot tell their modalities: use '
                    '`router_init="random"`.'
                )
            states = states.reshape(len(ids), -1)
            samples[block.layer].add(states, ids, is_real, priorities)
    if any(sample.is_empty for sample in samples.values()):
        raise UpcyclingError('`router_init="data"` needs examples: `batch` has no tokens.')
    return {layer: sample.inputs() for layer, sample in samples.items()}


class _Sample:
    """The tokens with the smallest priorities of each modality, out of those added so far."""

    def __init__(self, num_modalities: int, max_tokens: int):
        self.max_tokens = max_tokens
        self.kept: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_modalities

    def add(self, states: torch.Tensor, ids: torch.Tensor, is_real: torch.Tensor, priorities: torch.Tensor) -> None:
        for modality_id, kept in enumerate(self.kept):
            tokens = ((ids == modality_id) & is_real).nonzero().flatten()
            if len(tokens) == 0:
                continue
            tokens = tokens[priorities[tokens].argsort(stable=True)[: self.max_tokens]]
            new_priorities, new_states = priorities[tokens], states[tokens.to(states.device)].cpu()
            if kept is not None:
                new_priorities, new_states = torch.cat([kept[0], new_priorities]), torch.cat([kept[1], new_states])
            order = new_priorities.argsort(stable=True)[: self.max_tokens]
            self.kept[modality_id] = new_priorities[order], new_states[order]

    @property
    def is_empty(self) -> bool:
        return all(kept is None for kept in self.kept)

    def inputs(self) -> BlockInputs:
        states, ids = [], []
        for modality_id, kept in enumerate(self.kept):
            if kept is not None:
                states.append(kept[1])
                ids.append(torch.full((len(kept[1]),), modality_id))
        return BlockInputs(torch.cat(states), torch.cat(ids))


def _send(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_send(item, device) for item in value)
    return value.to(device) if torch.is_tensor(value) else value


def _tokens(
    inputs: Mapping[str, Any], modalities: Sequence[str], placeholder_ids: Mapping[str, Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the modality ids of the tokens of a call, and which tokens are not padding: `(B · T,)`, on the CPU."""
    input_ids, given = inputs.get("input_ids"), inputs.get("mm_token_type_ids")
    if given is not None:
        ids = listed_ids(given.long().cpu(), modalities)
    elif input_ids is not None:
        ids = torch.zeros(input_ids.shape, dtype=torch.long)
        for modality, tokens in placeholder_ids.items():
            is_placeholder = torch.isin(input_ids.cpu(), torch.tensor(list(tokens), dtype=torch.long))
            ids = ids.masked_fill(is_placeholder, served_as(modality, modalities))
    else:
        raise UpcyclingError('`router_init="data"` needs `input_ids` or `mm_token_type_ids` in `batch`.')
    check_range(ids, modalities)
    mask = inputs.get("attention_mask")
    is_real = torch.ones_like(ids, dtype=torch.bool)
    if torch.is_tensor(mask) and mask.shape == ids.shape:
        is_real = mask.bool().cpu()
    return ids.flatten(), is_real.flatten()


@contextmanager
def _hooks(model: nn.Module, blocks: Iterable[_Block], take: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Passes the inputs of the blocks to a function while the model runs."""

    def hook(layer: int) -> Callable[..., None]:
        return lambda _, args, kwargs: take(layer, (args or tuple(kwargs.values()))[0].detach())

    handles = [
        model.get_submodule(block.name).register_forward_pre_hook(hook(block.layer), with_kwargs=True)
        for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
