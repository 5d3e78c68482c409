"""Conventions of Transformers for model classes: the same arguments, outputs and base classes as its own models."""

import inspect
import warnings

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, logging
from transformers.generation import GenerationMixin
from transformers.models.llava import modeling_llava
from transformers.processing_utils import Unpack
from transformers.testing_utils import CaptureLogger
from transformers.utils import TransformersKwargs

from modeling_sparse_moe_vlm import (
    SparseMoeVlmForCausalLM,
    SparseMoeVlmForConditionalGeneration,
    SparseMoeVlmModel,
    SparseMoeVlmTextConfig,
    SparseMoeVlmTextModel,
    outputs,
)
from modeling_sparse_moe_vlm.cache_name import CACHE_NAME
from tests.support.in_tree_models import TEXT, make_llava
from tests.support.models import TEXT_CONFIG, make_inputs, make_model

MODELS = [SparseMoeVlmTextModel, SparseMoeVlmForCausalLM, SparseMoeVlmModel, SparseMoeVlmForConditionalGeneration]
RENAMED = CACHE_NAME != "past_key_values"
# The library's outputs have `image_outputs`, and `image_hidden_states` is deprecated.
HAS_IMAGE_OUTPUTS = "image_hidden_states" not in modeling_llava.LlavaCausalLMOutputWithPast.__dataclass_fields__


def make_models() -> dict[str, torch.nn.Module]:
    whole = make_model()
    text = SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG)).eval()
    return {"text model": text.model, "text head": text, "model": whole.model, "head": whole}


# ------------------------------------------------------------------------------------------------ name of the cache


@pytest.mark.skipif(not RENAMED, reason="the release has one name")
@pytest.mark.parametrize("name", make_models())
def test_the_old_name_of_the_cache_is_deprecated_as_in_transformers(name):
    model, tokens = make_models()[name], torch.tensor([[5, 6]])
    llama = LlamaForCausalLM(LlamaConfig(**TEXT))
    with pytest.warns(FutureWarning) as expected:
        llama(tokens, past_key_values=DynamicCache())
    with pytest.warns(FutureWarning) as record:
        model(tokens, past_key_values=DynamicCache())
    messages = [str(warning.message) for warning in record]
    assert messages == [str(expected[0].message).replace("LlamaForCausalLM", type(model).__name__)]


@torch.no_grad()
@pytest.mark.parametrize("name", make_models())
def test_the_new_name_of_the_cache_does_not_warn(name):
    model, tokens = make_models()[name], torch.tensor([[5, 6]])
    cache = DynamicCache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model(tokens, **{CACHE_NAME: cache})
    assert output[CACHE_NAME] is cache
    assert cache.get_seq_length() == 2


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_generating_does_not_warn(options):
    model = make_model()
    inputs = make_inputs()
    with warnings.catch_warnings(), CaptureLogger(logging.get_logger("transformers")) as log:
        warnings.simplefilter("error")
        model.generate(**inputs, max_new_tokens=3, do_sample=False, **options)
    assert "deprecated" not in log.out


def test_training_does_not_warn():
    model, inputs = make_model().train(), make_inputs()
    with warnings.catch_warnings(), CaptureLogger(logging.get_logger("transformers")) as log:
        warnings.simplefilter("error")
        model(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss.backward()
    assert "deprecated" not in log.out


# ------------------------------------------------------------------------------------------------ outputs


@torch.no_grad()
@pytest.mark.parametrize("head", [True, False])
def test_image_outputs_are_the_vision_towers(head):
    model, inputs = make_model(), make_inputs(batch_size=3)
    output = (model if head else model.model)(**inputs, output_hidden_states=True)
    expected = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    tokens = model.model.multi_modal_projector(expected.last_hidden_state)
    image_outputs = output.image_outputs
    torch.testing.assert_close(image_outputs.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(image_outputs.pooler_output, list(tokens))
    torch.testing.assert_close(image_outputs.hidden_states, expected.hidden_states)
    assert image_outputs.attentions is None
    torch.testing.assert_close(output.image_hidden_states, tokens.flatten(0, 1))


@torch.no_grad()
def test_given_image_outputs_are_returned():
    model, inputs = make_model(), make_inputs()
    encoded = model.get_image_features(inputs.pop("pixel_values"))
    assert model(**inputs, mm_encoder_outputs={"image": encoded}).image_outputs is encoded


@torch.no_grad()
def test_no_image_outputs_without_images():
    output = make_model()(**make_inputs(images_per_row=0))
    assert output.image_outputs is None
    assert output.image_hidden_states is None
    assert "image_outputs" not in output


@torch.no_grad()
def test_image_hidden_states_are_a_field_or_deprecated_as_in_llava():
    llava, model, inputs = make_llava().eval(), make_model(), make_inputs()
    log = CaptureLogger(logging.get_logger("modeling_sparse_moe_vlm.outputs"))
    library_log = CaptureLogger(logging.get_logger("transformers.models.llava.modeling_llava"))
    llava_output, output = llava(**{k: v for k, v in inputs.items() if k != "mm_token_type_ids"}), model(**inputs)
    assert ("image_hidden_states" in output) == ("image_hidden_states" in llava_output) == (not HAS_IMAGE_OUTPUTS)
    with log, library_log:
        assert llava_output.image_hidden_states is not None
        assert output.image_hidden_states is not None
    assert log.out == library_log.out
    assert ("deprecated" in log.out) == HAS_IMAGE_OUTPUTS


@torch.no_grad()
def test_image_hidden_states_are_those_of_all_layers_in_later_releases(monkeypatch):
    output = make_model()(**make_inputs(), output_hidden_states=True)
    monkeypatch.setattr(outputs, "_MEANS_ALL_LAYERS", True)
    if HAS_IMAGE_OUTPUTS:
        assert output.image_hidden_states is output.image_outputs.hidden_states


@torch.no_grad()
def test_tuples_contain_the_output_of_the_vision_tower_as_a_tuple():
    model, inputs = make_model(), make_inputs()
    output = model(**inputs)
    as_tuple = model(**inputs, return_dict=False)
    place = list(output.keys()).index("image_outputs")
    torch.testing.assert_close(as_tuple[place], output.image_outputs.to_tuple())
    torch.testing.assert_close(as_tuple[0], output.logits)


# ------------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize("head", [SparseMoeVlmForCausalLM, SparseMoeVlmForConditionalGeneration])
def test_generation_is_a_direct_base(head):
    assert GenerationMixin in head.__bases__
    assert head.can_generate()


@pytest.mark.parametrize("model", MODELS)
def test_keyword_arguments_are_annotated(model):
    assert inspect.signature(model.forward).parameters["kwargs"].annotation == Unpack[TransformersKwargs]
    if hasattr(model, "get_image_features"):
        features = inspect.signature(model.get_image_features).parameters["kwargs"]
        assert features.annotation == Unpack[TransformersKwargs]
