"""The toolbox finds experts, layers, routers and the parts for text in models with entirely different names."""

import pytest
import torch
from peft import get_peft_model
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_sparse_moe_vlm.checkpoint_conversion import convert_from_disk, expert_stacks, saving_conversions
from modeling_sparse_moe_vlm.parallel_plans import plan_by_group, prepare_plans
from modeling_sparse_moe_vlm.toolbox.expert_lora import busiest_experts, expert_lora_config
from modeling_sparse_moe_vlm.toolbox.expert_modules import (
    decoder_name,
    expert_banks,
    layers_of_modules,
    our_experts_config,
    sparse_blocks,
)
from modeling_sparse_moe_vlm.toolbox.paging import page_experts
from modeling_sparse_moe_vlm.toolbox.placement import plan_expert_placement
from modeling_sparse_moe_vlm.toolbox.placement.load import expert_counts
from modeling_sparse_moe_vlm.toolbox.placement.parts import decoder_layers
from modeling_sparse_moe_vlm.toolbox.training import freeze_text
from tests.support.in_tree_models import make_llava
from tests.support.other_host import make_other_host, make_other_inputs

BLOCKS = ["parts.1.h.1.ffn", "parts.1.h.2.ffn"]
POOLED = {"expert_pool": [None, 5, 5]}


# ------------------------------------------------------------------------------------------------ finding modules


def test_the_configuration_that_is_read():
    model = make_other_host()
    assert our_experts_config(model.config) is model.config.experts_config
    assert our_experts_config(make_llava().config) is None


@pytest.mark.parametrize("adapted", [False, True])
def test_blocks_layers_and_banks(adapted):
    """The first number in every name is 1, and layer 0 is dense."""
    model = make_other_host()
    if adapted:
        model = get_peft_model(model, expert_lora_config(model, r=2))
    assert list(sparse_blocks(model)) == BLOCKS
    assert decoder_name(model) == "parts.1"
    layers = layers_of_modules(model)
    assert [layers[f"parts.1.h.{layer}.attention.q"] for layer in range(3)] == [0, 1, 2]
    assert [layers[f"{block}.experts.text"] for block in BLOCKS] == [1, 2]
    assert [(bank.name, bank.group, bank.layers) for bank in expert_banks(model)] == [
        (f"{block}.experts.{group}", group, (layer,))
        for layer, block in enumerate(BLOCKS, start=1)
        for group in ("text", "image")
    ]


def test_banks_of_pools():
    model = make_other_host(**POOLED)
    assert [(bank.name, bank.group, bank.layers) for bank in expert_banks(model)] == [
        (f"parts.1.expert_pools.5.{group}", group, (1, 2)) for group in ("text", "image")
    ]
    assert decoder_layers(model, ["parts.1.expert_pools.5.text"]) == [f"parts.1.h.{layer}" for layer in range(3)]


def test_blocks_know_their_layer_under_any_name():
    """The position of a layer in a list can differ from its number."""
    model = make_other_host()
    model.parts[1].h[1].ffn.layer_idx = 7
    layers = layers_of_modules(model)
    assert layers["parts.1.h.1.ffn.experts.image"] == 7
    assert layers["parts.1.h.1.attention.out"] == 1


def test_experts_that_a_model_had_before_belong_to_no_group():
    """Otherwise, they would count as part of the only group, and would be trained with it."""
    model = make_other_host(expert_groups="joint")
    model.parts[1].h[0].ffn = torch.nn.ModuleDict({"experts": model.parts[1].h[1].ffn.experts})
    model.parts[1].h[1].ffn.experts = None
    groups = {bank.name: bank.group for bank in expert_banks(model)}
    assert groups == {"parts.1.h.0.ffn.experts": None, "parts.1.h.2.ffn.experts": "joint"}


# ------------------------------------------------------------------------------------------------ tools


def test_loads_by_place():
    model = make_other_host()
    sizes = {f"{block}.experts.{group}": 2 for block in BLOCKS for group in ("text", "image")}
    rows = [
        {"place": f"layer_{layer}", "group": group, "modality": group, "wanted": [layer, 5]}
        for layer in (1, 2)
        for group in ("text", "image")
    ]
    counts = expert_counts(sizes, model.config.experts_config, {"rows": rows})
    assert counts == {name: {name.rsplit(".")[-1]: [float(name[10]), 5.0]} for name in sizes}
    with pytest.raises(ValueError, match="'layer_0'"):
        expert_counts(sizes, model.config.experts_config, {"rows": [rows[0] | {"place": "layer_0"}]})


def test_loads_of_pools():
    model = make_other_host(**POOLED, expert_groups="joint")
    rows = [{"place": "pool_5", "group": "joint", "modality": "text", "wanted": [1, 2, 3, 4]}]
    sizes = {"parts.1.expert_pools.5": 4}
    expected = {"parts.1.expert_pools.5": {"text": [1.0, 2.0, 3.0, 4.0]}}
    assert expert_counts(sizes, model.config.experts_config, {"rows": rows}) == expected
    assert busiest_experts(model, {"text": [[0, 0, 1, 0]] * 2}, share=0.5) == {"parts.1.expert_pools.5": [2]}


