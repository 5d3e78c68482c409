"""
Initial weights of experts, from the dense block of their layer with gate W_g, up W_u `(I, D)` and down W_d `(D, I)`::

    dense(x) = W_d (act(W_g x) ⊙ W_u x)

- `copy`: every routed expert is the dense block. The weights of the chosen experts sum to 1.
- `split` into G parts: the neurons are cut into G equal parts in their order, and part p of every copy is the expert
  (W_g[p], √G W_u[p], √G W_d[p]). The parts of one copy have consecutive ids and the same router row. If the weight of
  the copy is w, each part has the weight w / G, and G · w / G · √G · √G / G = w. (The gate cannot be scaled, because
  activations are not homogeneous.)
- `residual`: an always-on expert is the dense block, and routed experts have W_d = 0. They keep the gate and up
  projections of the dense block, so that they start from features of the model. The first step changes only W_d, and
  later steps everything.
- `drop` with ratio r: like `copy`, but in each expert, a random set of r · I neurons is drawn again: the rows of W_g
  and W_u and the columns of W_d are normally distributed, with the mean and the standard deviation of the weights that
  they replace (Drop-Upcycling, arXiv 2502.19261).

Always-on experts that do not contain the dense block also have W_d = 0. Their gate and up projections are random, with
the mean and the standard deviation of those of the dense block. Copies would duplicate neurons that run for every
token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ...expert_groups import ExpertGroup
from ...expert_shards import SparseMoeVlmExpertShards
from ...experts import SparseMoeVlmExpertGroups, SparseMoeVlmSparseMoeBlock, SparseMoeVlmUnfusedExperts
from ...experts_config import SparseMoeVlmExpertsConfig
from .arrangement import Start, dense_carriers
from .router_rows import BlockInputs, data_rows, random_rows


class GatedWeights(NamedTuple):
    """Weights of a gated feed-forward block of width I.

    Args:
        gate, up (`torch.Tensor` of shape `(I, D)`): The projection with the activation, and the one that it multiplies.
        down (`torch.Tensor` of shape `(D, I)`): The projection back to the residual stream.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @property
    def width(self) -> int:
        return self.gate.shape[0]


