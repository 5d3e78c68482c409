"""Undocumented behaviour of Accelerate, torch and Transformers that paging and adapters rely on."""

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, convert_file_size_to_int, offload_state_dict
from torch import nn
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from modeling_sparse_moe_vlm.toolbox.expert_modules import MARKS, uses_experts_interface
from tests.support.in_tree_moe import device_map_of, experts_of, make_qwen3_moe


def test_hooks_wrap_the_forward_that_a_module_keeps():
    """`_old_forward` runs between the two methods of a hook, and is looked up in every call."""
    seen = []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append("before")
            return args, kwargs

        def post_forward(self, module, output):
            seen.append("after")
            return output

        def detach_hook(self, module):
            seen.append("detached")
            return module

    module = nn.Linear(2, 2)
    own = module.forward
    hook = Hook()
    add_hook_to_module(module, hook)
    assert module._hf_hook is hook
    assert module._old_forward == own
    module._old_forward = lambda x: seen.append("forward") or own(x)
    module(torch.zeros(1, 2))
    remove_hook_from_module(module)
    assert seen == ["before", "forward", "after", "detached"]
    assert not hasattr(module, "_hf_hook")
    assert not hasattr(module, "_old_forward")


def test_another_hook_replaces_the_first():
    """The replaced hook is available while the new one is initialised. The wrapped forward stays the module's own."""
    module, seen = nn.Linear(2, 2), []
    own = module.forward

    class Hook(ModelHook):
        def init_hook(self, module):
            seen.append((module._hf_hook, module._old_forward))
            return module

    first = AlignDevicesHook(execution_device="cpu")
    add_hook_to_module(module, first)
    add_hook_to_module(module, Hook())
    assert seen == [(first, own)]
    chain = SequentialHook(first, ModelHook())
    assert list(chain.hooks) == [first, chain.hooks[1]]
    assert (first.execution_device, first.offload) == ("cpu", False)


def test_where_accelerate_stores_offloaded_weights(tmp_path):
    """In views of host memory, of its own files and of safetensors files."""
    model = make_qwen3_moe(4).eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, device_map=device_map_of(model, "disk"), offload_folder=tmp_path / "offload"
    )
    module = next(iter(experts_of(loaded).values()))
    weights = module._hf_hook.weights_map
    assert module.down_proj.is_meta
    assert isinstance(weights, PrefixedDataset)
    assert (type(weights.dataset), weights.prefix) == (OffloadedWeightsLoader, "model.layers.0.mlp.experts.")
    entry = weights.dataset.index[f"{weights.prefix}down_proj"]
    assert {"safetensors_file", "weight_name", "dtype"} <= entry.keys()
    assert list(weights.dataset.state_dict) == []

    offload_state_dict(tmp_path / "dat", {"a.b": torch.arange(6.0).view(3, 2)})
    loader = OffloadedWeightsLoader(state_dict={"c": torch.ones(1)}, save_folder=tmp_path / "dat")
    assert loader.index["a.b"] == {"dtype": "float32", "shape": [3, 2]}
    assert str(loader.save_folder) == str(tmp_path / "dat")
    content = torch.frombuffer(bytearray((tmp_path / "dat" / "a.b.dat").read_bytes()), dtype=torch.float32)
    assert content.tolist() == [0, 1, 2, 3, 4, 5]


def test_sizes():
    assert [convert_file_size_to_int(size) for size in ("2KB", "2KiB", "3MB")] == [2000, 2048, 3_000_000]
    with pytest.raises(ValueError, match="size"):
        convert_file_size_to_int("many")


def test_outer_hooks_for_saved_tensors():
    """They can be distinguished from no hooks, and can be called instead of autograd."""
    top = torch._C._autograd._top_saved_tensors_default_hooks
    assert top(False) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: ("kept", tensor), lambda saved: saved[1]):
        pack, unpack = top(False)
        one = torch.ones(1)
        assert pack(one) == ("kept", one)
        assert unpack(("kept", one)) is one


def test_saved_tensors_share_the_storage_of_the_computation():
    stack, seen = torch.randn(3, 4, 2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda saved: saved):
        torch.randn(5, 4, requires_grad=True) @ stack[1]
    (saved,) = [tensor for tensor in seen if tensor.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()]
    assert saved.storage_offset() == 8


def test_the_experts_interface():
    """The attributes that mark a module of the interface, and those that the interface reads to run it."""

    @use_experts_implementation
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = 2
            self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 4))
            self.down_proj = nn.Parameter(torch.randn(2, 4, 4))
            self.act_fn = nn.SiLU()

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states

    config = transformers.PretrainedConfig()
    experts = Experts(config)
    assert all(hasattr(experts, mark) for mark in MARKS)
    assert uses_experts_interface(experts)
    assert (experts.is_transposed, experts.is_concatenated, experts._is_expert_parallel) == (False, True, False)
    call = torch.randn(3, 4), torch.tensor([[0], [1], [1]]), torch.ones(3, 1)
    config._experts_implementation = "eager"
    assert experts(*call) is call[0]
    experts.down_proj.data.zero_()
    for implementation in ("grouped_mm", "batched_mm"):
        assert implementation in ALL_EXPERTS_FUNCTIONS
        config._experts_implementation = implementation
        assert not experts(*call).any()


def test_the_fallback_for_grouped_products():
    """Used on CPUs without a kernel. Each matrix multiplies the rows up to its offset."""
    rows, stack = torch.randn(4, 3), torch.randn(2, 3, 5)
    product = torch.ops.transformers.grouped_mm_fallback(rows, stack, torch.tensor([1, 4], dtype=torch.int32))
    torch.testing.assert_close(product, torch.cat([rows[:1] @ stack[0], rows[1:] @ stack[1]]))
    assert hasattr(torch.ops.transformers.grouped_mm_fallback, "default")


def test_the_placement_of_shared_tensors():
    """The attributes of a tensor shared by several processes that `expert_lora/processes.py` reads."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert hasattr(DTensor, "placements")
    assert hasattr(DTensor, "device_mesh")
    assert not hasattr(torch.ones(1), "placements")
    assert (Shard(1).dim, Shard(1).is_replicate(), Replicate().is_replicate()) == (1, False, True)
    assert {"mesh_dim_names", "get_local_rank", "size"} <= set(dir(DeviceMesh))
    assert callable(DTensor.full_tensor)
