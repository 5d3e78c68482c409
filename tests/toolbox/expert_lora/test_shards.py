"""Adapters of experts do not depend on shards: they can be trained and loaded with any number of shards."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.expert_lora import (
    expert_lora_config,
    factor_expert_lora,
    load_adapter,
    load_expert_lora,
    lora_config_for_shards,
    save_adapter,
    upgrade_expert_adapter,
)
from tests.support.in_tree_moe import randomise
from tests.support.models import make_inputs, make_model

pytestmark = pytest.mark.newest

KINDS = {
    "joint": ({"num_experts": 5}, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "one group": (
        {"expert_groups": "isolated", "num_experts": 6},
        ["experts.image.gate_up_proj", "experts.image.down_proj"],
    ),
    "by full name": (
        {"num_hidden_layers": 3, "expert_pool": [0, None, 0]},
        [
            "model.language_model.expert_pools.0.gate_up_proj",
            "model.language_model.layers.1.mlp.experts.down_proj",
        ],
    ),
    "everywhere": ({"num_experts": 5}, ["gate_up_proj", "down_proj"]),
}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def load(folder, num_shards: int) -> SparseMoeVlmForConditionalGeneration:
    return SparseMoeVlmForConditionalGeneration.from_pretrained(folder / "model", num_expert_shards=num_shards)


def adapt(folder, num_shards: int, targets: list[str]) -> PeftModel:
    """Returns a model with a new adapter that is large enough to matter."""
    model = load(folder, num_shards)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=targets)
    adapted = get_peft_model(model, lora_config_for_shards(config, model)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return adapted


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@torch.no_grad()
@pytest.mark.parametrize(("trained_with", "loaded_with"), [(1, 3), (3, 1), (2, 3)])
def test_the_same_adapter(kind, trained_with, loaded_with, tmp_path):
    fields, targets = KINDS[kind]
    base, inputs = make_model(**fields), make_inputs()
    base.save_pretrained(tmp_path / "model")
    trained = adapt(tmp_path, trained_with, targets)
    expected = trained(**inputs).logits
    assert (expected - base(**inputs).logits).abs().max() > 1e-2, "the adapter matters"
    save_adapter(trained, tmp_path / "adapter")
    loaded = load_adapter(load(tmp_path, loaded_with), tmp_path / "adapter")
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    save_adapter(loaded, tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "adapter")
    whole = PeftModel.from_pretrained(load(tmp_path, 1), tmp_path / "adapter").eval()
    torch.testing.assert_close(whole(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    whole.save_pretrained(tmp_path / "whole")
    assert files(tmp_path / "whole") == files(tmp_path / "adapter")
    factored = factor_expert_lora(load_adapter(load(tmp_path, loaded_with), tmp_path / "again"))
    torch.testing.assert_close(factored(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    whole = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(whole(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_only_the_shards_of_what_was_named(tmp_path):
    fields, targets = KINDS["one group"]
    make_model(**fields).save_pretrained(tmp_path / "model")
    names = [name for name, p in adapt(tmp_path, 3, targets).named_parameters() if p.requires_grad]
    assert names
    assert all(".experts.image.shards." in name for name in names)
    stacks = {name.split(".shards.")[0] for name in names}
    assert len(stacks) == 2, "both layers"


def test_adapters_of_another_model(tmp_path):
    fields, targets = KINDS["joint"]
    make_model(**fields).save_pretrained(tmp_path / "model")
    save_adapter(adapt(tmp_path, 3, targets), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"does not fit the model.*layers.1"):
        load_adapter(make_model(num_experts=5, num_hidden_layers=1), tmp_path / "adapter")


def test_plain_peft_does_not_go_on_without_the_weights(tmp_path):
    fields, targets = KINDS["everywhere"]
    make_model(**fields).save_pretrained(tmp_path / "model")
    save_adapter(adapt(tmp_path, 1, targets), tmp_path / "adapter")
    with pytest.raises(ValueError, match="load_adapter"):
        PeftModel.from_pretrained(load(tmp_path, 3), tmp_path / "adapter")


@torch.no_grad()
def test_experts_chosen_by_shard_are_saved_as_of_whole_stacks(kind, tmp_path):
    """`expert_lora_config` of a sharded model names shards, which differ for another number of shards."""
    base, inputs = make_model(**KINDS[kind][0]), make_inputs()
    base.save_pretrained(tmp_path / "model")
    sharded = load(tmp_path, 2)
    adapted = randomise(get_peft_model(sharded, expert_lora_config(sharded, r=3)).eval())
    expected = adapted(**inputs).logits
    save_adapter(adapted, tmp_path / "adapter")
    whole = PeftModel.from_pretrained(load(tmp_path, 1), tmp_path / "adapter").eval()
    torch.testing.assert_close(whole(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("use_dora", [False, True])
def test_loaded_factored(kind, use_dora, tmp_path):
    base, inputs = make_model(**KINDS[kind][0]), make_inputs()
    base.save_pretrained(tmp_path / "model")
    adapted = get_peft_model(base, expert_lora_config(base, r=3, use_dora=use_dora)).eval()
    for adapter in ("default", "other"):
        if adapter == "other":
            adapted.add_adapter(adapter, expert_lora_config(base, r=2, use_dora=use_dora))
        randomise(adapted, adapter=adapter)
    adapted.save_pretrained(tmp_path)
    sharded = load_expert_lora(load(tmp_path, 3), tmp_path)
    load_expert_lora(sharded, tmp_path / "other", "other")
    for adapter in ("default", "other"):
        for model in (adapted, sharded):
            model.set_adapter(adapter)
        torch.testing.assert_close(sharded(**inputs).logits, adapted(**inputs).logits, rtol=1e-4, atol=1e-4)
        save_adapter(sharded, tmp_path / "again", adapter)
    assert files(tmp_path / "again" / "other").keys() == files(tmp_path / "other").keys()
    for name in ("", "other"):
        ours, theirs = (load_file(tmp_path / of / name / "adapter_model.safetensors") for of in ("again", ""))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_adapters_of_older_peft(tmp_path):
    """For square matrices, only the version of PEFT determines the layout."""
    base = make_model(num_experts=4, moe_intermediate_size=32)
    base.save_pretrained(tmp_path / "model")
    adapted = get_peft_model(base, expert_lora_config(base, projections=["down"]))
    adapted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.18.1"}))
    for loader in (load_adapter, load_expert_lora):
        with pytest.raises(ValueError, match="convert its folder with `upgrade_expert_adapter`"):
            loader(load(tmp_path, 2), tmp_path)
    upgrade_expert_adapter(tmp_path, tmp_path / "new", load(tmp_path, 2))
    load_adapter(load(tmp_path, 2), tmp_path / "new")
