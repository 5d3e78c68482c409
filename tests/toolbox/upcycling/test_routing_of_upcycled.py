"""Routing of upcycled models: counted, reported, balanced and limited as in our own architecture."""

import pytest
import torch
from transformers import TrainingArguments

from modeling_sparse_moe_vlm.routing import router_biases
from modeling_sparse_moe_vlm.toolbox.expert_modules import sparse_blocks
from modeling_sparse_moe_vlm.toolbox.routing import (
    count_batch,
    expert_load,
    measure_routing,
    routing_statistics,
    update_router_bias,
)
from modeling_sparse_moe_vlm.toolbox.routing import monitor as monitor_module
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer
from tests.support.batches import collate
from tests.support.models import QUIET_TRAINING
from tests.support.upcycled import KINDS, make_inputs, make_rows, make_upcycled


def modality_ids(inputs) -> torch.Tensor:
    ids = inputs.get("mm_token_type_ids")
    return (inputs["input_ids"] == 3).long() if ids is None else ids


def counted_by_hand(model, inputs) -> list[list[list[int]]]:
    """Returns counts by sparse layer, modality and expert, token by token from the inputs of the routers."""
    config, given = model.config.experts_config, []
    handles = [
        block.gate.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        for block in sparse_blocks(model).values()
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    ids, real = modality_ids(inputs).flatten(), inputs["attention_mask"].flatten()
    counts = []
    for block, states in zip(sparse_blocks(model).values(), given, strict=True):
        groups = config.layer_expert_groups(block.layer_idx, always_on=False)
        serving = [group.modalities for group in groups for _ in range(group.num_experts)]
        of_layer = [[0] * len(serving) for _ in config.modalities]
        for state, modality, is_real in zip(states, ids.tolist(), real.tolist(), strict=True):
            scores = block.gate.weight @ state
            allowed = [n for n, names in enumerate(serving) if config.modalities[modality] in names]
            best = sorted(allowed, key=lambda n: -scores[n])[: config.num_experts_per_tok]
            for expert in best if is_real else ():
                of_layer[modality][expert] += 1
        counts.append(of_layer)
    return counts


@pytest.mark.parametrize("groups", ["hybrid", "joint", "isolated"])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_equal_those_of_single_tokens(kind, groups):
    """Padding is not counted, and image tokens are distinguished from text."""
    model, inputs = make_upcycled(kind, groups), make_inputs(kind)
    expected = counted_by_hand(model, inputs)
    counts = measure_routing(model, [inputs])
    assert counts.wanted.tolist() == expected
    assert counts.tokens.tolist() == [16, 8]
    assert not counts.dropped.any()
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True)
    of_outputs = count_batch(model, inputs, outputs.router_logits, outputs.router_indices)
    assert of_outputs.wanted.tolist() == expected
    load = expert_load(model, [inputs, inputs])
    for modality, name in enumerate(["text", "image"]):
        wanted = torch.tensor(expected)[:, modality].float()
        torch.testing.assert_close(load[name].nan_to_num(0.0), wanted / wanted.sum(dim=-1, keepdim=True))


def test_statistics_name_the_layers_that_are_sparse():
    model, inputs = make_upcycled("llava", "joint", layers=[1]), make_inputs("llava")
    rows = routing_statistics(model.config.experts_config, measure_routing(model, [inputs])).rows
    assert [(row.place, row.group, row.modality, row.num_tokens) for row in rows] == [
        ("layer_1", "joint", "text", 16),
        ("layer_1", "joint", "image", 8),
    ]
    assert list(rows[1].wanted) == counted_by_hand(model, inputs)[0][1]


def train(model, tmp_path, kind="llava", **arguments) -> SparseMoeTrainer:
    defaults = {
        "output_dir": str(tmp_path),
        **QUIET_TRAINING,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        "learning_rate": 0.0,
    }
    trainer = SparseMoeTrainer(
        model=model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=make_rows(kind),
        data_collator=collate,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
def test_reports_of_training_cover_the_whole_batch(kind, checkpointing, tmp_path):
    """With any micro-batches, and although gradient checkpointing runs every layer twice."""
    model = make_upcycled(kind, "joint", output_router_logits=True)
    expected = counted_by_hand(model, collate(make_rows(kind)))
    trainer = train(
        model,
        tmp_path,
        kind,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        gradient_checkpointing=checkpointing,
    )
    rows = trainer.routing.statistics.rows
    assert [list(row.wanted) for row in rows] == [of for layer in expected for of in layer]
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["aux_loss"] > 0
    assert {"aux_loss_text", "aux_loss_image", "routing/joint/image/effective_experts"} <= set(entry)


def test_a_warning_about_a_collapse(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(monitor_module.logger, "warning", warnings.append)
    model = make_upcycled("llava", "joint", output_router_logits=True, num_experts=2, num_experts_per_tok=1)
    train(model, tmp_path)
    assert not warnings
    with torch.no_grad():
        gate = sparse_blocks(model)["model.language_model.layers.1.mlp"].gate
        gate.weight.zero_()  # all experts have equal scores, so the first is chosen
    train(model, tmp_path)
    assert [message.split(" tokens use")[0] for message in warnings] == [
        f"Routing has collapsed: in layer 1, group 'joint', {modality}" for modality in ("text", "image")
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_biases_are_updated_once_per_step(kind, tmp_path):
    fields = {"router_bias_update_rate": 0.01, "output_router_logits": True, "router_aux_loss_coef": 0.0}
    model, by_hand = (make_upcycled(kind, "joint", **fields) for _ in range(2))
    for _ in range(2):
        update_router_bias(by_hand, measure_routing(by_hand, [collate(make_rows(kind))]))
    train(model, tmp_path, kind, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for bias, expected in zip(router_biases(model), router_biases(by_hand), strict=True):
        assert bias.shape == (2, 8)
        assert bias.any()
        assert torch.equal(bias, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_choices_above_the_capacity_are_dropped(kind):
    """With a factor of 0.5, each of 8 experts keeps 2 of 16 text tokens (2 choices each) and 1 of 8 image tokens."""
    model, inputs = make_upcycled(kind, "hybrid", expert_capacity_factor=0.5), make_inputs(kind)
    wanted = torch.tensor(counted_by_hand(model, inputs))
    counts = measure_routing(model, [inputs])
    assert torch.equal(counts.wanted, wanted)
    places = torch.tensor([2, 1])[None, :, None]
    assert torch.equal(counts.wanted - counts.dropped, wanted.minimum(places))
    assert counts.dropped.any()
