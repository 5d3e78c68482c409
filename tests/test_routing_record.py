"""Routing is recorded once per layer and forward pass, and losses, statistics and outputs read this record."""

import gc
import weakref

import pytest
import torch

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmTextConfig, routing
from modeling_sparse_moe_vlm.losses import router_losses
from modeling_sparse_moe_vlm.routing import LayerRouting, RoutingPlanner, RoutingRecord, router_biases
from modeling_sparse_moe_vlm.toolbox.routing import count_batch, count_routing, measure_routing
from tests.support.models import TEXT_CONFIG, make_inputs, make_model
from tests.support.oracles import ARRANGEMENTS


@pytest.fixture
def calls(monkeypatch) -> list[torch.Tensor]:
    """Records the logits with which `route` is called."""
    seen = []
    original = routing.route

    def route(logits, **kwargs):
        seen.append(logits)
        return original(logits, **kwargs)

    monkeypatch.setattr(routing, "route", route)
    return seen


def entry(value: float) -> LayerRouting:
    return LayerRouting(torch.full((1, 2), value), torch.zeros(1, 1, dtype=torch.long), None)


def test_a_layer_is_recorded_once_and_in_order():
    record = RoutingRecord()
    record.add(3, entry(3.0))
    record.add(1, entry(1.0))
    record.add(3, entry(4.0))
    assert [layer.logits[0, 0].item() for layer in record.layers()] == [1.0, 3.0]
    outputs = record.outputs()
    assert [logits[0, 0].item() for logits in outputs["router_logits"]] == [1.0, 3.0]
    assert len(outputs["router_indices"]) == 2
    assert "router_dropped" not in outputs
    record.add(5, LayerRouting(torch.zeros(1, 2), torch.zeros(1, 1).long(), torch.ones(1, 1).bool()))
    assert len(record.outputs()["router_dropped"]) == 1


@pytest.mark.parametrize("name", ["hybrid", "joint-bias", "many-top_p"])
def test_route_runs_once_per_layer_and_pass(name, calls):
    """Also in a training step with losses and statistics, although gradient checkpointing runs the layers again."""
    config = ARRANGEMENTS[name] | {"router_z_loss_coef": 0.1, "router_local_entropy_coef": 0.1}
    model, inputs = make_model(num_hidden_layers=3, mlp_only_layers=[1], **config).train(), make_inputs()
    outputs = model(**inputs, labels=inputs["input_ids"], output_router_logits=True, use_cache=False)
    counts = count_batch(model, inputs, outputs.router_logits, outputs.router_indices, outputs.router_dropped)
    outputs.loss.backward()
    assert len(calls) == 2
    assert counts.tokens.sum() == 28
    calls.clear()
    measure_routing(model, [inputs])
    assert len(calls) == 2
    calls.clear()
    model.gradient_checkpointing_enable()
    model(**inputs, labels=inputs["input_ids"], output_router_logits=True, use_cache=False).loss.backward()
    assert len(calls) == 4, "the layers, and the layers again"


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_recorded_choices_are_those_behind_the_logits(name):
    """Losses and counts from the record equal those computed from logits and biases."""
    model = make_model(num_hidden_layers=3, mlp_only_layers=[1], **ARRANGEMENTS[name])
    for bias in router_biases(model) or []:
        bias.normal_(std=0.3)
    inputs, config = make_inputs(), model.config.text_config
    inputs["attention_mask"][1, :2] = 0
    known = inputs["mm_token_type_ids"], inputs["attention_mask"]
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True)
    again = routing.chosen_experts(config, outputs.router_logits, known[0].flatten(), router_biases(model))
    assert len(outputs.router_indices) == 2
    for index, expected in zip(outputs.router_indices, again, strict=True):
        assert index.dtype == torch.long
        assert torch.equal(index, expected)
    assert outputs.router_dropped is None
    from_logits = router_losses(config, outputs.router_logits, *known, router_biases(model))
    recorded = router_losses(config, outputs.router_logits, *known, router_indices=outputs.router_indices)
    assert torch.equal(from_logits.aux_loss, recorded.aux_loss)
    assert torch.equal(outputs.aux_loss, recorded.aux_loss)
    by_hand = count_routing(config, outputs.router_logits, *known, router_biases(model))
    measured = measure_routing(model, [inputs])
    for field in ("tokens", "wanted", "dropped", "entropy"):
        assert torch.equal(getattr(by_hand, field), getattr(measured, field)), field


