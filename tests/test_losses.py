"""Router losses equal literal loops over tokens and experts."""

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM
from modeling_sparse_moe_vlm.losses import (
    global_entropy_loss,
    load_balancing_loss,
    local_entropy_loss,
    router_losses,
    router_z_loss,
    share_of_batch,
)
from modeling_sparse_moe_vlm.routing import RoutingPlanner, groups_key, router_biases
from tests.support.models import make_config, make_inputs, make_model
from tests.support.oracles import ARRANGEMENTS, route_token

pytestmark = pytest.mark.newest

IDS = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
DEVICE = torch.device("cpu")


def random_logits(config, ids: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """Returns router logits of every sparse layer, with minus infinity for experts that do not serve the token."""
    generator = torch.Generator().manual_seed(seed)
    routing = RoutingPlanner(config)(ids, DEVICE)
    layers = []
    for layer in range(config.num_hidden_layers):
        groups = config.layer_expert_groups(layer, always_on=False)
        if not groups:
            continue
        logits = 2 * torch.randn(ids.numel(), sum(group.num_experts for group in groups), generator=generator)
        if routing is not None and groups_key(groups) in routing.served:
            logits = logits.masked_fill(~routing.served[groups_key(groups)], -torch.inf)
        layers.append(logits.requires_grad_())
    return layers


def as_numbers(losses) -> tuple[float, float]:
    return losses.aux_loss.item(), losses.z_loss.item()


def literal_losses(config, router_logits, ids, mask, biases=None) -> tuple[float, float]:
    """Returns both losses, computed in float64 for each token, modality and layer."""
    layers_aux, layers_z = [], []
    for number, logits in enumerate(router_logits):
        aux, z = [], []
        for modality_id, modality in enumerate(config.modalities):
            tokens = [t for t in range(ids.numel()) if ids.flatten()[t] == modality_id and mask.flatten()[t] == 1]
            if not tokens:
                continue
            serving = logits[tokens[0]].isfinite().nonzero().squeeze(1).tolist()
            load, importance, squares = dict.fromkeys(serving, 0.0), dict.fromkeys(serving, 0.0), 0.0
            for t in tokens:
                scores = logits[t, serving].detach().double()
                bias = None if biases is None else biases[number][modality_id, serving].double()
                weights = route_token(
                    scores, config.experts_per_token(modality), config.router, True, config.router_top_p, bias
                )
                for expert in weights:
                    load[serving[expert]] += 1 / len(tokens)
                affinity = torch.sigmoid(scores) if config.router == "sigmoid" else torch.exp(scores)
                for expert, value in zip(serving, affinity / affinity.sum(), strict=True):
                    importance[expert] += value.item() / len(tokens)
                squares += math.log(torch.exp(scores).sum()) ** 2 / len(tokens)
            aux.append(len(serving) * sum(load[expert] * importance[expert] for expert in serving))
            z.append(squares)
        layers_aux.append(sum(aux) / len(aux))
        layers_z.append(sum(z) / len(z))
    return sum(layers_aux) / len(layers_aux), sum(layers_z) / len(layers_z)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_losses_are_the_literal_ones(name, masked):
    config = make_config(**ARRANGEMENTS[name], num_hidden_layers=3, mlp_only_layers=[1]).text_config
    logits = random_logits(config, IDS)
    assert len(logits) == 2
    losses = router_losses(config, logits, IDS, MASK if masked else None)
    expected = literal_losses(config, logits, IDS, MASK if masked else torch.ones_like(MASK))
    assert as_numbers(losses) == pytest.approx(expected, rel=1e-5)
    (losses.aux_loss + losses.z_loss).backward()
    for layer in logits:
        assert layer.grad.isfinite().all()
        assert (layer.grad[layer == -torch.inf] == 0).all()
        assert (layer.grad != 0).any()
        if masked:
            assert (layer.grad[MASK.flatten() == 0] == 0).all()


@pytest.mark.parametrize("name", ["joint-bias", "many-sigmoid-bias", "hybrid-top_p-bias"])
def test_load_is_that_of_the_biased_choice(name):
    config = make_config(**ARRANGEMENTS[name]).text_config
    logits = random_logits(config, IDS)
    biases = [torch.randn(2, layer.shape[1], generator=torch.Generator().manual_seed(1)) for layer in logits]
    losses = as_numbers(router_losses(config, logits, IDS, MASK, biases))
    assert losses == pytest.approx(literal_losses(config, logits, IDS, MASK, biases), rel=1e-5)
    assert losses[0] != pytest.approx(as_numbers(router_losses(config, logits, IDS, MASK))[0], rel=1e-3)


@pytest.mark.parametrize("name", ["joint", "many-top_p", "joint-sigmoid"])
def test_layers_that_share_experts_are_balanced_together(name):
    """The loss of a pool is that of one layer with the tokens of all its layers, because they share the experts."""
    pooled = make_config(**ARRANGEMENTS[name], num_hidden_layers=3, expert_pool=[0, None, 0]).text_config
    one = make_config(**ARRANGEMENTS[name], num_hidden_layers=1).text_config
    logits = random_logits(pooled, IDS)
    losses = router_losses(pooled, logits, IDS, MASK)
    together = router_losses(one, [torch.cat([logits[0], logits[2]])], torch.cat([IDS, IDS]), torch.cat([MASK, MASK]))
    alone = router_losses(one, [logits[1]], IDS, MASK)
    for field in ("aux_loss", "z_loss"):
        expected = (2 * getattr(together, field) + getattr(alone, field)) / 3
        torch.testing.assert_close(getattr(losses, field), expected)
    apart = router_losses(make_config(**ARRANGEMENTS[name], num_hidden_layers=3).text_config, logits, IDS, MASK)
    assert (losses.aux_loss - apart.aux_loss).abs() > 1e-3


def test_a_pool_whose_layers_use_different_experts_is_balanced():
    config = make_config(
        expert_groups="joint", num_experts_per_tok=1, norm_topk_prob=False, num_hidden_layers=2, expert_pool=[0, 0]
    ).text_config
    ids = torch.zeros(1, 8, dtype=torch.long)
    first, second = torch.tensor([0, 1] * 4), torch.tensor([2, 3] * 4)
    logits = [20 * torch.nn.functional.one_hot(experts, 4).float() for experts in (first, second)]
    assert router_losses(config, logits, ids).aux_loss.item() == pytest.approx(1.0, rel=1e-4)
    config.expert_pool = None
    assert router_losses(config, logits, ids).aux_loss.item() == pytest.approx(2.0, rel=1e-4)


def test_groups_by_layer():
    groups = [
        {"name": "text", "num_experts": 2, "modalities": ["text"], "layers": [0]},
        {"name": "image", "num_experts": 3, "modalities": ["image"], "layers": [0]},
        {"name": "joint", "num_experts": 4, "layers": [1]},
    ]
    config = make_config(expert_groups=groups, num_experts=None).text_config
    logits = random_logits(config, IDS)
    assert [layer.shape[1] for layer in logits] == [5, 4]
    losses = router_losses(config, logits, IDS, MASK)
    assert as_numbers(losses) == pytest.approx(literal_losses(config, logits, IDS, MASK), rel=1e-5)


def test_a_modality_that_collapses_is_not_hidden_by_another():
    """A quarter of the tokens are image tokens, all routed to expert 0. Text is routed evenly to the others."""
    config = make_config(expert_groups="joint", num_experts_per_tok=1, norm_topk_prob=False, num_hidden_layers=1)
    config = config.text_config
    ids = torch.tensor([[1, 0, 0, 0] * 6])
    expert = torch.tensor([0, 1, 2, 3] * 6)
    logits = torch.nn.functional.one_hot(expert, 4).float() * 20
    probabilities = torch.softmax(logits, dim=-1)
    pooled = load_balancing_loss(
        router_probs=probabilities, index=expert[:, None], tokens=torch.ones(24), num_serving=4
    )
    assert pooled.item() == pytest.approx(1.0), "pooled, routing looks perfectly balanced"
    # The image half has the worst value, 4, and the text half that of three experts in balance.
    losses = router_losses(config, [logits], ids)
    assert losses.aux_loss.item() == pytest.approx((4 + 4 / 3) / 2, rel=1e-4)
    assert losses.aux_loss_by_modality.tolist() == pytest.approx([4 / 3, 4], rel=1e-4)


def test_absent_modality_does_not_count():
    config = make_config(expert_groups="isolated", num_experts=6).text_config
    ids = torch.zeros_like(IDS)
    logits = random_logits(config, ids)
    expected = literal_losses(config, logits, ids, torch.ones_like(ids))
    for given in (ids, None):
        losses = router_losses(config, logits, given)
        assert as_numbers(losses) == pytest.approx(expected, rel=1e-5)
        assert losses.aux_loss_by_modality[0].item() == pytest.approx(expected[0], rel=1e-5)
        assert losses.aux_loss_by_modality[1].isnan()
    # A modality is also absent if all of its tokens are padding.
    ids = IDS.clone()
    mask = (ids == 0).long()
    logits = random_logits(config, ids)
    expected = literal_losses(config, logits, ids, mask)
    assert as_numbers(router_losses(config, logits, ids, mask)) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_padding_only_is_zero():
    config = make_config(**ARRANGEMENTS["many"]).text_config
    losses = router_losses(config, random_logits(config, IDS), IDS, torch.zeros_like(IDS))
    assert as_numbers(losses) == (0.0, 0.0)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
def test_single_joint_layer_of_text_has_the_value_of_transformers(masked):
    config = make_config(expert_groups="joint", num_hidden_layers=1).text_config
    logits = random_logits(config, torch.zeros_like(IDS))
    mask = MASK if masked else None
    expected = load_balancing_loss_func(tuple(logits), config.num_experts, config.num_experts_per_tok, mask)
    torch.testing.assert_close(router_losses(config, logits, None, mask).aux_loss, expected)


def test_the_value_is_k_if_balanced_and_larger_if_collapsed():
    tokens = torch.ones(8)
    even = torch.full((8, 4), 0.25)
    index = torch.stack([torch.arange(8) % 4, (torch.arange(8) + 1) % 4], dim=1)
    balanced = load_balancing_loss(router_probs=even, index=index, tokens=tokens, num_serving=4)
    assert balanced.item() == pytest.approx(2.0)
    skewed = torch.tensor([[0.7, 0.2, 0.05, 0.05]]).expand(8, 4)
    collapsed = load_balancing_loss(
        router_probs=skewed, index=torch.tensor([[0, 1]]).expand(8, 2), tokens=tokens, num_serving=4
    )
    assert collapsed.item() == pytest.approx(4 * 0.9)


def test_z_loss():
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf], [5.0, 5.0, 5.0], [1e3, -1e3, 0.0]])
    loss = router_z_loss(router_logits=logits, tokens=torch.tensor([1.0, 0.0, 0.0]))
    assert loss.item() == pytest.approx(math.log(4.0) ** 2)
    loss = router_z_loss(router_logits=logits, tokens=torch.tensor([1.0, 1.0, 0.0]))
    assert loss.item() == pytest.approx((math.log(4.0) ** 2 + (5 + math.log(3.0)) ** 2) / 2)


