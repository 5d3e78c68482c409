"""Placement plans: complete, within budgets, balanced, accepted by Accelerate, and made from only a configuration."""

import json
import time
from dataclasses import asdict

import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils.modeling import check_device_map
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GptOssConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration, SparseMoeVlmModel
from modeling_sparse_moe_vlm.toolbox.placement import describe_placement, plan_expert_placement
from modeling_sparse_moe_vlm.toolbox.routing import expert_load, measure_routing, routing_statistics
from tests.support.in_tree_models import QWEN, QWEN_TEXT, TEXT
from tests.support.models import make_config, make_inputs, make_model

BIG = {
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "dtype": "bfloat16",
}
EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 4}
CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(**TEXT | EXPERTS, moe_intermediate_size=64, num_experts=8),
    "mixtral": MixtralConfig(**TEXT | EXPERTS, num_local_experts=4),
    "gpt_oss": GptOssConfig(**TEXT | EXPERTS, num_local_experts=4, tie_word_embeddings=True),
    "qwen3_vl_moe": Qwen3VLMoeConfig(text_config=QWEN_TEXT | EXPERTS, **QWEN),
    "ours": make_config(num_hidden_layers=4),
    "ours, groups": make_config(num_hidden_layers=4, expert_groups="isolated", tie_word_embeddings=True),
    "ours, pools": make_config(num_hidden_layers=4, expert_pool=[0, 1, 0, None], mlp_only_layers=[]),
    "ours, all in pools": make_config(num_hidden_layers=4, expert_pool=[0, 1, 0, 1]),
    "ours, the decoder": make_config(num_hidden_layers=3, mlp_only_layers=[1]).text_config,
}
# Budgets from the bytes of the model, of the experts and of one stack: offloaded parts need room to run.
BUDGETS = {
    "even": lambda size, experts, stack: {0: size, 1: size, 2: size},
    "offload": lambda size, experts, stack: {0: size - 3 * experts // 4 + stack, "cpu": experts // 4, "disk": size},
    "no accelerator": lambda size, experts, stack: {"cpu": size - 3 * experts // 4 + stack, "disk": size},
}


def skeleton(config):
    with torch.device("meta"):
        for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
            if type(config) in auto_class._model_mapping:
                return auto_class.from_config(config)


def check_covers_once(model, device_map):
    check_device_map(model, device_map)
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        assert sum(name == entry or name.startswith(f"{entry}.") for entry in device_map) == 1, name
    modules = dict(model.named_modules()) | dict(model.named_parameters()) | dict(model.named_buffers())
    assert set(device_map) <= set(modules)


def stack_size(model) -> int:
    """Returns the bytes of the largest experts module."""
    stacks = [module for module in model.modules() if hasattr(module, "has_gate")]
    return max(sum(p.numel() * p.element_size() for p in stack.parameters()) for stack in stacks)


def imbalance(shares) -> float:
    sizes = [share.bytes for share in shares]
    return max(sizes) * len(sizes) / sum(sizes)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_is_placed_once_within_the_budgets(name, budget):
    config = CONFIGS[name]
    model = skeleton(config)
    size = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    everything = describe_placement(model, {"": 0})[0]
    assert everything.bytes == size, "tied weights count once"
    max_memory = BUDGETS[budget](size, everything.expert_bytes, stack_size(model))
    device_map = plan_expert_placement(config, max_memory)
    check_covers_once(model, device_map)
    shares = {share.device: share for share in describe_placement(model, device_map)}
    assert sum(share.bytes for share in shares.values()) == size
    for device, share in shares.items():
        assert share.bytes <= max_memory[device]
    assert sum(share.load["all"] for share in shares.values()) == pytest.approx(1)
    if budget == "even":
        assert set(shares) == {0, 1, 2}
    else:
        assert shares["disk"].bytes == shares["disk"].expert_bytes > 0, "experts go first"
    if model.all_tied_weights_keys:
        assert device_map["lm_head"] == next(device for entry, device in device_map.items() if "embed_tokens" in entry)
    # The parts of a layer other than its experts stay together.
    for layer in range(config.get_text_config().num_hidden_layers):
        beside = {d for entry, d in device_map.items() if f"layers.{layer}." in f"{entry}." and "experts" not in entry}
        assert len(beside) <= 1


@pytest.mark.parametrize("config", [Qwen3MoeConfig(**BIG), SparseMoeVlmConfig(text_config=BIG, dtype="bfloat16")])
def test_a_large_model_on_eight_devices(config):
    max_memory = dict.fromkeys(range(8), "80GB")
    start = time.perf_counter()
    device_map = plan_expert_placement(config, max_memory)
    assert time.perf_counter() - start < 2
    shares = describe_placement(config, device_map)
    assert len(shares) == 8
    assert imbalance(shares) < 1.05
    order = [device_map[f"{prefix}.{layer}"] for prefix in _layers(device_map) for layer in range(94)]
    assert order == sorted(order), "the stream of hidden states visits each device once"


def _layers(device_map):
    return {entry.rsplit(".", 1)[0] for entry in device_map if entry.rsplit(".", 1)[0].endswith("layers")}


def test_the_dtype_of_the_weights():
    config = CONFIGS["qwen3_moe"]
    sizes = {}
    for dtype in (torch.float32, "bfloat16"):
        device_map = plan_expert_placement(config, {0: "1GB"}, dtype=dtype)
        sizes[dtype] = describe_placement(config, device_map, dtype=dtype)[0].bytes
    assert sizes["bfloat16"] < 0.6 * sizes[torch.float32]


def test_the_head_matches_the_architecture():
    model = SparseMoeVlmModel(make_config())
    model.config.architectures = ["SparseMoeVlmModel"]
    check_covers_once(model, plan_expert_placement(model.config, {0: "1GB", 1: "1GB"}))


# ------------------------------------------------------------------------------------------------ routing


def test_cold_experts_are_offloaded_first():
    config = CONFIGS["qwen3_moe"]
    stack = 8 * 3 * 32 * 64 * 4
    size = describe_placement(config, {"": 0})[0].bytes
    max_memory = {0: size - stack, "cpu": stack, "disk": stack}
    routing = torch.ones(4, 8)
    routing[0], routing[2] = 50, 3
    device_map = plan_expert_placement(config, max_memory, routing)
    place = {layer: device_map.get(f"model.layers.{layer}.mlp.experts", 0) for layer in range(4)}
    assert place[0] == 0, "hot"
    assert sorted(map(str, (place[1], place[3]))) != ["0", "0"], "cold"
    shares = {share.device: share.load["all"] for share in describe_placement(config, device_map, routing)}
    assert shares[0] > 0.9
    assert shares["cpu"] >= shares.get("disk", 0.0)


def test_the_load_of_every_modality_is_balanced():
    """With groups for text and for images, every device gets the same load of both. Whole layers would not."""
    config = make_config(num_hidden_layers=2, expert_groups="isolated")
    routing = {
        "text": torch.tensor([[5.0, 5, 0, 0], [5, 5, 0, 0]]),
        "image": torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9]]),
    }
    device_map = plan_expert_placement(config, {0: "1GB", 1: "1GB"}, routing)
    for share in describe_placement(config, device_map, routing):
        assert share.load == {"text": pytest.approx(0.5), "image": pytest.approx(0.5)}
    for layer in range(2):
        groups = [device_map[f"model.language_model.layers.{layer}.mlp.experts.{name}"] for name in ("text", "image")]
        assert sorted(groups) == [0, 1], "the groups of a layer run at once"