def empty_block(
    config: SparseMoeVlmExpertsConfig, layer: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> SparseMoeVlmSparseMoeBlock:
    """Allocates the sparse block of one layer for [`start_block`], without drawing random numbers."""
    with torch.device("meta"):
        block = SparseMoeVlmSparseMoeBlock(config, layer)
    return block.to(dtype).to_empty(device=device)


@torch.no_grad()
def start_block(
    block: SparseMoeVlmSparseMoeBlock,
    config: SparseMoeVlmExpertsConfig,
    weights: GatedWeights,
    start: Start,
    *,
    seed: int = 0,
    inputs: BlockInputs | None = None,
) -> None:
    """
    Fills a sparse block in place: router, routed experts (except those of a pool: see [`start_pool`]) and always-on
    experts. Random draws depend only on the seed and the layer, and do not change the global random state. In addition
    to the weights, memory for one expert is needed.

    Args:
        block (`SparseMoeVlmSparseMoeBlock`):
            The block of one layer. The weights are converted to its dtype and device.
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the block.
        weights ([`GatedWeights`]):
            The dense block of this layer.
        start ([`~arrangement.Start`]):
            The start of the experts, from [`~arrangement.experts_fields`] like the configuration.
        seed (`int`, defaults to 0):
            Seed of all random draws.
        inputs ([`~router_rows.BlockInputs`], *optional*):
            Inputs of the dense block, from which the router rows are computed. Without them, the rows are random.

    Raises:
        ValueError: If the weights do not fit the configuration.
    """
    layer = block.layer_idx
    _check_shapes(weights, config, f"layer {layer}")
    routed = config.layer_expert_groups(layer, always_on=False)
    generator = seeded_generator(seed, "router", layer)
    if inputs is None:
        rows = random_rows(config, routed, start.granularity, generator)
    else:
        rows = data_rows(config, routed, start.granularity, inputs, generator)
    block.gate.weight.copy_(rows)
    if block.gate.e_score_correction_bias is not None:
        block.gate.e_score_correction_bias.zero_()
    if block.experts is not None:
        for group in routed:
            generator = seeded_generator(seed, "experts", layer, group.name)
            for number, place in enumerate(_places(block.experts, group)):
                _write(place, _routed_expert(weights, start, group, number, generator))
    if block.shared_experts is not None:
        groups = config.layer_expert_groups(layer)
        carriers: Sequence[str] = ()
        if start.name == "residual":
            carriers = dense_carriers(groups, config.modalities, weights.width) or ()
        for group in groups:
            if group.always_on:
                generator = seeded_generator(seed, "always-on", layer, group.name)
                _start_always_on(block.shared_experts[group.name], weights, group.name in carriers, generator)


@torch.no_grad()
def start_pool(
    experts: nn.Module,
    config: SparseMoeVlmExpertsConfig,
    pool: int,
    weights: Iterable[GatedWeights],
    start: Start,
    *,
    seed: int = 0,
) -> None:
    """
    Fills the routed experts that the layers of a pool share. With `start.pool_start="first"`, they start from the dense
    block of the pool's first layer, and with `"mean"`, from the mean of the blocks of all its layers. With
    `"residual"`, expert e has the gate and up projections of layer e modulo n of the n layers, and its output is zero.

    Args:
        experts (`nn.Module`):
            The experts of the pool.
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the model's experts.
        pool (`int`):
            Number of the pool.
        weights (`Iterable[GatedWeights]`):
            The dense blocks of the pool's layers, in their order. They are used one by one, so an iterator need not
            keep all of them in memory.
        start, seed:
            See [`start_block`].

    Raises:
        ValueError: If the weights do not fit the configuration.
    """
    layers = config.pools[pool]
    routed = config.layer_expert_groups(layers[0], always_on=False)
    generators = {group.name: seeded_generator(seed, "pool", pool, group.name) for group in routed}
    if start.name != "residual":
        block = _pooled_block(weights, start, config, pool)
        for group in routed:
            for number, place in enumerate(_places(experts, group)):
                _write(place, _routed_expert(block, start, group, number, generators[group.name]))
        return
    for position, (layer, block) in enumerate(zip(layers, weights, strict=True)):
        _check_shapes(block, config, f"layer {layer}")
        for group in routed:
            for number, place in enumerate(_places(experts, group)):
                if number % len(layers) == position:
                    _write(place, _routed_expert(block, start, group, number, generators[group.name]))


def seeded_generator(seed: int, *what: str | int) -> torch.Generator:
    """
    Returns a generator on the CPU for one purpose, such as the router of layer 3. It does not depend on other draws,
    their order, or the device.
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def _check_shapes(weights: GatedWeights, config: SparseMoeVlmExpertsConfig, what: str) -> None:
    width, hidden_size = weights.width, config.hidden_size
    shapes = [tuple(weight.shape) for weight in weights]
    if shapes != [(width, hidden_size), (width, hidden_size), (hidden_size, width)]:
        raise ValueError(
            f"the dense block of {what} has weights of the shapes {shapes} in a model of width {hidden_size}."
        )


def _places(experts: nn.Module, group: ExpertGroup) -> Iterator[GatedWeights]:
    """Yields the weights of every expert of a group, which [`_write`] changes, in the order of their ids."""
    stack = experts[group.name] if isinstance(experts, SparseMoeVlmExpertGroups) else experts
    if isinstance(stack, SparseMoeVlmUnfusedExperts):
        expert: Any
        for expert in stack:
            yield GatedWeights(expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight)
        return
    parts: Iterable[Any] = stack.shards if isinstance(stack, SparseMoeVlmExpertShards) else [stack]
    for part in parts:
        for gate_up, down in zip(part.gate_up_proj.unbind(), part.down_proj.unbind(), strict=True):
            gate, up = gate_up.chunk(2)
            yield GatedWeights(gate, up, down)


def _write(place: GatedWeights, expert: GatedWeights) -> None:
    for target, source in zip(place, expert, strict=True):
        target.copy_(source)


def _routed_expert(
    weights: GatedWeights, start: Start, group: ExpertGroup, number: int, generator: torch.Generator
) -> GatedWeights:
    """Returns the initial weights of expert `number` of a routed group."""
    if start.name == "split":
        return _part(weights, number % start.granularity, start.granularity)
    if start.name == "drop":
        return _redrawn(weights, start.drop_ratio, generator)
    if start.name == "residual":
        return _silent(weights, group.intermediate_size, generator)
    return weights


def _part(weights: GatedWeights, part: int, granularity: int) -> GatedWeights:
    size = weights.width // granularity
    neurons = slice(part * size, (part + 1) * size)
    scale = math.sqrt(granularity)
    return GatedWeights(weights.gate[neurons], weights.up[neurons] * scale, weights.down[:, neurons] * scale)


def _redrawn(weights: GatedWeights, ratio: float, generator: torch.Generator) -> GatedWeights:
    """Returns a block in which a set of neurons, the same in all three weights, is drawn again."""
    neurons = torch.randperm(weights.width, generator=generator)[: round(ratio * weights.width)]
    if len(neurons) == 0:
        return weights
    neurons = neurons.to(weights.gate.device)
    gate, up, down = (weight.float().clone() for weight in weights)
    gate[neurons] = _alike(gate[neurons], generator)
    up[neurons] = _alike(up[neurons], generator)
    down[:, neurons] = _alike(down[:, neurons], generator)
    return GatedWeights(gate, up, down)


def _silent(weights: GatedWeights, width: int, generator: torch.Generator) -> GatedWeights:
    """Returns an expert whose output is zero: neurons of the dense block (and new ones if it is wider), with down 0."""
    gate, up = weights.gate, weights.up
    if width < weights.width:
        neurons = torch.randperm(weights.width, generator=generator)[:width].to(gate.device)
        gate, up = gate[neurons], up[neurons]
    elif width > weights.width:
        new = width - weights.width
        gate = torch.cat([gate, _alike(gate, generator, rows=new)])
        up = torch.cat([up, _alike(up, generator, rows=new)])
    return GatedWeights(gate, up, weights.down.new_zeros(weights.down.shape[0], width))


def _start_always_on(expert: Any, weights: GatedWeights, holds_dense_block: bool, generator: torch.Generator) -> None:
    """Fills the network of a group's always-on experts, with the dense block first if it contains it."""
    held = weights.width if holds_dense_block else 0
    gate, up, down = expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight
    new = gate.shape[0] - held
    for place, weight in ((gate, weights.gate), (up, weights.up)):
        place[:held].copy_(weight[:held])
        place[held:].copy_(_alike(weight, generator, rows=new))
    down[:, :held].copy_(weights.down[:, :held])
    down[:, held:].zero_()


def _alike(weight: torch.Tensor, generator: torch.Generator, rows: int | None = None) -> torch.Tensor:
    """Draws normally distributed values in float32, with the mean, standard deviation and shape of a weight."""
    std, mean = torch.std_mean(weight.float(), correction=0)
    shape = weight.shape if rows is None else (rows, weight.shape[1])
    return mean + std * torch.randn(shape, generator=generator).to(weight.device)


def _pooled_block(
    weights: Iterable[GatedWeights], start: Start, config: SparseMoeVlmExpertsConfig, pool: int
) -> GatedWeights:
    """Returns the dense block that the experts of a pool start from."""
    layers = config.pools[pool]
    blocks = iter(weights)
    first = next(blocks)
    _check_shapes(first, config, f"layer {layers[0]}")
    if start.pool_start != "mean":
        return first
    total = [weight.float().clone() for weight in first]
    for layer, block in zip(layers[1:], blocks, strict=True):
        _check_shapes(block, config, f"layer {layer}")
        for sum_, weight in zip(total, block, strict=True):
            sum_ += weight
    return GatedWeights(*(sum_ / len(layers) for sum_ in total))