# ---------------------------------------------------------------- LIMoE's entropy losses


def entropy(probabilities) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("name", ["hybrid", "many", "many-top_p", "joint-sigmoid"])
def test_entropy_losses_are_the_literal_ones(name, masked):
    """Ω_local = mean H(p), Ω_global = max(0, τ - H(mean p)), each with a coefficient by modality."""
    local_coef, global_coef, threshold = {"text": 0.3}, {"text": 0.2, "image": 0.7}, {"image": 1.1}
    config = make_config(
        **ARRANGEMENTS[name],
        router_local_entropy_coef=local_coef,
        router_global_entropy_coef=global_coef,
        router_global_entropy_threshold=threshold,
    ).text_config
    mask = MASK if masked else torch.ones_like(MASK)
    logits = random_logits(config, IDS)
    expected = []
    for layer in logits:
        for modality_id, modality in enumerate(config.modalities):
            tokens = (IDS.flatten() == modality_id) & (mask.flatten() == 1)
            scores = layer[tokens].detach().double()
            scores = scores[:, scores[0].isfinite()]
            affinity = torch.sigmoid(scores) if config.router == "sigmoid" else torch.exp(scores)
            rows = (affinity / affinity.sum(dim=1, keepdim=True)).tolist()
            local_loss = sum(entropy(row) for row in rows) / len(rows)
            mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            global_loss = max(0.0, threshold.get(modality, math.log(len(mean))) - entropy(mean))
            expected.append(local_coef.get(modality, 0) * local_loss + global_coef[modality] * global_loss)
    losses = router_losses(config, logits, IDS, MASK if masked else None)
    assert losses.entropy_loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    losses.entropy_loss.backward()
    for layer in logits:
        assert layer.grad.isfinite().all()
        assert (layer.grad != 0).any()
        assert (layer.grad[layer == -torch.inf] == 0).all()
        if masked:
            assert (layer.grad[MASK.flatten() == 0] == 0).all()


