"""Device maps, offloading, shards and sizes of upcycled models."""

import copy

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.expert_modules import experts_modules
from modeling_sparse_moe_vlm.toolbox.model_size import describe_size, idle_parameters, model_size
from modeling_sparse_moe_vlm.toolbox.paging import page_experts
from modeling_sparse_moe_vlm.toolbox.placement import describe_placement, plan_expert_placement
from modeling_sparse_moe_vlm.toolbox.placement.load import with_unmeasured_layers
from modeling_sparse_moe_vlm.toolbox.routing import measure_routing, routing_statistics
from tests.support.in_tree_models import TEXT
from tests.support.models import make_config
from tests.support.upcycled import KINDS, make_inputs, make_upcycled


@torch.no_grad()
def read(model, kind) -> torch.Tensor:
    return model.eval()(**make_inputs(kind)).logits


def decoder_of(kind: str) -> str:
    return "model" if kind == "llama" else "model.language_model"


@pytest.mark.parametrize("kind", KINDS)
def test_plans_keep_hot_experts_on_the_fast_device(kind):
    """All measured choices are of text experts, which stay. Image experts go to the CPU."""
    model = make_upcycled(kind, "isolated", num_experts=16)
    sizes = {name: sum(p.numel() * 4 for p in module.parameters()) for name, module in experts_modules(model).items()}
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    counts = {"text": [[1] * 8 + [0] * 8] * 2, "image": [[0] * 16] * 2}
    budget = total - sum(size for name, size in sizes.items() if name.endswith(".image"))
    budget += max(sizes.values()) + 2000  # Accelerate loads an offloaded part as a whole; buffers
    device_map = plan_expert_placement(model, {0: budget, "cpu": 10**9}, counts)
    on_cpu = {name for name, device in device_map.items() if device == "cpu"}
    assert on_cpu == {f"{decoder_of(kind)}.layers.{layer}.mlp.experts.image" for layer in range(2)}
    fast, slow = describe_placement(model, device_map, counts)
    assert (fast.load["text"], slow.load["text"]) == (1.0, 0.0)
    assert slow.expert_bytes == slow.bytes == sum(sizes[name] for name in on_cpu)


