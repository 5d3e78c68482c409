"""Parallel plans name modules that exist, and leave out no projection and no expert."""

import re

import pytest
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmTextConfig
from modeling_sparse_moe_vlm.parallel_plans import is_one_of_several_processes, plan_by_group, prepare_plans
from tests.support.models import TEXT_CONFIG, make_config, make_model
from tests.test_loading import OTHER_GROUPS

# The first layer is dense, so that every entry has something to name.
MODELS = {
    "hybrid": {"mlp_only_layers": [0]},
    "joint": {"mlp_only_layers": [0], "expert_groups": "joint"},
    "isolated": {"mlp_only_layers": [0], "expert_groups": "isolated"},
    "groups": {"mlp_only_layers": [0], "expert_groups": OTHER_GROUPS, "num_experts": None},
    "tied": {"mlp_only_layers": [0], "tie_word_embeddings": True},
}


def matches(pattern: str, names: set[str]) -> set[str]:
    """Names that a plan's entry stands for: its wildcards are numbers, and a module's entry holds for its weights."""
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"(\.weight|\.bias)?")
    return {name for name in names if expression.fullmatch(name)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("plan", ["tp_plan", "ep_plan"])
@pytest.mark.parametrize("text_only", [False, True])
def test_every_entry_names_something(kind, plan, text_only):
    if text_only:
        model = SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG | MODELS[kind]))
    else:
        model = make_model(**MODELS[kind])
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    entries = getattr(model, plan)
    assert entries
    for pattern in entries:
        assert matches(pattern, names), pattern


@pytest.mark.parametrize("kind", MODELS)
def test_every_matrix_of_a_layer_is_in_the_plan(kind):
    model = make_model(**MODELS[kind])
    named = {name for pattern in model.tp_plan for name in matches(pattern, set(dict(model.named_parameters())))}
    matrices = {
        name
        for name, parameter in model.named_parameters()
        if ".layers." in name and "language_model" in name and parameter.ndim > 1 and ".gate." not in name
    }
    assert matrices <= named
    assert ("lm_head.weight" in named) or model.config.tie_word_embeddings
    experts = {name for name in matrices if ".experts." in name}
    assert experts == {
        name for pattern in model.ep_plan for name in matches(pattern, set(dict(model.named_parameters())))
    }


def test_plans_of_configurations_stay_as_they_are():
    """The library reads them from the class, for every model of the process."""
    before = dict(SparseMoeVlmTextConfig.base_model_tp_plan)
    make_model(**MODELS["groups"])
    assert before == SparseMoeVlmTextConfig.base_model_tp_plan
    config = make_config(**MODELS["joint"]).text_config
    assert not [pattern for pattern in plan_by_group(before, config) if "shared" in pattern]


def test_one_process_is_not_several():
    assert not is_one_of_several_processes()


# ----------------------------------------------------------------------------------------------- what can be shared out


def test_plans_name_only_what_is_there():
    """The library warns of the rest: dense layers and experts of one's own where all layers share a pool."""
    model = make_model(expert_pool=[0, 0])
    prepare_plans(model, DistributedConfig(tp_size=2))
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for plan in (model.tp_plan, model.ep_plan, model.fsdp_plan):
        assert plan
        assert all(matches(pattern, names) for pattern in plan), plan


@pytest.mark.parametrize(
    ("text_config", "sizes", "message"),
    [
        ({"num_experts": 3}, {"ep_size": 2, "fsdp_size": 2}, "the 3 experts of the group 'joint'.*`ep_size`"),
        ({}, {"tp_size": 4}, r"`num_key_value_heads` \(2\).*among 4 processes.*`tp_size`"),
        ({"moe_intermediate_size": 23}, {"tp_size": 2}, r"`intermediate_size` of the group `joint` \(23\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(text_config, sizes, message):
    with pytest.raises(ValueError, match=message):
        prepare_plans(make_model(**text_config), DistributedConfig(**sizes))
    # In the parts that are whole on every process, nothing needs to fit.
    prepare_plans(make_model(**text_config), DistributedConfig(fsdp_size=2))


def test_no_model_is_sharded_twice(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"expert_parallel\.yaml"):
        prepare_plans(make_model(), DistributedConfig(fsdp_size=2))
