"""Device maps, offloading, shards and sizes of upcycled models."""

import copy

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.expert_modules import experts_modules
from modeling_sparse_moe_vlm.toolbox.paging import page_experts
from modeling_sparse_moe_vlm.toolbox.placement import describe_placement, plan_expert_placement
from modeling_sparse_moe_vlm.toolbox.routing import measure_routing
from tests.support.upcycled import KINDS, make_inputs, make_upcycled


@torch.no_grad()
def read(model, kind) -> torch.Tensor:
    return model.eval()(**make_inputs(kind)).logits


def decoder_of(kind: str) -> str:
    return "model" if kind == "llama" else "model.language_model"


@pytest.mark.parametrize("kind", KINDS)
def test_plans_keep_hot_experts_on_the_fast_device(kind):
    """Text experts, which all choices fell on in these measurements, stay; image experts go to the CPU."""
    model = make_upcycled(kind, "isolated", num_experts=16)
    sizes = {name: sum(p.numel() * 4 for p in module.parameters()) for name, module in experts_modules(model).items()}
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    counts = {"text": [[1] * 8 + [0] * 8] * 2, "image": [[0] * 16] * 2}
    budget = total - sum(size for name, size in sizes.items() if name.endswith(".image"))
    budget += max(sizes.values()) + 2000  # Accelerate brings an offloaded part back as a whole; buffers
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
def test_planned_from_the_configuration_and_loaded_with_experts_on_disk(kind, tmp_path):
    """In shards, of which some lie on the disk, and are then paged."""
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