@pytest.mark.parametrize("kind", KINDS)
def test_measured_routing_is_a_load(kind):
    model = make_upcycled(kind, "joint", layers=[1])
    counts = measure_routing(model, [make_inputs(kind)])
    (share,) = describe_placement(model, {"": "cpu"}, counts)
    assert share.load == pytest.approx({"text": 1.0, "image": 1.0})
    assert share.expert_bytes == sum(p.numel() * 4 for p in experts_modules(model).popitem()[1].parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_from_the_configuration_and_loading_with_experts_on_disk(kind, tmp_path):
    """The experts are in shards, some of which are on disk and are then paged."""
    model = make_upcycled(kind, "isolated")
    expected = read(model, kind)
    model.save_pretrained(tmp_path / "model")
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    config = copy.deepcopy(model.config)
    config.num_expert_shards = 2
    device_map = plan_expert_placement(config, {"cpu": int(0.9 * size), "disk": "1GB"})
    on_disk = [name for name, device in device_map.items() if device == "disk"]
    assert on_disk
    assert all(".shards." in name for name in on_disk)
    loaded = type(model).from_pretrained(
        tmp_path / "model", num_expert_shards=2, device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert loaded.get_parameter(f"{on_disk[0]}.down_proj").is_meta
    torch.testing.assert_close(read(loaded, kind), expected)
    with page_experts(loaded, expert_cache=2) as paged:
        assert set(paged.slots) == set(on_disk)
        torch.testing.assert_close(read(loaded, kind), expected)


def make_mixture():
    """Returns a mixture of experts whose dense layer, the second of three, was upcycled."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 3}
    dense = Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT | sizes, mlp_only_layers=[1])).eval()
    return make_upcycled(dense=dense, include_dense_layers_of_moe=True)


def test_measured_routing_of_a_mixture_whose_dense_layers_were_upcycled():
    """The layers with experts of the base count as much as the measured one."""
    model = make_mixture()
    counts = {"text": [[3, 1, 0, 0, 0, 0, 0, 0]], "image": [[0, 0, 0, 0, 1, 1, 1, 1]]}
    layers = "model.layers"
    device_map = {f"{layers}.0.mlp.experts": 0, f"{layers}.1.mlp.experts.text": 1, "": 2}
    shares = {share.device: share.load for share in describe_placement(model, device_map, counts)}
    assert shares[0] == pytest.approx({"text": 1 / 3, "image": 1 / 3})
    assert shares[1] == pytest.approx({"text": 1 / 3, "image": 0.0})
    assert shares[2] == pytest.approx({"text": 1 / 3, "image": 2 / 3})
    measured = measure_routing(model, [make_inputs("llama")])
    (share,) = describe_placement(model, {"": "cpu"}, routing_statistics(model.config.experts_config, measured))
    assert share.load == pytest.approx({"text": 1.0, "image": 1.0})

    total = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    budget = {0: int(0.8 * total), "cpu": 10**9}
    planned = plan_expert_placement(model, budget, {"text": [[3, 1, 1, 1, 0, 0, 0, 0]], "image": [[0] * 8]})
    on_cpu = [name for name, device in planned.items() if device == "cpu"]
    # The experts of the base have the same load as those for text, with half the bytes.
    assert on_cpu == [f"{layers}.1.mlp.experts.text", f"{layers}.1.mlp.experts.image"]


def test_loads_of_unmeasured_layers():
    loads = {"a": {"text": 0.75, "image": 0.0}, "b": {"text": 0.25, "image": 1.0}}
    found = with_unmeasured_layers(loads, ["c", "d", "e"], num_measured_layers=2)
    assert found == {
        "a": pytest.approx({"text": 0.3, "image": 0.0}),
        "b": pytest.approx({"text": 0.1, "image": 0.4}),
        **{name: pytest.approx({"text": 0.2, "image": 0.2}) for name in "cde"},
    }


def test_size_of_a_mixture_whose_dense_layers_were_upcycled(monkeypatch):
    model = make_mixture()
    per_expert = 3 * 24 * 32
    of_base = 2 * (4 - 3) * per_expert  # in two layers, 3 of 4 experts run
    own = model.config.experts_config
    groups = {group["name"]: group["intermediate_size"] for group in own.expert_groups}
    of_own = (8 - 2) * 3 * 32 * groups["text"]  # of 4 experts for text and 4 for images, 2 run
    assert idle_parameters(model) == {"text": of_base + of_own, "image": of_base + of_own}
    assert model_size(model).active["text"] == model.num_parameters() - of_base - of_own
    monkeypatch.setattr("modeling_sparse_moe_vlm.toolbox.model_size.CHOSEN_EXPERTS", ())
    assert idle_parameters(model) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_size_of_a_model_that_came_with_its_code(kind, tmp_path):
    model = make_upcycled(kind, "isolated", num_experts=4)
    model.save_pretrained(tmp_path)
    of_code = get_class_from_dynamic_module(f"modeling_upcycled.{type(model).__name__}", tmp_path)
    assert of_code is not type(model)
    loaded = of_code.from_pretrained(tmp_path)
    assert type(loaded.config) is not type(model.config)
    expected = model_size(model)
    assert set(expected.active) == {"text", "image"}
    assert model_size(loaded) == model_size(loaded.config) == expected
    assert describe_size(loaded) == describe_size(model)
    assert idle_parameters(loaded) == idle_parameters(model)


@pytest.mark.parametrize("kind", ["multimodal", "text"])
def test_size_of_our_model_that_came_with_its_code(kind, tmp_path):
    config = make_config(num_experts=4) if kind == "multimodal" else make_config(num_experts=4).text_config
    model_class = SparseMoeVlmForConditionalGeneration if kind == "multimodal" else SparseMoeVlmForCausalLM
    model_class(config).save_pretrained(tmp_path)
    name = "SparseMoeVlmConfig" if kind == "multimodal" else "SparseMoeVlmTextConfig"
    of_code = get_class_from_dynamic_module(f"configuration_sparse_moe_vlm.{name}", tmp_path)
    assert of_code is not type(config)
    found = model_size(of_code.from_pretrained(tmp_path))
    assert found == model_size(config)
    assert set(found.active) == ({"text", "image"} if kind == "multimodal" else {"text"})
