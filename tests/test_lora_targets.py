"""A warning says that adapters with the usual names of linear layers miss the routed experts."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config, load_expert_lora
from tests.support import in_tree_moe
from tests.support.models import make_model

pytestmark = pytest.mark.newest

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
USUAL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
WARNING = r"no routed expert gets an adapter: the adapter 'default' is for linear layers.*`expert_lora_config\(model"


def has_adapted_experts(model) -> bool:
    return any("lora_A" in name and ".mlp.experts." in name for name, _ in model.named_parameters())


def warnings_of(function) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in caught if "routed expert" in str(warning.message)]


@pytest.mark.parametrize(
    "targets",
    [USUAL, ["down_proj"], ["experts.up_proj"], "all-linear", "ALL-LINEAR", r".*\.(q_proj|gate_proj)"],
    ids=str,
)
@pytest.mark.parametrize("arrangement", ["hybrid", "joint", "isolated"])
def test_names_of_feed_forward_layers_warn(targets, arrangement):
    model = make_model(expert_groups=arrangement)
    # PEFT itself raises an error if it finds no module.
    config = LoraConfig(r=2, target_modules=targets)
    try:
        messages = warnings_of(lambda: get_peft_model(model, config))
    except ValueError as error:
        assert "not found in the base model" in str(error) or "No modules were targeted" in str(error)  # noqa: PT017
        assert arrangement != "hybrid" or targets == ["experts.up_proj"]
        return
    assert len(messages) == 1
    assert not has_adapted_experts(model)


def test_the_warning_names_the_share_and_the_fix():
    model = make_model()
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(value.numel() for name, value in model.named_parameters() if ".mlp.experts." in name)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        get_peft_model(model, LoraConfig(r=2, target_modules=USUAL))
    (message,) = [str(warning.message) for warning in caught if "routed" in str(warning.message)]
    adapters = sum(parameter.numel() for parameter in model.parameters()) - total
    assert f"{routed / (total + adapters):.0%} of the model's parameters" in message
    assert 'target_parameters=["gate_up_proj", "down_proj"]' in message
    (warning,) = [warning for warning in caught if "routed" in str(warning.message)]
    assert not warning.filename.endswith("lora_targets.py")


def test_the_fix_of_the_warning_does_not_warn():
    model = make_model()
    values = {"target_modules": USUAL, "target_parameters": ["gate_up_proj", "down_proj"]}
    assert warnings_of(lambda: get_peft_model(model, LoraConfig(r=2, **values))) == []
    assert has_adapted_experts(model)
    for options in ({}, {"attention": True}, {"groups": ["text"]}):  # `text` is an always-on group
        model = make_model()
        assert warnings_of(lambda: get_peft_model(model, expert_lora_config(model, **options))) == []  # noqa: B023


@pytest.mark.parametrize("targets", [ATTENTION, ["q_proj"], ["linear_1", "lm_head"], r".*\.q_proj"], ids=str)
def test_adapters_that_name_no_feed_forward_layers_do_not_warn(targets):
    model = make_model()
    assert warnings_of(lambda: get_peft_model(model, LoraConfig(r=2, target_modules=targets))) == []


def test_loading_for_inference_does_not_warn(tmp_path):
    get_peft_model(make_model(), LoraConfig(r=2, target_modules=USUAL)).save_pretrained(tmp_path)
    assert warnings_of(lambda: PeftModel.from_pretrained(make_model(), tmp_path)) == []
    assert len(warnings_of(lambda: PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True))) == 1
    model = make_model()
    get_peft_model(model, expert_lora_config(model)).save_pretrained(tmp_path)
    assert warnings_of(lambda: load_expert_lora(make_model(), tmp_path)) == []


def test_without_a_peft_model():
    config = LoraConfig(r=2, target_modules=USUAL)
    assert len(warnings_of(lambda: inject_adapter_in_model(config, make_model()))) == 1


def test_the_attribute_behaves_as_any_other():
    model = make_model()
    assert not hasattr(model, "peft_config")
    with pytest.raises(AttributeError, match="has no attribute 'peft_config'"):
        _ = model.peft_config
    configs = {"default": LoraConfig(r=2, target_modules=["q_proj"])}
    model.peft_config = configs
    assert model.peft_config is configs
    assert copy.deepcopy(model).peft_config.keys() == configs.keys()
    del model.peft_config
    assert not hasattr(model, "peft_config")


@torch.no_grad()
def test_contract_of_peft():
    """PEFT sets the attribute after it adds the adapter, with the resolved names of `"all-linear"`."""
    seen = []

    class Model(type(in_tree_moe.make_model("qwen3_moe"))):
        def __setattr__(self, name, value):
            if name == "peft_config":
                seen.append((dict(value), [name for name, _ in self.named_parameters() if "lora_A" in name]))
            super().__setattr__(name, value)

    model = in_tree_moe.make_model("qwen3_moe")
    model.__class__ = Model
    config = LoraConfig(r=2, target_modules="all-linear", target_parameters=["experts.down_proj"])
    get_peft_model(model, config)
    ((configs, adapted),) = seen
    assert list(configs) == ["default"]
    assert not isinstance(configs["default"].target_modules, str)
    assert any(".self_attn.q_proj.lora_A" in name for name in adapted)
    assert any(".experts.lora_A" in name for name in adapted)
