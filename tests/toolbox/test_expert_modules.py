"""Finds the experts of Transformers' models and of ours, with and without adapters."""

import pytest
from peft import LoraConfig, get_peft_model

from modeling_sparse_moe_vlm.toolbox.expert_modules import (
    base_model_of,
    expert_banks,
    experts_modules,
    name_without_adapters,
    parameters_by_expert,
    stacks,
)
from tests.support import in_tree_moe
from tests.support.models import make_model


@pytest.mark.parametrize("name", in_tree_moe.MODELS)
def test_experts_are_found_beneath_adapters(name):
    model = in_tree_moe.make_model(name)
    before = experts_modules(model)
    assert before
    shapes = [{key: value.shape for key, value in stacks(module).items()} for module in before.values()]
    targets = [f"{place}.{stack}" for place, module in before.items() for stack in stacks(module)]
    adapted = get_peft_model(model, LoraConfig(r=2, target_parameters=targets, target_modules=[]))
    after = experts_modules(adapted)
    assert [name_without_adapters(place) for place in after] == list(before)
    assert list(after.values()) == list(before.values())
    assert [{key: value.shape for key, value in stacks(module).items()} for module in after.values()] == shapes
    assert base_model_of(adapted) is model


def test_banks_by_group_with_shards_and_pools():
    model = make_model(expert_groups="isolated", expert_pool=[0, 0])
    banks = {bank.name: bank for bank in expert_banks(model)}
    pool = "model.language_model.expert_pools.0"
    assert list(banks) == [f"{pool}.text", f"{pool}.image"]
    assert [(bank.group, bank.layers, bank.always_on) for bank in banks.values()] == [
        ("text", (0, 1), False),
        ("image", (0, 1), False),
    ]
    model = make_model(num_experts=4)
    model.config.num_expert_shards = 3
    sharded = {bank.name: bank for bank in expert_banks(type(model)._from_config(model.config))}
    place = "model.language_model.layers.1.mlp"
    assert sharded[f"{place}.experts"].sizes == [2, 1, 1]
    assert list(sharded[f"{place}.experts"].parts) == [f"{place}.experts.shards.{number}" for number in range(3)]
    always = sharded[f"{place}.shared_experts.image"]
    assert (always.group, always.layers, always.always_on) == ("image", (1,), True)


def test_parameters_by_expert_are_matrices_and_biases():
    model = in_tree_moe.make_model("gpt_oss")
    experts = next(iter(experts_modules(model).values()))
    assert set(parameters_by_expert(experts)) == {
        "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias",
    }  # fmt: skip
    assert set(stacks(experts)) == {"gate_up_proj", "down_proj"}