def test_a_pool_counts_for_all_its_layers():
    config = make_config(num_hidden_layers=3, expert_pool=[0, 0, None])
    by_layer = describe_placement(config, {"": 1, "model.language_model.expert_pools.0": 0})
    assert {share.device: share.load["all"] for share in by_layer} == {0: pytest.approx(2 / 3), 1: pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    "kind", [{}, {"expert_groups": "isolated"}, {"num_hidden_layers": 3, "expert_pool": [0, None, 0]}]
)
def test_every_form_of_routing(kind):
    model = make_model(**kind)
    text_config = model.config.text_config
    counts = measure_routing(model, [make_inputs()])
    statistics = routing_statistics(text_config, counts)
    load = expert_load(model, [make_inputs()])
    by_modality = {name: counts.wanted[:, m].tolist() for m, name in enumerate(text_config.modalities)}
    forms = {
        "statistics": statistics,
        "statistics, JSON": json.loads(json.dumps(asdict(statistics))),
        "shares": load,
        "lists": json.loads(json.dumps(by_modality)),
    }
    device_map = plan_expert_placement(model, {0: "1GB", 1: "1GB"}, statistics)
    expected = describe_placement(model, device_map, statistics)
    assert set(expected[0].load) == {"text", "image"}
    for form, routing in forms.items():
        assert plan_expert_placement(model, {0: "1GB", 1: "1GB"}, routing) == device_map, form
        for share, other in zip(describe_placement(model, device_map, routing), expected, strict=True):
            assert share.load == pytest.approx(other.load), form
    totals = [sum(share.load.values()) for share in describe_placement(model, device_map, counts)]
    assert totals == pytest.approx([sum(share.load.values()) for share in expected]), "counts name no modalities"
    together = counts.wanted.sum(dim=1)
    assert plan_expert_placement(model, {0: "1GB", 1: "1GB"}, together).keys() >= {"lm_head"}