def test_losses_and_counts_read_the_record_and_do_not_choose_again(calls):
    model, inputs = make_model(expert_groups="joint", num_hidden_layers=1), make_inputs()
    config = model.config.text_config
    with torch.no_grad():
        (logits,) = model(**inputs, output_router_logits=True).router_logits
    calls.clear()
    elsewhere = [torch.full((28, 2), 3)]
    ids = inputs["mm_token_type_ids"]
    losses = router_losses(config, [logits], ids, router_indices=elsewhere)
    probs = torch.softmax(logits, dim=-1)[:, 3]
    expected = [4 * 2 * probs[ids.flatten() == modality].mean() for modality in (0, 1)]
    torch.testing.assert_close(losses.aux_loss_by_modality, torch.stack(expected))
    counts = count_routing(config, [logits], ids, router_indices=elsewhere)
    assert counts.wanted[0].tolist() == [[0, 0, 0, 40], [0, 0, 0, 16]]
    dropped = torch.zeros(28, 2, dtype=torch.bool)
    dropped[:3, 0] = True  # two text tokens and one image token
    counts = count_routing(config, [logits], ids, router_indices=elsewhere, router_dropped=[dropped])
    assert counts.dropped[0].tolist() == [[0, 0, 0, 2], [0, 0, 0, 1]]
    assert not calls


def test_dropped_choices_are_recorded():
    model, inputs = make_model(expert_groups="joint", expert_capacity_factor=0.5), make_inputs()
    inputs["attention_mask"][0, 12:] = 0
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True)
    counts = measure_routing(model, [inputs])
    by_hand = count_routing(
        model.config.text_config, outputs.router_logits, inputs["mm_token_type_ids"], inputs["attention_mask"]
    )
    assert [dropped.dtype for dropped in outputs.router_dropped] == [torch.bool] * 2
    assert counts.dropped.sum() > 10
    assert torch.equal(counts.dropped, by_hand.dropped)
    real = inputs["attention_mask"].flatten().bool()
    assert [dropped[real].sum().item() for dropped in outputs.router_dropped] == counts.dropped.sum((1, 2)).tolist()


def test_outputs_of_every_model_have_the_record():
    model, inputs = make_model(), make_inputs()
    decoder = SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG)).eval()
    text = make_inputs(images_per_row=0)
    for call, given in ((model, inputs), (model.model, inputs), (decoder, text), (decoder.model, text)):
        with torch.no_grad():
            outputs, plain = call(**given, output_router_logits=True), call(**given)
        assert [tuple(index.shape) for index in outputs.router_indices] == [(28, 2)] * 2
        assert len(outputs.router_logits) == 2
        assert plain.router_logits is plain.router_indices is plain.router_dropped is None
    decoder.config.output_router_logits = True
    assert len(decoder.model(**text).router_indices) == 2
    assert decoder.model(**text, output_router_logits=False).router_indices is None


def test_a_given_record_is_filled_with_and_without_router_outputs():
    model, inputs = make_model(), make_inputs()
    record = RoutingRecord()
    with torch.no_grad():
        plain = model.model(**inputs, routing_record=record)
        outputs = model(**inputs, output_router_logits=True)
    assert plain.router_logits is None
    assert torch.equal(record.tokens.ids, inputs["mm_token_type_ids"])
    for layer, logits, index in zip(record.layers(), outputs.router_logits, outputs.router_indices, strict=True):
        assert torch.equal(layer.logits, logits)
        assert torch.equal(layer.chosen, index)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_the_record_does_not_outlive_its_pass(checkpointing, monkeypatch):
    """Checkpointing keeps the arguments of layers until the backward pass, so a record must not be one of them."""
    records = []
    original = RoutingPlanner.plan

    def plan(self, tokens, device, record):
        records.append(weakref.ref(record))
        return original(self, tokens, device, record)

    monkeypatch.setattr(RoutingPlanner, "plan", plan)
    model, inputs = make_model().train(), make_inputs()
    if checkpointing:
        model.gradient_checkpointing_enable()
    gc.disable()
    try:
        outputs = model(**inputs, labels=inputs["input_ids"], output_router_logits=True, use_cache=False)
        logits = weakref.ref(outputs.router_logits[0])
        assert records[0]() is None
        loss = outputs.loss
        loss.backward()
        del outputs, loss
        assert logits() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["hybrid", "many-top_p"])
def test_checkpointing_changes_no_gradient_of_the_router_losses(name):
    config = ARRANGEMENTS[name] | {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.5}
    inputs, gradients = make_inputs(), []
    for checkpointing in (False, True):
        model = make_model(**config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"], output_router_logits=True, use_cache=False).loss.backward()
        gradients.append([layer.mlp.gate.weight.grad for layer in model.model.language_model.layers])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)