def test_selection_by_layer_modality_attention_and_router():
    model = make_other_host()
    config = expert_lora_config(model, layers=[2], modalities=["image"], attention=True, routers=True, r=2)
    assert config.target_parameters == [f"{BLOCKS[1]}.experts.image.{name}" for name in ("gate_up_proj", "down_proj")]
    assert config.target_modules == {"parts.1.h.2.attention.q", "parts.1.h.2.attention.out"}
    assert config.modules_to_save == [f"{BLOCKS[1]}.gate"]
    pooled = expert_lora_config(make_other_host(**POOLED), modalities=["image"], routers=True, r=2)
    assert pooled.modules_to_save == [f"{block}.gate" for block in BLOCKS]


def train(model, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
    for step in range(steps):
        inputs = make_other_inputs(seed=step)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def read(model, images: bool) -> torch.Tensor:
    return model(**make_other_inputs(seed=9, images=images)).logits


@pytest.mark.parametrize("fields", [{}, POOLED], ids=["layers", "pools"])
def test_text_does_not_change(fields):
    model = make_other_host(**fields)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    text, images = read(model, False), read(model, True)
    handle = freeze_text(model)
    train(model)
    handle.remove()
    assert torch.equal(read(model, False), text)
    assert (read(model, True) - images).abs().max() > 1e-2
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {
        name for name in before if ".image." in name or name.startswith("parts.0.") or name.endswith("gate.weight")
    }
    for block in BLOCKS:
        rows = model.get_submodule(block).gate.weight != before[f"{block}.gate.weight"]
        assert rows.any(dim=1).tolist() == [False, False, True, True]


def test_everything_except_experts_of_a_separate_decoder_is_frozen():
    """There are no modules around it that only images use."""
    model = make_other_host()
    model.get_decoder = lambda: model
    freeze_text(model).remove()
    left = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert left == {
        name for name, _ in model.named_parameters() if ".experts.image." in name or name.endswith("gate.weight")
    }


def test_paging():
    model = make_other_host(num_experts=8, num_experts_per_tok=2)
    expected = read(model, True)
    with pytest.raises(ValueError, match="a token uses 2 at once"):
        page_experts(model, expert_cache=1)
    with page_experts(model, expert_cache=2) as paged:
        assert paged.slots == {f"{block}.experts.{group}": 2 for block in BLOCKS for group in ("text", "image")}
        torch.testing.assert_close(read(model, True), expected)


@pytest.mark.parametrize("fields", [{}, POOLED], ids=["layers", "pools"])
def test_a_device_map_covers_the_model(fields):
    model = make_other_host(**fields)
    device_map = plan_expert_placement(model, {0: 10**6, "cpu": 10**6})
    pools = ["parts.1.expert_pools.5.text", "parts.1.expert_pools.5.image"] if fields else []
    assert set(device_map) == {"parts.0", *(f"parts.1.h.{layer}" for layer in range(3)), *pools, "words", "head"}


# ------------------------------------------------------------------------------------------------ on disk, in processes


@pytest.mark.parametrize("shards", [1, 2])
def test_experts_are_saved_one_by_one(shards):
    model = make_other_host(num_expert_shards=shards, num_experts=6)
    assert [(stack.name, stack.place) for stack in expert_stacks(model)] == [
        (f"{block}.experts.{group}", f"ffn.experts.{group}") for block in BLOCKS for group in ("text", "image")
    ]
    steps = saving_conversions(model)
    assert len(steps) == 2 * 2 * shards  # groups, parameters and shards; the same for both layers
    disk = {name: value.clone() for name, value in model.state_dict().items() if ".experts." not in name}
    for stack in expert_stacks(model):
        for part, experts in stack.parts.items():
            module = model.get_submodule(part)
            for number, expert in enumerate(experts):
                gate, up = module.gate_up_proj[number].chunk(2)
                disk[f"{stack.name}.{expert}.gate_proj.weight"] = gate
                disk[f"{stack.name}.{expert}.up_proj.weight"] = up
                disk[f"{stack.name}.{expert}.down_proj.weight"] = module.down_proj[number]
    other = make_other_host(num_expert_shards=shards, num_experts=6)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(convert_from_disk(other, disk))
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("fields", "sizes", "message"),
    [
        ({}, {"tp_size": 3}, r"`num_attention_heads` \(4\)"),
        ({"moe_intermediate_size": 23}, {"tp_size": 2}, r"of the group `text` \(23\)"),
        ({"num_experts": 6}, {"ep_size": 2, "fsdp_size": 2}, "the 3 experts of the group 'text'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, sizes, message):
    with pytest.raises(ValueError, match=message):
        prepare_plans(make_other_host(**fields), DistributedConfig(**sizes))


def test_parallel_plans_name_groups_in_any_module():
    plan = {"h.*.ffn.experts": "a", "h.*.ffn.experts.down_proj": "b", "h.*.my_experts.x": "c", "experts": "d"}
    assert plan_by_group(plan, make_other_host().config.experts_config) == {
        "h.*.ffn.experts.text": "a",
        "h.*.ffn.experts.image": "a",
        "h.*.ffn.experts.text.down_proj": "b",
        "h.*.ffn.experts.image.down_proj": "b",
        "h.*.my_experts.x": "c",
        "experts.text": "d",
        "experts.image": "d",
    }
