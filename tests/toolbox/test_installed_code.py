"""The toolbox loads upcycled models with the code of this package and does not require `trust_remote_code`."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlavaConfig

from modeling_sparse_moe_vlm import configuration_upcycled, modeling_upcycled
from modeling_sparse_moe_vlm.toolbox.installed_code import register, use_installed_code
from modeling_sparse_moe_vlm.toolbox.meta_model import model_on_meta_device
from modeling_sparse_moe_vlm.toolbox.model_size import model_size
from modeling_sparse_moe_vlm.toolbox.training.models import load_config
from tests.support.models import make_model
from tests.support.upcycled import KINDS, make_upcycled

CLASSES = {
    "llava": (AutoModelForImageTextToText, "LlavaForConditionalGeneration", "LlavaConfig"),
    "qwen3_vl": (AutoModelForImageTextToText, "Qwen3VLForConditionalGeneration", "Qwen3VLConfig"),
    "llama": (AutoModelForCausalLM, "LlamaForCausalLM", "LlamaConfig"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_auto_classes_run_the_installed_code(kind, tmp_path):
    """Without `trust_remote_code`, from a folder without code."""
    auto_class, model_name, config_name = CLASSES[kind]
    model = make_upcycled(kind)
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.py"):
        file.unlink()
    use_installed_code(tmp_path)
    config = load_config(str(tmp_path))
    assert type(config) is getattr(configuration_upcycled, f"Upcycled{config_name}")
    assert config.to_dict().keys() == model.config.to_dict().keys()
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is getattr(modeling_upcycled, f"Upcycled{model_name}")
    on_meta = model_on_meta_device(config)
    assert type(on_meta) is type(loaded)
    assert {name: value.shape for name, value in on_meta.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert model_size(config) == model_size(model)


def test_other_models_are_not_affected(tmp_path):
    before = AutoConfig.for_model("llava")
    register(LlavaConfig)
    assert type(AutoConfig.for_model("llava")) is type(before)
    make_model().save_pretrained(tmp_path)
    use_installed_code(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    use_installed_code(tmp_path)
