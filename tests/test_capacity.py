"""Capacity and batch-priority dropping equal the algorithm of the paper, slot by slot."""

import math
from fractions import Fraction

import pytest
import torch

from modeling_sparse_moe_vlm.capacity import drop_over_capacity, expert_capacity
from modeling_sparse_moe_vlm.routing import RoutingPlanner, RoutingRule, real_tokens, route
from tests.support.models import make_config, make_inputs, make_model
from tests.support.oracles import ARRANGEMENTS, MANY_GROUPS, make_block

pytestmark = pytest.mark.newest

TOKENS, EXPERTS = 48, 6
DEVICE = torch.device("cpu")


def make_batch(seed: int = 0, tokens: int = TOKENS, k: int = 3):
    """Returns logits that favour the first experts, random ids of two modalities, and every fifth token as padding."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, EXPERTS, generator=generator) * 2 - torch.arange(EXPERTS) * 0.7
    modality_ids = torch.randint(0, 2, (tokens,), generator=generator)
    real = torch.arange(tokens) % 5 != 4
    weights, index = route(logits, top_k=k)
    return logits, weights, index, modality_ids, real


def literal_drop(index, priority, capacity, modality_ids, real) -> list[list[int]]:
    """Batch-priority routing (V-MoE, arXiv 2106.05974). Returns the experts that each token keeps."""
    tokens, k = index.shape
    kept = [[EXPERTS] * k for _ in range(tokens)]
    taken = {}
    for slot in range(k):
        for token in sorted(range(tokens), key=lambda token: -priority[token].item()):
            expert, modality = index[token, slot].item(), modality_ids[token].item()
            if not real[token] or expert == EXPERTS:
                continue
            if taken.get((modality, expert), 0) < capacity[modality]:
                taken[modality, expert] = taken.get((modality, expert), 0) + 1
                kept[token][slot] = expert
    return kept


# ---------------------------------------------------------------- the functions


@pytest.mark.parametrize("factor", [Fraction(1, 2), Fraction(1), Fraction(11, 10), Fraction(5, 4), Fraction(3)])
def test_capacity_is_the_rounded_share(factor):
    modality_ids, real = make_batch()[3:]
    for mask in (None, real):
        counted = torch.ones(TOKENS, dtype=torch.bool) if mask is None else mask
        numbers = [int(((modality_ids == modality) & counted).sum()) for modality in (0, 1)]
        shares = [factor * 2 / 6, factor * 1 / 4]  # two of six experts, and one of four
        capacity = expert_capacity(share=[float(share) for share in shares], modality_ids=modality_ids, real=mask)
        assert capacity.tolist() == [math.ceil(share * number) for share, number in zip(shares, numbers, strict=True)]


def test_a_single_token_is_never_dropped():
    assert expert_capacity(share=[0.5 * 1 / 64], modality_ids=torch.zeros(1, dtype=torch.long)).tolist() == [1]
    assert expert_capacity(share=[1.0, 1.0], modality_ids=torch.zeros(3, dtype=torch.long)).tolist() == [3, 0]


def test_a_whole_number_is_not_rounded_up():
    """0.2 · 2 / 6 · 45 is 3, but slightly more than 3 in floating point."""
    assert expert_capacity(share=[0.2 * 2 / 6], modality_ids=torch.zeros(45, dtype=torch.long)).tolist() == [3]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("capacity", [[0, 1], [2, 1], [5, 3], [100, 100]])
def test_dropping_is_the_literal_algorithm(capacity, k):
    for seed in range(5):
        logits, weights, index, modality_ids, real = make_batch(seed, k=k)
        index[::7, -1], weights[::7, -1] = EXPERTS, 0.0  # unused slots
        priority = torch.softmax(logits, dim=-1).amax(dim=-1)
        left, kept = drop_over_capacity(
            weights,
            index,
            num_experts=EXPERTS,
            priority=priority,
            capacity=torch.tensor(capacity),
            modality_ids=modality_ids,
            real=real,
        )
        assert kept.tolist() == literal_drop(index, priority, capacity, modality_ids, real)
        assert torch.equal(left, weights.masked_fill(kept == EXPERTS, 0.0))


def test_the_most_certain_tokens_stay():
    """Four tokens choose the same expert, which has a capacity of two. Another modality has its own capacity there."""
    index = torch.tensor([[0], [0], [0], [0], [0]])
    _, kept = drop_over_capacity(
        torch.ones(5, 1),
        index,
        num_experts=2,
        priority=torch.tensor([0.2, 0.9, 0.5, 0.7, 0.1]),
        capacity=torch.tensor([2, 1]),
        modality_ids=torch.tensor([0, 0, 0, 0, 1]),
    )
    assert kept[:, 0].tolist() == [2, 0, 2, 0, 0]


def test_first_choices_come_before_second_ones():
    """The first choices of all tokens come before any second choice, however certain the token is."""
    index = torch.tensor([[0, 1], [1, 0]])
    _, kept = drop_over_capacity(
        torch.ones(2, 2),
        index,
        num_experts=2,
        priority=torch.tensor([0.9, 0.1]),
        capacity=torch.tensor([1]),
        modality_ids=torch.tensor([0, 0]),
    )
    assert kept.tolist() == [[0, 2], [1, 2]]


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "top_p"])
def test_priority_is_the_largest_score(router):
    """The scores are probabilities, or affinities with sigmoid. They are neither logits nor the scaled weights."""
    config = make_config(
        expert_groups="joint", num_experts=EXPERTS, router=router, expert_capacity_factor=0.5, router_top_p=0.9
    ).text_config
    rule = RoutingRule.of(config, config.layer_expert_groups(0))
    logits, _, _, modality_ids, real = make_batch()
    logits += 3 * torch.randn(
        TOKENS, 1, generator=torch.Generator().manual_seed(1)
    )  # changes sigmoids, but not the softmax
    weights, index = rule.choose(logits)
    _, kept = rule.drop(logits, weights, index, modality_ids=modality_ids, real=real)
    score = torch.sigmoid(logits) if router == "sigmoid" else torch.softmax(logits, dim=-1)
    capacity = [math.ceil(0.5 * 2 * ((modality_ids == modality) & real).sum() / EXPERTS) for modality in (0, 1)]
    assert kept.tolist() == literal_drop(index, score.amax(dim=-1), capacity, modality_ids, real)
    assert (kept == EXPERTS).sum() > (index == EXPERTS).sum() + 10


def test_capacity_of_a_modality_is_over_the_experts_that_serve_it():
    fields = {"expert_groups": MANY_GROUPS, "num_experts": None, "num_experts_per_tok_by_modality": {"image": 3}}
    config = make_config(**fields, expert_capacity_factor=1.5).text_config
    rule = RoutingRule.of(config, config.layer_expert_groups(0, always_on=False))
    assert rule.capacity == pytest.approx((1.5 * 2 / 5, 1.5 * 3 / 7))


@pytest.mark.parametrize("shape", [(2, 7), (1, 3)])
def test_real_tokens(shape):
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])[: shape[0]]
    expected = mask[:, -shape[1] :].flatten().bool()  # with a cache the mask is longer
    assert torch.equal(real_tokens(mask, shape[0] * shape[1]), expected)
    for unknown in (None, mask[:, None, None].expand(-1, 1, 7, 7), object()):
        assert real_tokens(unknown, 14) is None


# ---------------------------------------------------------------- in the model


def test_no_more_than_the_capacity_and_gradients_of_the_kept_tokens():
    logits, _, _, modality_ids, real = make_batch()
    config = make_config(expert_groups="joint", num_experts=EXPERTS, expert_capacity_factor=1.0).text_config
    rule = RoutingRule.of(config, config.layer_expert_groups(0))
    logits.requires_grad_()
    weights, index = rule.choose(logits)
    left, kept = rule.drop(logits, weights, index, modality_ids=modality_ids, real=real)
    for modality in (0, 1):
        number = ((modality_ids == modality) & real).sum()
        counts = torch.bincount(kept[modality_ids == modality].flatten(), minlength=EXPERTS + 1)[:EXPERTS]
        assert counts.max() == math.ceil(2 * number / EXPERTS)
    left[:, 0].sum().backward()
    has_both = (kept < EXPERTS).all(dim=1)
    assert (logits.grad[(kept == EXPERTS).all(dim=1)] == 0).all()
    assert (logits.grad[has_both].abs().sum(dim=1) > 0).all()


def test_a_sufficient_capacity_changes_nothing():
    """If the capacity is the number of tokens, the output is the one without a limit."""
    unlimited, limited = (make_model(expert_capacity_factor=factor) for factor in (None, 1e6))
    inputs = make_inputs()
    with torch.no_grad():
        torch.testing.assert_close(limited(**inputs).logits, unlimited(**inputs).logits, rtol=1e-5, atol=1e-6)
        tight = make_model(expert_capacity_factor=0.5)
        assert (tight(**inputs).logits - unlimited(**inputs).logits).abs().max() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arrangement", ["hybrid", "joint", "isolated"])
def test_padding_uses_no_capacity(arrangement, side):
    model = make_model(expert_groups=arrangement, expert_capacity_factor=0.75)
    inputs = make_inputs()
    pads = (9, 0) if side == "left" else (0, 9)
    padded = {
        key: value if key == "pixel_values" else torch.nn.functional.pad(value, pads) for key, value in inputs.items()
    }
    real = slice(9, None) if side == "left" else slice(0, 14)
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(model(**padded).logits[:, real], expected, rtol=1e-4, atol=1e-4)
        del padded["attention_mask"]  # then padding counts as text
        assert (model(**padded).logits[:, real] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["joint", "hybrid", "many"])
def test_dropped_tokens_get_nothing_from_the_experts(name, implementation):
    """All tokens except the first are dropped, so only their residual remains. Always-on experts have no capacity."""
    block, config = make_block(implementation=implementation, **ARRANGEMENTS[name], expert_capacity_factor=1e-3)
    block.shared_experts = None
    planner = RoutingPlanner(config)
    hidden_states = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0)).expand(1, 5, 32)
    ids = torch.tensor([[0, 1, 0, 1, 0]])
    for given in (ids, None):
        output = block(hidden_states, planner(given, DEVICE, torch.ones_like(ids), 5))[0]
        alone = 2 if given is not None else 1
        assert (output[:alone].abs().amax(dim=-1) > 0).all()
        assert (output[alone:] == 0).all()
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


def test_cached_steps_count_their_own_tokens():
    """During decoding, the mask also covers the cache, but the capacity depends on the new tokens only."""
    model = make_model(expert_groups="joint", expert_capacity_factor=1.0)
    inputs = make_inputs(images_per_row=0)
    inputs["attention_mask"][0, :3] = 0
    with torch.no_grad():
        cache = model(**{key: value[:, :13] for key, value in inputs.items()}, use_cache=True).past_key_values
        last = {key: value if key == "attention_mask" else value[:, 13:] for key, value in inputs.items()}
        assert model(**last, past_key_values=cache).logits.shape == (2, 1, 99)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert output.shape == (2, 18)
