"""Accelerate's device maps: outputs equal those of the model in memory, and maps that do not fit are refused."""

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import send_to_device
from accelerate.utils.modeling import check_device_map
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import initialization
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.placement import plan_expert_placement
from tests.support.models import make_config, make_inputs, make_model
from tests.test_loading import map_around

KINDS = {
    "hybrid": {},
    "isolated": {"expert_groups": "isolated"},
    "pools": {"num_hidden_layers": 4, "expert_pool": [0, 1, 0, None]},
    "tied": {"tie_word_embeddings": True},
}
LAYER = "model.language_model.layers.1"


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def size_of(model) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def check_equal(model, folder, **kwargs) -> SparseMoeVlmForConditionalGeneration:
    """Loads the model with these arguments and compares its outputs."""
    inputs = make_inputs()
    loaded = SparseMoeVlmForConditionalGeneration.from_pretrained(
        folder / "model", offload_folder=folder / "offload", **kwargs
    )
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    generate = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **generate), model.generate(**inputs, **generate))
    return loaded


@pytest.mark.parametrize("strategy", ["auto", "balanced", "sequential"])
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_maps_that_the_library_makes(kind, strategy, share, tmp_path):
    """If the weights need more memory than there is, the rest is offloaded to the disk."""
    model = make_model(**KINDS[kind])
    model.save_pretrained(tmp_path / "model")
    # The library reserves memory to load the largest offloaded layer.
    memory = {"cpu": int(2.5 * size_of(model)) if share == 1.0 else int(share * size_of(model))}
    loaded = check_equal(model, tmp_path, device_map=strategy, max_memory=memory)
    # One device needs no map.
    assert ("disk" in getattr(loaded, "hf_device_map", {}).values()) == (share < 1.0)


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("hybrid", LAYER),
        ("hybrid", f"{LAYER}.mlp.experts"),
        ("hybrid", f"{LAYER}.mlp.shared_experts"),
        ("hybrid", f"{LAYER}.mlp.shared_experts.image"),
        ("isolated", f"{LAYER}.mlp.experts.text"),
        ("pools", "model.language_model.expert_pools"),
        ("tied", "model.vision_tower"),
    ],
)
def test_explicit_maps(kind, module, tmp_path):
    model = make_model(**KINDS[kind])
    model.save_pretrained(tmp_path / "model")
    loaded = check_equal(model, tmp_path, device_map=map_around(model, module))
    assert all(parameter.is_meta for parameter in loaded.get_submodule(module).parameters())
    loaded.save_pretrained(tmp_path / "again")
    again = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path / "again")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("num_shards", [1, 2])
def test_maps_over_accelerators(kind, num_shards):
    """On the meta device, as if there were accelerators: layers are not split, and every tensor has a device."""
    config = make_config(**KINDS[kind])
    config.num_expert_shards = num_shards
    with torch.device("meta"):
        model = SparseMoeVlmForConditionalGeneration(config)
    memory = {0: size_of(model) // 2, 1: size_of(model) // 2, "cpu": size_of(model), "disk": size_of(model)}
    device_map = infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
    check_device_map(model, device_map)
    assert len(set(device_map.values())) > 1
    assert not [name for name in device_map if "layers." in name and name.count(".") > 3]


# ------------------------------------------------------------------------------------------------ several devices


def _without_kernels(experts, hidden_states, top_k_index, top_k_weights):
    """Runs experts with operations that also work on the meta device."""
    return hidden_states * (top_k_index * top_k_weights).sum(dim=-1, keepdim=True) * experts.down_proj.sum()


def place(model: nn.Module, device_map: dict[str, int | str]) -> None:
    """Adds hooks that move inputs to the device of a module, like `dispatch_model`, which cannot move meta tensors."""
    for entry, number in device_map.items():
        for module in model.get_submodule(entry).modules():
            device = f"cuda:{number}"
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = nn.Parameter(torch.empty_like(tensor, device=device), requires_grad=False)

            def bring(_, args, kwargs, device=device):
                skipped = model._skip_keys_device_placement
                return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=skipped)

            module.register_forward_pre_hook(bring, with_kwargs=True)


SPREAD = {
    "shards": ({"num_experts": 8}, 4, {}),
    "shards of groups": ({"expert_groups": "isolated"}, 2, {}),
    "shards of pools": ({"num_hidden_layers": 3, "expert_pool": [0, None, 0]}, 2, {}),
    "groups": ({"expert_groups": "isolated"}, 1, {}),
    "shared experts": ({}, 1, {"model.layers.0.mlp.shared_experts": 1}),
    "one of the shared experts": ({}, 1, {"model.layers.0.mlp.shared_experts.image": 1}),
    "experts": ({}, 1, {"model.layers.0.mlp.experts": 1}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SPREAD)
def test_experts_apart_from_their_layer(name, monkeypatch):
    """
    The devices do not exist. An operation on tensors of two devices raises an error, and so does reading a value, which
    would make the launches of the other shards wait.
    """
    kind, num_shards, moved = SPREAD[name]
    config = make_config(**kind).text_config
    config.num_expert_shards = num_shards
    config._experts_implementation = "without_kernels"
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "without_kernels", _without_kernels)
    mode = FakeTensorMode()
    with initialization.no_init_weights(), mode:
        model = SparseMoeVlmForCausalLM(config)
    shape = (config.num_hidden_layers, config.num_experts)
    routing = {
        modality: torch.rand(shape, generator=torch.Generator().manual_seed(0)) for modality in ("text", "image")
    }
    if name == "groups":
        routing["text"][:, 2:] = routing["image"][:, :2] = 0
    if moved:
        device_map = dict.fromkeys(map_around(model, next(iter(moved))), 0) | moved
    else:
        device_map = plan_expert_placement(model, {0: "1GB", 1: "1GB"}, routing)
    ran = []
    with mode:
        place(model, device_map)
        for experts, module in model.named_modules():
            if hasattr(module, "has_gate"):
                module.register_forward_hook(lambda *_, experts=experts: ran.append(experts))
        for number, layer in enumerate(model.model.layers):
            home = layer.mlp.gate.weight.device
            pool = config.layer_pool(number)
            pooled = None if pool is None else model.model.expert_pools[str(pool)]
            output = layer.mlp(torch.zeros(2, 5, config.hidden_size, device=home), None, pooled_experts=pooled)
            assert output.device == home
    devices = {device_map[entry] for entry in device_map if "experts" in entry}
    assert devices == {0, 1} or moved
    assert len(set(ran)) == len([module for module in model.modules() if hasattr(module, "has_gate")])


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({f"{LAYER}.mlp.expert": "disk"}, rf"names '{LAYER}.mlp.expert'.*did you mean '{LAYER}.mlp.experts'"),
        ({"model.language_model.layers.7": "cpu"}, r"names 'model.language_model.layers.7'"),
        ({f"{LAYER}.mlp.experts.shards.0": "cpu"}, r"experts.shards.0', which .* does not have"),
    ],
)
def test_maps_that_name_what_does_not_exist(wrong, message, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, device_map={"": "cpu"} | wrong)


def test_maps_that_leave_something_out(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    device_map = map_around(model, f"{LAYER}.mlp.experts")
    del device_map[f"{LAYER}.mlp.experts"]
    with pytest.raises(ValueError, match=rf"no device for '{LAYER}.mlp.experts.gate_up_proj' and 1 more"):
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