def test_global_entropy_is_free_above_its_threshold():
    """The threshold log(S) is the entropy of S evenly used experts."""
    tokens = torch.ones(4)
    probs = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]] * 2, requires_grad=True)
    for number, expected in ((1, 0.0), (2, 0.0), (4, math.log(2))):
        loss = global_entropy_loss(router_probs=probs, tokens=tokens, threshold=math.log(number))
        assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert probs.grad.isfinite().all()
    assert local_entropy_loss(router_probs=probs, tokens=tokens).item() == pytest.approx(0.0)
    even = torch.full((4, 4), 0.25)
    assert local_entropy_loss(router_probs=even, tokens=tokens).item() == pytest.approx(math.log(4))


def test_entropy_of_no_token_is_zero():
    probs, tokens = torch.full((4, 4), 0.25), torch.zeros(4)
    assert local_entropy_loss(router_probs=probs, tokens=tokens) == 0
    assert global_entropy_loss(router_probs=probs, tokens=tokens, threshold=1.0) == 0


def test_entropy_is_only_computed_if_it_is_used(monkeypatch):
    monkeypatch.delattr("modeling_sparse_moe_vlm.losses.local_entropy_loss")
    config = make_config().text_config
    losses = router_losses(config, random_logits(config, IDS), IDS)
    assert losses.entropy_loss is None
    expected = config.router_aux_loss_coef * losses.aux_loss
    assert torch.equal(losses.total(config), expected)


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "top_p"])
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_extreme_logits_give_finite_losses_and_gradients(router, offset):
    config = make_config(
        expert_groups="isolated", router=router, router_local_entropy_coef=1.0, router_global_entropy_coef=1.0
    ).text_config
    logits = [(layer.detach() + offset).requires_grad_() for layer in random_logits(config, IDS)]
    losses = router_losses(config, logits, IDS, MASK)
    (losses.aux_loss + losses.z_loss + losses.entropy_loss).backward()
    assert all(loss.isfinite().all() for loss in losses)
    assert all(layer.grad.isfinite().all() for layer in logits)