# ------------------------------------------------------------------------------------------------ loading


@torch.no_grad()
@pytest.mark.parametrize("kind", [{}, {"expert_groups": "isolated"}, {"expert_pool": [0, 0]}])
def test_models_load_with_the_maps(kind, tmp_path):
    model, inputs = make_model(**kind), make_inputs()
    model.save_pretrained(tmp_path / "model")
    size = describe_placement(model, {"": "cpu"})[0].bytes
    device_map = plan_expert_placement(model.config, {"cpu": int(0.9 * size), "disk": "1GB"})
    assert "disk" in device_map.values()
    loaded = SparseMoeVlmForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_models_of_the_library_are_dispatched_with_the_maps(name, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    inputs = {"input_ids": torch.arange(5, 15).view(2, 5)}
    expected = model(**inputs).logits
    size = describe_placement(model, {"": "cpu"})[0].bytes
    device_map = plan_expert_placement(CONFIGS[name], {"cpu": int(0.85 * size), "disk": "1GB"})
    dispatched = dispatch_model(model, device_map, offload_dir=tmp_path)
    assert any(parameter.is_meta for parameter in dispatched.parameters())
    torch.testing.assert_close(dispatched(**inputs).logits, expected)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("max_memory", "message"),
    [
        ({0: "100KB", "cpu": "100KB"}, r"weights take .* offer 200.00 kB, so .* are missing"),
        ({0: "370KB", 1: "370KB", 2: "370KB"}, r"too small by .* on each of \[0, 1, 2\].*the largest"),
        ({}, "names no device"),
        ({"gpu": "1GB"}, r"\['gpu'\]"),
        ({-1: "1GB"}, r"names \[-1\]"),
        ({0: "much"}, r"`max_memory\[0\]` is 'much'"),
        ({0: "muchTB"}, r"`max_memory\[0\]` is 'muchTB'"),
        ({0: None}, r"`max_memory\[0\]` is None"),
    ],
)
def test_budgets_that_are_too_small(max_memory, message):
    with pytest.raises(ValueError, match=message):
        plan_expert_placement(CONFIGS["qwen3_moe"], max_memory)


def test_no_room_to_run_offloaded_parts(caplog):
    """Good enough for paging, which loads single experts. A warning is logged: Accelerate loads whole stacks."""
    config = CONFIGS["qwen3_moe"]
    everything = describe_placement(config, {"": 0})[0]
    max_memory = {0: everything.bytes - everything.expert_bytes, "cpu": everything.expert_bytes}
    with caplog.at_level("WARNING", logger="modeling_sparse_moe_vlm"):
        device_map = plan_expert_placement(config, max_memory)
    assert {share.device: share.load["all"] for share in describe_placement(config, device_map)} == {0: 0, "cpu": 1}
    assert "no room to run the largest" in caplog.text


def test_adding_the_missing_bytes_is_enough():
    config = CONFIGS["qwen3_moe"]
    size = describe_placement(config, {"": 0})[0].bytes
    with pytest.raises(ValueError, match="are missing") as error:
        plan_expert_placement(config, {0: size - 5000})
    assert "5.00 kB are missing" in str(error.value)
    assert plan_expert_placement(config, {0: size})


def test_models_without_experts():
    with pytest.raises(ValueError, match="no experts modules"):
        plan_expert_placement(Qwen3Config(**TEXT), {0: "1GB"})


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (torch.ones(3, 8), "3 layers"),
        (torch.ones(4, 6), "6 experts"),
        (torch.ones(4, 9), "9 experts"),
        ({"text": [1, 2]}, "by layer and expert"),
        (3, "by layer and expert"),
        ({"rows": [{"place": "layer_9", "group": "joint", "modality": "text", "wanted": [1]}]}, "layer_9"),
    ],
)
def test_routing_of_another_model(routing, message):
    with pytest.raises(ValueError, match=message):
        plan_expert_placement(CONFIGS["qwen3_moe"], {0: "1GB"}, routing)


@pytest.mark.parametrize("wrong", ["nonsense", "auto", "int8", torch.int8])
def test_wrong_dtypes_are_refused(wrong):
    with pytest.raises(ValueError, match="`dtype` must be a type of weights"):
        plan_expert_placement(CONFIGS["qwen3_moe"], {0: "1GB"}, dtype=wrong)


def test_maps_that_leave_something_out():
    with pytest.raises(ValueError, match=r"no device for 'model.embed_tokens.weight'"):
        describe_placement(CONFIGS["qwen3_moe"], {"lm_head": 0})
