"""Training settings cost nothing at inference, and `from_pretrained` can change any field of the decoder."""

import json
import re

import pytest
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration
from tests.support.models import make_config, make_inputs, make_model

LOSSES = ("aux_loss", "z_loss", "aux_loss_by_modality")


def has_losses(output) -> bool:
    present = {output.get(name) is not None for name in LOSSES}
    assert len(present) == 1
    return present.pop()


# ------------------------------------------------------------------------------------------------ router losses


@torch.no_grad()
def test_router_losses_are_computed_in_training_or_on_request():
    inputs = make_inputs()
    labels = {"labels": inputs["input_ids"]}
    for configured in (False, True):
        model = make_model(output_router_logits=configured)
        assert not has_losses(model(**inputs))
        assert has_losses(model(**inputs, output_router_logits=True))
        assert has_losses(model(**inputs, **labels)) == configured
        assert not has_losses(model(**inputs, **labels, output_router_logits=False))
        assert has_losses(model.train()(**inputs)) == configured


@torch.no_grad()
def test_generating_computes_no_router_losses(monkeypatch):
    model = make_model(output_router_logits=True)
    monkeypatch.setattr("modeling_sparse_moe_vlm.losses.router_losses", lambda *_, **__: pytest.fail("router losses"))
    model.generate(**make_inputs(), max_new_tokens=2)


# --------------------------------------------------------------------------------------------- length of generated text


def num_new_tokens(model, **options) -> int:
    inputs = make_inputs()
    model.generation_config.eos_token_id = None
    return model.generate(**inputs, do_sample=False, **options).shape[1] - inputs["input_ids"].shape[1]


def test_the_length_given_in_a_call_takes_precedence():
    model = make_model()
    model.generation_config.max_new_tokens = 3
    assert num_new_tokens(model) == 3
    assert num_new_tokens(model, max_length=20) == 6
    assert num_new_tokens(model, generation_config=GenerationConfig(max_length=20)) == 6
    assert num_new_tokens(model, max_new_tokens=5) == 5
    assert num_new_tokens(model, max_length=20, max_new_tokens=5) == 5
    assert num_new_tokens(model, generation_config=GenerationConfig(max_new_tokens=5)) == 5
    assert num_new_tokens(model, generation_config=GenerationConfig(max_length=20, max_new_tokens=5)) == 5
    model.generation_config.max_new_tokens = None
    model.generation_config.max_length = 18
    assert num_new_tokens(model) == 4
    assert model.generation_config.max_length == 18


# ------------------------------------------------------------------------------------------------ loading


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    make_model(output_router_logits=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("given_config", [True, False])
def test_loading_accepts_fields_of_the_decoder(checkpoint, auto, given_config):
    load = (AutoModelForImageTextToText if auto else SparseMoeVlmForConditionalGeneration).from_pretrained
    fields = {"output_router_logits": False, "router_aux_loss_coef": 0.5, "num_experts_per_tok": 1}
    config = SparseMoeVlmConfig.from_pretrained(checkpoint)
    if auto and given_config:
        pytest.skip("the library gives the rest to the configuration only where it reads that itself")
    model = load(checkpoint, **fields, **({"config": config} if given_config else {}))
    text_config = model.model.language_model.config
    assert {name: getattr(text_config, name) for name in fields} == fields
    assert model.config.text_config.num_experts_per_tok == 1
    assert text_config.num_experts == 4
    assert config.text_config.output_router_logits  # the configuration of the caller is not changed
    inputs = make_inputs()
    with torch.no_grad():
        expected = make_model(num_experts_per_tok=1)(**inputs).logits
        torch.testing.assert_close(model.eval()(**inputs).logits, expected)


def test_fields_that_do_not_fit_are_refused_at_loading(checkpoint):
    with pytest.raises(ValueError, match="`num_experts_per_tok` is 5"):
        SparseMoeVlmForConditionalGeneration.from_pretrained(checkpoint, num_experts_per_tok=5)


@pytest.mark.parametrize("load", [AutoModelForImageTextToText, SparseMoeVlmForConditionalGeneration])
@pytest.mark.parametrize(
    ("name", "hint"),
    [("output_router_logit", ": did you mean `output_router_logits`?"), ("colour", ".")],
)
def test_errors_name_unknown_fields(checkpoint, load, name, hint):
    message = f"`{name}` is neither an option of `from_pretrained` nor a field of the configuration or its "
    with pytest.raises(TypeError, match=re.escape(f"{message}`text_config`{hint}")):
        load.from_pretrained(checkpoint, **{name: False})


def test_from_config_accepts_fields_of_the_decoder():
    model = AutoModelForImageTextToText.from_config(make_config(), num_experts_per_tok=1)
    assert model.config.text_config.num_experts_per_tok == 1


def test_configurations_accept_fields_of_the_decoder(tmp_path):
    make_config().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    config, rest = SparseMoeVlmConfig.from_dict(
        fields, num_experts_per_tok=1, colour="red", pixel_shuffle_factor=1, return_unused_kwargs=True
    )
    assert (config.text_config.num_experts_per_tok, config.pixel_shuffle_factor, rest) == (1, 1, {"colour": "red"})
    assert fields["text_config"]["num_experts_per_tok"] == 2  # the given dict is not changed