def test_low_precision_logits_are_computed_in_float32():
    config = make_config(expert_groups="joint").text_config
    logits = [layer.bfloat16() for layer in random_logits(config, IDS)]
    losses = router_losses(config, logits, IDS, MASK)
    assert as_numbers(losses) == as_numbers(router_losses(config, [layer.float() for layer in logits], IDS, MASK))
    assert losses.aux_loss.dtype == torch.float32


# ---------------------------------------------------------------- in the model


@pytest.mark.parametrize("name", ["hybrid", "isolated", "many-top_p"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_loss(name, side):
    model = make_model(**ARRANGEMENTS[name], router_aux_loss_coef=0.5, router_z_loss_coef=0.1)
    inputs = make_inputs()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] == 1, -100)
    pads = (4, 0) if side == "left" else (0, 4)
    padded = {
        key: value if key == "pixel_values" else torch.nn.functional.pad(value, pads, value=-100 * (key == "labels"))
        for key, value in inputs.items()
    }
    if side == "left":  # a first label has no position that predicts it, unless padding stands before it
        padded["labels"][:, 4] = -100
    with torch.no_grad():
        expected = model(**inputs, output_router_logits=True)
        actual = model(**padded, output_router_logits=True)
    for field in ("aux_loss", "z_loss", "loss"):
        torch.testing.assert_close(actual[field], expected[field], rtol=1e-4, atol=1e-5)
    coefficients = 0.5 * expected.aux_loss + 0.1 * expected.z_loss
    assert coefficients > 0.1
    with torch.no_grad():
        language_loss = model(**inputs, output_router_logits=False).loss
    torch.testing.assert_close(expected.loss, language_loss + coefficients)


