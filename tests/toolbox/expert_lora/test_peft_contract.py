"""Internals of PEFT that `expert_lora` relies on. If a test fails, PEFT has changed and `expert_lora` must follow."""

import inspect
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from modeling_sparse_moe_vlm.toolbox.expert_lora.adapted_layer import FactoredExpertsLayer, run_factored
from tests.support.in_tree_moe import adapt, experts_of, make_model

OVERRIDDEN = {
    "update_layer": ["self", "adapter_name", "r", "lora_alpha", "config", "kwargs"],
    "merge": ["self", "safe_merge", "adapter_names"],
    "unmerge": ["self"],
    "get_delta_weight": ["self", "adapter_name", "args", "kwargs"],
    "forward": ["self", "x", "args", "kwargs"],
    "_move_adapter_to_device_of_base_layer": ["self", "adapter_name", "device"],
    "set_adapter": ["self", "adapter_names", "inference_mode"],
    "enable_adapters": ["self", "enabled"],
}


@pytest.mark.parametrize("method", OVERRIDDEN)
def test_methods_that_are_overridden(method):
    assert list(inspect.signature(getattr(ParamWrapper, method)).parameters) == OVERRIDDEN[method]


def test_every_override_overrides():
    classes = FactoredExpertsLayer.__mro__[: FactoredExpertsLayer.__mro__.index(ParamWrapper)]
    assert [each.__name__ for each in classes[1:]] == ["MergingLayer", "SwitchingLayer"]
    ours = {name for each in classes for name, value in vars(each).items() if inspect.isfunction(value)}
    assert {name for name in ours if hasattr(ParamWrapper, name)} == {*OVERRIDDEN, "__init__"}


def test_constructor():
    parameters = list(inspect.signature(ParamWrapper.__init__).parameters)
    assert parameters[:5] == ["self", "base_layer", "adapter_name", "parameter_name", "config"]


def test_attributes():
    wrapper = next(module for module in adapt(make_model("qwen3_moe")).modules() if isinstance(module, ParamWrapper))
    assert isinstance(wrapper, LoraLayer)
    assert (wrapper.num_experts, wrapper.parameter_name) == (8, "down_proj")
    assert wrapper._did_swap_in_out_features is True
    assert wrapper.scaling == {"default": 2.0}
    assert wrapper.r == {"default": 3}
    assert wrapper.use_dora == {"default": False}
    assert wrapper.merged_adapters == []
    assert (wrapper.merged, wrapper.disable_adapters, wrapper.active_adapters) == (False, False, ["default"])
    assert isinstance(wrapper.lora_dropout["default"], nn.Identity)
    assert isinstance(wrapper.lora_magnitude_vector, nn.ModuleDict)
    assert "lora_magnitude_vector" in wrapper.adapter_layer_names
    transposed = next(module for module in adapt(make_model("aria")).modules() if isinstance(module, ParamWrapper))
    assert transposed._did_swap_in_out_features is False


@pytest.mark.parametrize("name", ["qwen3_moe", "aria", "isolated"])
def test_nesting(name):
    """The layers are nested as `down(gate_up(experts))`, which determines the names on disk."""
    model = make_model(name)
    names = list(experts_of(model))
    adapted = adapt(model).base_model.model
    for name in names:
        outer = adapted.get_submodule(name)
        assert type(outer) is type(outer.base_layer) is ParamWrapper
        assert [outer.parameter_name, outer.base_layer.parameter_name] == ["down_proj", "gate_up_proj"]
        assert outer.get_base_layer() is outer.base_layer.base_layer


def test_custom_modules():
    """PEFT makes layers of a registered class for experts, for both stacks and for a second adapter."""
    model = make_model("qwen3_moe")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
    run_factored(config, experts_of(model).values())
    assert config._custom_modules == {type(module): FactoredExpertsLayer for module in experts_of(model).values()}
    adapted = get_peft_model(model, config)
    adapted.add_adapter("other", LoraConfig(r=4, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]))
    layers = [module for module in adapted.modules() if isinstance(module, ParamWrapper)]
    assert len(layers) == 4
    assert {type(layer) for layer in layers} == {FactoredExpertsLayer}
    assert {tuple(layer.lora_A) for layer in layers} == {("default", "other")}
    assert '"ParamWrapper"' in inspect.getsource(BaseTuner._inject_parameters), "PEFT tells its layers by name"
    assert "_custom_modules" not in config.to_dict()


@torch.no_grad()
def test_merging_calls_what_is_overridden(monkeypatch):
    """`merge` adds what `get_delta_weight` returns, in the orientation of the stack."""
    wrapper = next(module for module in adapt(make_model("qwen3_moe")).modules() if isinstance(module, ParamWrapper))
    before = wrapper.get_param().clone()
    monkeypatch.setattr(ParamWrapper, "get_delta_weight", lambda self, name: torch.full_like(before, 0.5))
    wrapper.merge()
    torch.testing.assert_close(wrapper.get_param(), before + 0.5)


@torch.no_grad()
def test_every_call_of_the_model_goes_through_one_method(monkeypatch):
    """The method gets the arguments of the call. `adapter_names` is removed only after that."""
    adapted = adapt(make_model("qwen3_moe")).eval()
    seen = []

    @contextmanager
    def spy(*args, **kwargs):
        seen.append((len(args), sorted(kwargs)))
        yield

    adapted.base_model._enable_peft_forward_hooks = spy
    ids = torch.tensor([[7, 8]])
    adapted(ids, adapter_names=["default"])
    adapted.generate(input_ids=ids, adapter_names=["default"], max_new_tokens=2)
    assert seen == [(1, ["adapter_names"]), (0, ["adapter_names", "input_ids", "max_new_tokens"])]
    parameters = inspect.signature(LoraModel._enable_peft_forward_hooks).parameters
    assert list(parameters) == ["self", "args", "kwargs"]


@torch.no_grad()
def test_linear_layers_take_a_name_for_each_input():
    """Also for inputs of shape `(tokens, in)`. Our hook replaces the hook of PEFT that passes the names."""
    linear = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    linear.eval()
    inputs = torch.randn(4, 3)
    layer = linear.base_model.model[0]
    got = layer(inputs, adapter_names=["default", "__base__", "default", "__base__"])
    expected = torch.where(torch.tensor([[True], [False]] * 2), layer(inputs), layer.base_layer(inputs))
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        layer(inputs, adapter_names=["default"])
    assert issubclass(ModulesToSaveWrapper, AuxiliaryTrainingWrapper)


def test_switching_reaches_every_layer(monkeypatch):
    adapted = adapt(make_model("qwen3_moe"))
    adapted.add_adapter("other", adapted.peft_config["default"])
    calls = []
    monkeypatch.setattr(ParamWrapper, "set_adapter", lambda self, names, inference_mode=False: calls.append(names))
    monkeypatch.setattr(ParamWrapper, "enable_adapters", lambda self, enabled: calls.append(enabled))
    adapted.set_adapter("other")
    assert calls == ["other"] * 4
    calls.clear()
    with adapted.disable_adapter():
        assert calls == [False] * 4
