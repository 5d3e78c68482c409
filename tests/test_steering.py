"""Priors and guidance of a call: valid values, how they are combined, and errors about misspelt arguments."""

import math

import pytest
import torch

from modeling_sparse_moe_vlm.steering import (
    MAX_GUIDANCE,
    are_equal,
    check_steering_arguments,
    fixed_log_priors,
    given_log_priors,
    initial_log_priors,
)
from modeling_sparse_moe_vlm.toolbox.modality_weights import modality_weights
from tests.support import in_tree_models
from tests.support.models import make_config, make_inputs, make_model

pytestmark = pytest.mark.newest

NOT_A_GUIDANCE = [1e30, math.inf, math.nan, -0.1, True, "1", None, 10**400, MAX_GUIDANCE + 1]


@pytest.mark.parametrize("guidance", NOT_A_GUIDANCE, ids=lambda value: repr(value)[:8])
def test_guidance_out_of_bounds(guidance):
    message = "`modality_guidance` must be a number from 0 to 100.0"
    with pytest.raises(ValueError, match=message):
        make_model()(**make_inputs(), modality_guidance=guidance)
    with (
        pytest.raises(ValueError, match=message),
        modality_weights(in_tree_models.make_model(), modality_guidance=guidance),
    ):
        pass


@torch.no_grad()
def test_the_largest_guidance_is_accepted():
    assert MAX_GUIDANCE == 100
    assert make_model()(**make_inputs(), modality_guidance=100).logits.isfinite().all()
    with modality_weights(in_tree_models.make_model(), modality_guidance=100.0):
        pass


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ({"modality_prior": {"image": 2.0}}, "modality_priors"),
        ({"modality_priros": {"image": 2.0}}, "modality_priors"),
        ({"output_modality_weight": True}, "output_modality_weights"),
        ({"modality_guidence": 1.0}, "modality_guidance"),
    ],
)
def test_misspelt_arguments_are_named(misspelt, meant):
    model, inputs = make_model(), make_inputs()
    (name,) = misspelt
    message = f"there is no argument `{name}`: did you mean `{meant}`"
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**inputs, **misspelt)
    tokens = {"input_ids": torch.full((1, 4), 9)}
    with pytest.raises(ValueError, match=message):
        model.model.language_model(**tokens, **misspelt)


def test_arguments_of_transformers_do_not_count_as_misspelt():
    check_steering_arguments(
        ["output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch", "cu_seq_lens_q"]
    )
    check_steering_arguments(["modality_priors", "modality_guidance", "output_modality_weights"])


def test_log_priors_of_a_call():
    assert given_log_priors(["text", "image"], None) == [0.0, 0.0]
    assert given_log_priors(["text", "image", "audio"], {"image": 2.0, "audio": 0.5}) == [0, math.log(2), math.log(0.5)]
    for unknown in ({"sound": 1.0}, {3: 1.0, "sound": 1.0}):
        with pytest.raises(ValueError, match="unknown modalities"):
            given_log_priors(["text", "image"], unknown)
    for prior in (0.0, -1.0, math.nan, math.inf, True, "2"):
        with pytest.raises(ValueError, match=r"modality_priors\['image'\]"):
            given_log_priors(["text", "image"], {"image": prior})


def test_fixed_log_priors_are_the_sum_of_those_of_the_configuration_and_of_the_call():
    config = make_config(alpha_init=0.8, beta_init=0.4).text_config
    assert initial_log_priors(config) == [math.log(0.4), math.log(0.8)]
    assert fixed_log_priors(config, None) == [math.log(0.4), math.log(0.8)]
    assert fixed_log_priors(config, {"image": 3.0}) == [math.log(0.4), math.log(3) + math.log(0.8)]
    assert fixed_log_priors(config, {"text": 2.0, "image": 1.0}) is None, "equal, all in all"
    learned = make_config(alpha_init=0.8, beta_init=0.4, learned_modality_priors=True).text_config
    assert fixed_log_priors(learned, None) is None, "they are learned"
    assert fixed_log_priors(learned, {"image": 3.0}) == [0.0, math.log(3)]


def test_learned_priors_are_equal_if_every_head_has_one_value():
    equal = torch.tensor([[1.0, 1.0], [-2.0, -2.0]])
    unequal = torch.tensor([[1.0, 1.0], [-2.0, -1.0]])
    assert are_equal([])
    assert are_equal([equal, equal])
    assert not are_equal([equal, unequal])
    learning = equal.clone().requires_grad_()
    assert not are_equal([equal, learning])
    with torch.no_grad():
        assert are_equal([equal, learning])
    assert not are_equal([equal.to("meta")]), "offloaded: their values are not known"


@torch.no_grad()
def test_learned_priors_that_were_changed_without_autograd_are_noticed():
    model, inputs = make_model(learned_modality_priors=True), make_inputs()
    plain = model(**inputs).logits
    model.model.language_model.layers[1].self_attn.modality_log_priors.data[2, 1] = (
        2.0  # this does not change the version of the tensor
    )
    assert not torch.allclose(model(**inputs).logits, plain)