def test_the_loss_of_the_model_uses_entropies_and_biases():
    """The loss includes the weighted entropy terms, and the chosen experts include the effect of the biases."""
    fields = {"router_aux_loss_coef": 0.5, "router_bias_update_rate": 1e-3, "router_local_entropy_coef": 0.4}
    model = make_model(expert_groups="joint", **fields)
    inputs = make_inputs()
    inputs["labels"] = inputs["input_ids"]
    for bias in router_biases(model):
        bias.normal_(std=0.5)
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True)
        language_loss = model(**inputs, output_router_logits=False).loss
    known = inputs["mm_token_type_ids"], inputs["attention_mask"], router_biases(model)
    losses = router_losses(model.config.text_config, outputs.router_logits, *known)
    torch.testing.assert_close(outputs.aux_loss, losses.aux_loss)
    assert losses.entropy_loss > 0.1
    torch.testing.assert_close(outputs.loss, language_loss + 0.5 * losses.aux_loss + losses.entropy_loss)


def test_cached_tokens_are_not_counted_again():
    """During decoding, the mask also covers the cache, but the losses are those of the new tokens only."""
    model = make_model(**ARRANGEMENTS["hybrid"])
    inputs = make_inputs(images_per_row=0)
    inputs["attention_mask"][0, :3] = 0
    with torch.no_grad():
        whole = model(**inputs, output_router_logits=True)
        start = {key: value[:, :10] for key, value in inputs.items()}
        cache = model(**start, use_cache=True).past_key_values
        last = {key: value if key == "attention_mask" else value[:, 10:] for key, value in inputs.items()}
        rest = model(**last, past_key_values=cache, output_router_logits=True)
    logits = [layer.view(2, 14, -1)[:, 10:].flatten(0, 1) for layer in whole.router_logits]
    expected = router_losses(model.config.text_config, logits, torch.zeros(2, 4, dtype=torch.long))
    torch.testing.assert_close(rest.aux_loss, expected.aux_loss, rtol=1e-4, atol=1e-5)


def make_decoder(**coefficients):
    config = make_config(**ARRANGEMENTS["many"], **coefficients).text_config
    torch.manual_seed(0)
    return SparseMoeVlmForCausalLM(config)


def losses_and_gradient(model, micro_batches, num_items):
    """Returns the summed loss of the micro-batches and the gradient of the first router."""
    model.zero_grad()
    total = 0.0
    for batch in micro_batches:
        loss = model(**batch, output_router_logits=True, num_items_in_batch=num_items).loss
        loss.backward()
        total += loss.item()
    return total, model.model.layers[0].mlp.gate.weight.grad.clone()


def test_accumulated_loss_is_that_of_the_whole_batch():
    """Language loss and z-loss are exact if micro-batches have equally many tokens of each modality per target."""
    model = make_decoder(router_aux_loss_coef=0.0, router_z_loss_coef=0.5)
    ids = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0, 1, 0]] * 2)
    input_ids = torch.randint(4, 99, ids.shape, generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[:, 3] = -100
    batch = {"input_ids": input_ids, "mm_token_type_ids": ids, "labels": labels}
    num_items = (labels[:, 1:] != -100).sum()
    whole, whole_gradient = losses_and_gradient(model, [batch], num_items)
    halves = [{key: value[half] for key, value in batch.items()} for half in (slice(0, 2), slice(2, 4))]
    total, gradient = losses_and_gradient(model, halves, num_items)
    assert total == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-4, atol=1e-6)
    # Without the share, the z-loss would count once per micro-batch.
    z_loss = model(**batch, output_router_logits=True).z_loss.item()
    assert 0.5 * z_loss > 1e-2 * whole


def test_accumulated_language_loss_with_uneven_micro_batches():
    model = make_decoder(router_aux_loss_coef=0.0)
    input_ids = torch.randint(4, 99, (3, 8), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[0, :5] = -100
    batch = {"input_ids": input_ids, "labels": labels}
    num_items = (labels[:, 1:] != -100).sum()
    whole, _ = losses_and_gradient(model, [batch], num_items)
    parts = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, 3))]
    total, _ = losses_and_gradient(model, parts, num_items)
    assert total == pytest.approx(whole, rel=1e-5)


def test_share_of_batch():
    labels = torch.tensor([[5, 6, -100, 7], [5, -100, -100, -100]])
    assert share_of_batch(labels, None) == 1.0
    assert share_of_batch(labels, 8) == 2 / 8  # the first label of a row is not a target
    assert share_of_batch(labels, torch.tensor(4)) == 2 / 4
