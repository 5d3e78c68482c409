"""Parallel plans name modules that exist, and include every projection and every expert."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmTextConfig
from modeling_sparse_moe_vlm.parallel_plans import (
    _skip_sentinels,
    forget_plans_of_stacks,
    is_one_of_several_processes,
    mend_parallelism,
    plan_by_group,
    prepare_plans,
)
from tests.support.models import TEXT_CONFIG, make_config, make_model
from tests.test_loading import OTHER_GROUPS

# The first layer is dense, so that there are modules for every entry.
MODELS = {
    "hybrid": {"mlp_only_layers": [0]},
    "joint": {"mlp_only_layers": [0], "expert_groups": "joint"},
    "isolated": {"mlp_only_layers": [0], "expert_groups": "isolated"},
    "groups": {"mlp_only_layers": [0], "expert_groups": OTHER_GROUPS, "num_experts": None},
    "tied": {"mlp_only_layers": [0], "tie_word_embeddings": True},
}


def matches(pattern: str, names: set[str]) -> set[str]:
    """Returns the names that an entry matches: wildcards match numbers, and modules include their weights."""
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"(\.weight|\.bias)?")
    return {name for name in names if expression.fullmatch(name)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("plan", ["tp_plan", "ep_plan"])
@pytest.mark.parametrize("text_only", [False, True])
def test_every_entry_matches_a_module(kind, plan, text_only):
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


def test_plans_of_configurations_are_not_changed():
    """Transformers reads them from the class, for every model of the process."""
    before = dict(SparseMoeVlmTextConfig.base_model_tp_plan)
    make_model(**MODELS["groups"])
    assert before == SparseMoeVlmTextConfig.base_model_tp_plan
    config = make_config(**MODELS["joint"]).text_config
    assert not [pattern for pattern in plan_by_group(before, config) if "shared" in pattern]


def test_one_process_does_not_count_as_several():
    assert not is_one_of_several_processes()


# ----------------------------------------------------------------------------------------------- possible plans


def test_plans_name_only_existing_modules():
    """Transformers warns about other entries: dense layers, or experts of single layers if all layers share a pool."""
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
    # With `fsdp_size` only, nothing is split among processes, so any size fits.
    prepare_plans(make_model(**text_config), DistributedConfig(fsdp_size=2))


def test_no_model_is_sharded_twice(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"expert_parallel\.yaml"):
        prepare_plans(make_model(), DistributedConfig(fsdp_size=2))


# ------------------------------------------------------------------------------------------------ every entry

ATTENTION = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.o_proj": "rowwise",
}
PRIORS = {"layers.*.self_attn.modality_log_priors": "colwise"}
DENSE = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


def cut(place: str) -> dict[str, str]:
    """Returns the entries of a stack of experts under tensor parallelism."""
    return {place: "moe_tp_experts", f"{place}.gate_up_proj": "packed_colwise", f"{place}.down_proj": "rowwise"}


def sent(place: str) -> dict[str, str]:
    """Returns the entries of a stack of experts under expert parallelism."""
    return {
        place: "ep_dispatch_experts",
        f"{place}.gate_up_proj": "grouped_gemm",
        f"{place}.down_proj": "grouped_gemm",
    }


def always_on(group: str) -> dict[str, str]:
    place = f"layers.*.mlp.shared_experts.{group}"
    return {f"{place}.gate_proj": "colwise", f"{place}.up_proj": "colwise", f"{place}.down_proj": "rowwise"}


OWN, POOL = "layers.*.mlp.experts", "expert_pools.*"
# By name: fields, modules with routed experts, always-on groups, and entries of priors.
PLANS = {
    "hybrid": ({}, [OWN], ["text", "image"], {}),
    "joint": ({"expert_groups": "joint"}, [OWN], [], {}),
    "isolated": ({"expert_groups": "isolated"}, [f"{OWN}.text", f"{OWN}.image"], [], {}),
    "groups": (
        {"expert_groups": OTHER_GROUPS, "num_experts": None},
        [f"{OWN}.words", f"{OWN}.pixels"],
        ["helper"],
        {},
    ),
    "pools": ({"expert_pool": [0, 0], "expert_groups": "joint"}, [OWN, POOL], [], {}),
    "pools of groups": (
        {"expert_pool": [0, None], "expert_groups": "isolated"},
        [f"{place}.{group}" for place in (OWN, POOL) for group in ("text", "image")],
        [],
        {},
    ),
    "learned priors": ({"learned_modality_priors": True, "expert_groups": "joint"}, [OWN], [], PRIORS),
}


@pytest.mark.parametrize("kind", PLANS)
def test_every_entry_of_a_plan(kind):
    fields, places, groups, priors = PLANS[kind]
    config = make_config(**fields).text_config
    expected = ATTENTION | priors | DENSE
    for place in places:
        expected |= cut(place)
    for group in groups:
        expected |= always_on(group)
    assert plan_by_group(config.base_model_tp_plan, config) == expected
    expected = {}
    for place in places:
        expected |= sent(place)
    assert plan_by_group(config.base_model_ep_plan, config) == expected


@pytest.mark.parametrize("sizes", [{"ep_size": 2, "fsdp_size": 2}, {"ep_size": 2, "tp_size": 2}, {"fsdp_size": 2}])
@pytest.mark.parametrize("kind", PLANS)
def test_every_entry_of_a_prepared_plan(kind, sizes):
    """Modules that the model lacks are left out: dense layers, and experts of single layers if all are in pools."""
    fields, places, groups, priors = PLANS[kind]
    fields = fields | ({"num_experts": 4} if kind not in ("groups",) else {})
    if kind == "groups" and "ep_size" in sizes:
        fields = fields | {"expert_groups": [group | {"num_experts": 2} for group in OTHER_GROUPS]}
    model = make_model(**fields)
    prepare_plans(model, DistributedConfig(**sizes))
    present = [place for place in places if kind != "pools" or place != OWN]
    expected = ATTENTION | priors
    for place in present:
        expected |= cut(place)
    for group in groups:
        expected |= always_on(group)
    prefix = "model.language_model."

    def own(plan):
        return {name.removeprefix(prefix): style for name, style in plan.items() if name.startswith(prefix)}

    tp_plan = own(model._tp_plan)
    tp_plan.pop("embed_tokens", None)  # newer releases of Transformers add it
    assert tp_plan == expected
    expected = {}
    for place in present:
        expected |= sent(place)
    assert own(model._ep_plan) == expected
    fsdp_plan = own(model._fsdp_plan)
    assert fsdp_plan["layers.*"] == "free_full_weight"
    # Dispatched experts are wrapped separately.
    is_pooled = "expert_pool" in fields
    assert fsdp_plan.get("expert_pools.*") == ("free_full_weight" if is_pooled and "ep_size" not in sizes else None)


@pytest.mark.parametrize(
    ("fields", "sizes", "message"),
    [
        ({"num_attention_heads": 6, "head_dim": 8}, {"tp_size": 4}, r"`num_attention_heads` \(6\)"),
        ({}, {"tp_size": 4}, r"`num_key_value_heads` \(2\)"),
        ({"moe_intermediate_size": 23}, {"tp_size": 2}, r"of the group `joint` \(23\)"),
        ({"moe_intermediate_size": 23}, {"tp_size": 2, "ep_size": 2}, None),  # experts are sent whole
        ({"moe_intermediate_size": 23}, {"fsdp_size": 2}, None),
        ({"moe_intermediate_size": 23}, {"tp_size": 2, "tp_plan": {}}, None),
        (
            {"expert_groups": [{"name": "on", "num_experts": 1, "always_on": True, "intermediate_size": 23}]},
            {"tp_size": 2},
            None,
        ),
        ({"num_experts": 6}, {"ep_size": 4, "fsdp_size": 4}, "the 6 experts of the group 'joint'"),
        ({"num_experts": 6}, {"ep_size": 3, "fsdp_size": 3}, None),
    ],
)
def test_sizes_that_are_checked(fields, sizes, message):
    if isinstance(fields.get("expert_groups"), list):
        fields = {"num_experts": None, "expert_groups": [{"name": "rest", "num_experts": 2}, *fields["expert_groups"]]}
    model, sizes = make_model(**fields), SimpleNamespace(**{"tp_size": 1, "ep_size": 1, "tp_plan": None} | sizes)
    if message is None:
        prepare_plans(model, sizes)
        return
    with pytest.raises(ValueError, match=message):
        prepare_plans(model, sizes)


# ------------------------------------------------------------------------------------------------ sentinels


def test_sentinels_are_not_sent():
    """Slots with the sentinel id or a larger one add nothing. The outputs of the others return to their tokens."""
    experts, calls = nn.Module(), []

    def exchange(hidden_states, top_k_index, top_k_weights):
        calls.append((hidden_states, top_k_index, top_k_weights))
        return (hidden_states * top_k_weights + top_k_index).double()

    experts.forward = exchange
    _skip_sentinels(experts, num_experts=3)
    hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    index = torch.tensor([[0, 3], [3, 3], [2, 1]])
    weights = torch.tensor([[0.5, 9.0], [9.0, 9.0], [0.25, 2.0]])
    output = experts(hidden, index, weights)
    ((tokens, experts_of_tokens, weights_of_tokens),) = calls
    assert tokens.tolist() == [[1.0, 2.0], [5.0, 6.0], [5.0, 6.0]]
    assert experts_of_tokens.tolist() == [[0], [2], [1]]
    assert weights_of_tokens.tolist() == [[0.5], [0.25], [2.0]]
    assert output.dtype == torch.float32
    assert output.tolist() == [[0.5, 1.0], [0.0, 0.0], [5 * 2.25 + 3, 6 * 2.25 + 3]]


def test_only_modules_that_receive_sentinels_skip_them():
    """They do so only with expert parallelism. Gradients are summed if experts are not sharded further."""
    summed = []
    for sizes, expected in (
        ({"ep_size": 2, "efsdp_size": 1}, [False]),
        ({"ep_size": 2, "efsdp_size": 2}, []),
        ({"ep_size": 1, "efsdp_size": 1}, []),
    ):
        model = nn.Module()
        model.receiver, model.other = nn.Module(), nn.Module()
        model._tp_plan = {}
        model.other.set_force_sum_reduction_for_comms = summed.append
        forwards = model.receiver.forward, model.other.forward
        mend_parallelism(model, SimpleNamespace(**sizes), {model.receiver: 4})
        assert (model.receiver.forward != forwards[0]) == (sizes["ep_size"] > 1)
        assert model.other.forward == forwards[1]
        assert summed == expected
        summed.clear()


def test_split_stacks_are_removed_from_the_plan():
    """PEFT would treat them as linear layers. Entries of other stacks and of other modules stay."""
    model = make_model(expert_groups="isolated")
    before = dict(model._tp_plan)
    forget_plans_of_stacks(model)
    assert model._tp_plan == before
    experts = model.model.language_model.layers[0].mlp.experts.text
    experts.gate_up_proj.placements = ()
    model.lm_head.weight.placements = ()
    forget_plans_of_stacks(model)
    assert before.keys() - model._tp_plan.keys() == {"model.language_model.layers.*.mlp.experts.text.gate_up_proj"}
    assert model._tp_plan.items() <= before.items()
