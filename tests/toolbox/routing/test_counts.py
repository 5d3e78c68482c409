"""Compares routing counts with a loop over tokens, and checks what must not change them."""

import pytest
import torch

from modeling_sparse_moe_vlm.routing import RoutingPlanner, groups_key, router_biases
from modeling_sparse_moe_vlm.toolbox.routing import RoutingCounts, count_batch, count_routing, measure_routing
from tests.support.models import make_config, make_inputs, make_model
from tests.support.oracles import ARRANGEMENTS, route_token

IDS = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


def assert_equal(counts: RoutingCounts, expected: RoutingCounts) -> None:
    for field in ("tokens", "wanted", "dropped"):
        assert torch.equal(getattr(counts, field), getattr(expected, field)), field
    torch.testing.assert_close(counts.entropy, expected.entropy)


def random_routing(config, with_bias: bool):
    generator = torch.Generator().manual_seed(0)
    plan = RoutingPlanner(config)(IDS, torch.device("cpu"))
    logits, biases = [], []
    for layer in range(config.num_hidden_layers):
        groups = config.layer_expert_groups(layer, always_on=False)
        if groups:
            values = 2 * torch.randn(IDS.numel(), sum(group.num_experts for group in groups), generator=generator)
            served = {} if plan is None else plan.served
            if groups_key(groups) in served:
                values = values.masked_fill(~served[groups_key(groups)], -torch.inf)
            logits.append(values)
            biases.append(torch.randn(2, values.shape[1], generator=generator))
    return logits, biases if with_bias else None


def literal_counts(config, router_logits, mask, biases) -> RoutingCounts:
    """Counts token by token, without a capacity."""
    shape = (len(router_logits), 2, config.num_experts)
    wanted = torch.zeros(shape, dtype=torch.long)
    entropy = torch.zeros(len(router_logits), 2, len(config.routed_group_names))
    sparse_layers = [layer for layer in range(config.num_hidden_layers) if config.is_sparse_layer(layer)]
    for number, logits in enumerate(router_logits):
        for token, modality_id in enumerate(IDS.flatten().tolist()):
            if not mask.flatten()[token]:
                continue
            modality = config.modalities[modality_id]
            serving = logits[token].isfinite().nonzero().squeeze(1)
            bias = None if biases is None else biases[number][modality_id, serving]
            k = config.experts_per_token(modality)
            for expert in route_token(logits[token, serving], k, config.router, True, config.router_top_p, bias):
                wanted[number, modality_id, serving[expert]] += 1
            first = 0
            for group in config.layer_expert_groups(sparse_layers[number], always_on=False):
                scores = logits[token, first : first + group.num_experts]
                first += group.num_experts
                if group.serves(modality):
                    affinity = torch.sigmoid(scores) if config.router == "sigmoid" else torch.exp(scores)
                    column = config.routed_group_names.index(group.name)
                    entropy[number, modality_id, column] += torch.distributions.Categorical(affinity).entropy()
    tokens = torch.tensor([((modality_id == IDS) & (mask == 1)).sum() for modality_id in (0, 1)])
    return RoutingCounts(tokens, wanted, torch.zeros(shape, dtype=torch.long), entropy)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_counts_equal_those_of_the_loop(name, masked):
    config = make_config(**ARRANGEMENTS[name], num_hidden_layers=3, mlp_only_layers=[1]).text_config
    logits, biases = random_routing(config, with_bias=config.router_bias_update_rate is not None)
    counts = count_routing(config, logits, IDS, MASK if masked else None, biases)
    assert_equal(counts, literal_counts(config, logits, MASK if masked else torch.ones_like(MASK), biases))
    if config.router != "top_p":
        slots = [config.experts_per_token(modality) for modality in config.modalities]
        assert torch.equal(counts.wanted.sum(dim=-1), (counts.tokens * torch.tensor(slots)).expand(2, 2))


def test_groups_by_layer():
    groups = [
        {"name": "text", "num_experts": 2, "modalities": ["text"], "layers": [0]},
        {"name": "image", "num_experts": 3, "modalities": ["image"], "layers": [0]},
        {"name": "joint", "num_experts": 4, "layers": [1]},
    ]
    config = make_config(expert_groups=groups, num_experts=None).text_config
    logits, _ = random_routing(config, with_bias=False)
    counts = count_routing(config, logits, IDS, MASK)
    assert_equal(counts, literal_counts(config, logits, MASK, None))
    assert (counts.wanted[1, :, 4] == 0).all()


def test_only_text():
    config = make_config().text_config
    logits, _ = random_routing(config, with_bias=False)
    assert_equal(count_routing(config, logits), count_routing(config, logits, torch.zeros_like(IDS)))


def test_dropped_choices_are_counted():
    """Each expert keeps as many tokens of a modality as its capacity allows, and drops the others."""
    config = make_config(expert_groups="joint", expert_capacity_factor=1.0).text_config
    logits, _ = random_routing(config, with_bias=False)
    logits[0][:, 0] += 4
    counts = count_routing(config, logits, IDS, MASK)
    unlimited = make_config(expert_groups="joint").text_config
    assert torch.equal(counts.wanted, count_routing(unlimited, logits, IDS, MASK).wanted)
    capacity = -(-2 * counts.tokens // 4)[None, :, None]
    assert torch.equal(counts.wanted - counts.dropped, counts.wanted.minimum(capacity))
    assert counts.dropped.sum() > 5


def test_batches_add_up_in_any_order_and_padding_changes_nothing():
    model = make_model(expert_groups="isolated", num_experts=6, router_bias_update_rate=0.0)
    for bias in router_biases(model):
        bias.normal_(std=0.3)
    first, second = make_inputs(batch_size=3), make_inputs(seed=1, batch_size=2)
    whole = {name: torch.cat([second[name], first[name]]) for name in first}
    padded = {
        name: value if name == "pixel_values" else torch.nn.functional.pad(value, (3, 0))
        for name, value in whole.items()
    }
    expected = measure_routing(model, [first, second])
    assert_equal(measure_routing(model, [whole]), expected)
    assert_equal(measure_routing(model, [padded]), expected)
    without_bias = make_model(expert_groups="isolated", num_experts=6)
    assert not torch.equal(measure_routing(without_bias, [whole]).wanted, expected.wanted)


def test_checkpointing_counts_nothing_twice():
    model, inputs = make_model(), make_inputs()
    expected = measure_routing(model, [inputs])
    model.train().gradient_checkpointing_enable()
    outputs = model(**inputs, labels=inputs["input_ids"], output_router_logits=True, use_cache=False)
    outputs.loss.backward()
    assert_equal(count_batch(model, inputs, outputs.router_logits), expected)


def test_no_counts_without_router_logits():
    model, inputs = make_model(), make_inputs()
    assert count_batch(model, inputs, None) is None
    assert measure_routing(make_model(mlp_only_layers=[0, 1]), [inputs]) is None
    assert measure_routing(model, []) is None
