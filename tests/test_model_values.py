"""Values that the parts of the model pass to each other: image tokens, their positions, and inputs of generation."""

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_layers import GenericForSequenceClassification

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration, SparseMoeVlmPreTrainedModel
from modeling_sparse_moe_vlm.cache_name import CACHE_NAME
from tests.support.models import IMAGE_TOKEN_ID, TINY_TOWER, VISION_CONFIG, make_config, make_inputs, make_model


def embeddings_of(model, **inputs) -> torch.Tensor:
    """Returns the embeddings that the decoder receives."""
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return seen[0]


# ------------------------------------------------------------------------------------------------ image tokens


@torch.no_grad()
@pytest.mark.parametrize(("kind", "num_prefix_tokens"), [("clip_vision_model", 1), ("dinov2_with_registers", 5)])
def test_image_features_are_the_patches_of_the_tower_through_the_connector(kind, num_prefix_tokens):
    torch.manual_seed(0)
    model = SparseMoeVlmForConditionalGeneration(make_config(vision_config=TINY_TOWER | {"model_type": kind})).eval()
    pixels = make_inputs()["pixel_values"]
    states = model.model.vision_tower(pixels).last_hidden_state
    assert states.shape[1] == num_prefix_tokens + 16
    output = model.get_image_features(pixels, output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, states)
    torch.testing.assert_close(
        output.pooler_output, list(model.model.multi_modal_projector(states[:, num_prefix_tokens:]))
    )
    assert len(output.hidden_states) == 2  # of one layer
    as_tuple = model.get_image_features(pixels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], states)
    torch.testing.assert_close(as_tuple[1], output.pooler_output)


@torch.no_grad()
def test_no_images_have_no_features():
    output = make_model().get_image_features(torch.zeros(0, 3, 16, 16))
    assert output.pooler_output == []
    assert output.last_hidden_state is None


@torch.no_grad()
@pytest.mark.parametrize("encoded", [False, True])
def test_image_features_are_in_the_order_of_the_images_row_by_row(encoded):
    """Rows have two, no and one image. There is text between the images of a row."""
    model = make_model()
    inputs = make_inputs(batch_size=3, images_per_row=0)
    places = torch.zeros(3, 14, dtype=torch.bool)
    places[0, 1:5] = places[0, 8:12] = places[2, 10:14] = True
    inputs["input_ids"][places] = IMAGE_TOKEN_ID
    inputs["mm_token_type_ids"] = places.long()
    pixels = make_inputs(batch_size=3)["pixel_values"]
    features = model.get_image_features(pixels)
    given = {"mm_encoder_outputs": {"image": features}} if encoded else {"pixel_values": pixels}
    embeddings = embeddings_of(model, **inputs, **given)
    expected = model.get_input_embeddings()(inputs["input_ids"])
    expected[0, 1:5], expected[0, 8:12], expected[2, 10:14] = features.pooler_output
    torch.testing.assert_close(embeddings, expected)


def test_image_features_get_the_dtype_of_the_tokens():
    model = make_model()
    inputs = make_inputs()
    features = model.get_image_features(inputs.pop("pixel_values"))
    features.pooler_output = [one.double() for one in features.pooler_output]
    assert embeddings_of(model, **inputs, mm_encoder_outputs={"image": features}).dtype == torch.float32


# ------------------------------------------------------------------------------------------------ several processes


@pytest.fixture
def several_processes(monkeypatch):
    for module in ("modeling_sparse_moe_vlm", "visual_features"):
        monkeypatch.setattr(f"modeling_sparse_moe_vlm.{module}.is_one_of_several_processes", lambda: True)


def make_model_with_pooling() -> SparseMoeVlmForConditionalGeneration:
    torch.manual_seed(0)
    config = make_config(vision_config=VISION_CONFIG | {"vision_use_head": True})
    return SparseMoeVlmForConditionalGeneration(config).eval()


def without_gradient(model, inputs) -> set[str]:
    """Returns the modules for images in which a parameter has no gradient."""
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    names = {name for name, parameter in model.model.named_parameters() if parameter.grad is None}
    return {name.split(".")[0] for name in names if not name.startswith("language_model")}


@pytest.mark.usefixtures("several_processes")
def test_texts_run_the_vision_tower_if_other_processes_may_have_images():
    model, texts = make_model_with_pooling(), make_inputs(images_per_row=0)
    with torch.no_grad():
        expected = model(**texts).logits
    runs = []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    model(**texts)  # not in training
    with torch.no_grad():
        model.train()(**texts)  # without gradients
    assert not runs
    torch.testing.assert_close(model(**texts).logits, expected)
    assert len(runs) == 1
    assert without_gradient(model, texts) == set()
    for name, parameter in model.model.named_parameters():
        if name.startswith(("vision_tower", "multi_modal_projector")):
            assert not parameter.grad.any(), name


@pytest.mark.usefixtures("several_processes")
def test_the_unused_head_of_the_tower_gets_a_gradient_of_zero():
    model, inputs = make_model_with_pooling(), make_inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(model.train()(**inputs).logits, expected)
    assert without_gradient(model, inputs) == set()
    heads = [p for name, p in model.model.vision_tower.named_parameters() if ".head." in name or "head." in name[:5]]
    assert heads
    assert not any(parameter.grad.any() for parameter in heads)


def test_one_process_runs_only_what_it_needs():
    model = make_model_with_pooling().train()
    assert without_gradient(model, make_inputs(images_per_row=0)) == {"vision_tower", "multi_modal_projector"}
    assert without_gradient(model, make_inputs()) == {"vision_tower"}  # its head


# ------------------------------------------------------------------------------------------------ generation's inputs


def test_inputs_of_the_first_step():
    model, inputs = make_model(), make_inputs()
    prepared = model.prepare_inputs_for_generation(**inputs, use_cache=True, is_first_iteration=True)
    assert torch.equal(prepared["input_ids"], inputs["input_ids"])
    assert torch.equal(prepared["mm_token_type_ids"], inputs["mm_token_type_ids"])
    assert torch.equal(prepared["pixel_values"], inputs["pixel_values"])
    assert "mm_encoder_outputs" not in prepared
    assert "output_modality_weights" not in prepared


@torch.no_grad()
def test_candidates_of_assisted_decoding_are_text():
    """Three tokens follow the prompt, one accepted and two candidates. Only tokens that are not cached are passed."""
    model, inputs = make_model(), make_inputs()
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, use_cache=True, **{CACHE_NAME: cache})
    longer = torch.cat([inputs["input_ids"], torch.tensor([[5, 6, 7], [8, 9, 10]])], dim=1)
    prepared = model.prepare_inputs_for_generation(
        longer,
        mm_token_type_ids=inputs["mm_token_type_ids"],
        attention_mask=torch.ones_like(longer),
        use_cache=True,
        is_first_iteration=False,
        next_sequence_length=3,
        **{CACHE_NAME: cache},
    )
    assert torch.equal(prepared["input_ids"], longer[:, 14:])
    assert torch.equal(prepared["mm_token_type_ids"], torch.zeros(2, 3, dtype=torch.long))
    assert prepared["mm_encoder_outputs"] == {}
    assert prepared.get("pixel_values") is None


def test_modality_ids_of_candidates_before_anything_is_cached():
    model, inputs = make_model(), make_inputs(batch_size=1, length=8)
    longer = torch.cat([inputs["input_ids"], torch.tensor([[5, 6]])], dim=1)
    prepared = model.prepare_inputs_for_generation(
        longer,
        mm_token_type_ids=inputs["mm_token_type_ids"],
        pixel_values=inputs["pixel_values"],
        is_first_iteration=True,
    )
    assert prepared["mm_token_type_ids"].tolist() == [[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]]


@torch.no_grad()
def test_arguments_of_generation_reach_every_pass():
    model, inputs = make_model(), make_inputs()
    passes = []
    model.register_forward_pre_hook(lambda _, args, kwargs: passes.append(dict(kwargs)), with_kwargs=True)
    steering = {"modality_priors": {"image": 3.0}, "modality_guidance": 0.5}
    model.generate(**inputs, **steering, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert len(passes) == 3
    for number, kwargs in enumerate(passes):
        assert {name: kwargs[name] for name in steering} == steering
        assert kwargs["input_ids"].shape == (2, 14 if number == 0 else 1)
        assert kwargs["mm_token_type_ids"].shape == kwargs["input_ids"].shape
        assert kwargs["logits_to_keep"] == 1


# ------------------------------------------------------------------------------------------------ classification


class SparseMoeVlmForSequenceClassification(GenericForSequenceClassification, SparseMoeVlmPreTrainedModel):
    """The classifier of the documentation."""


def test_a_classifier_from_a_mixin_of_transformers(tmp_path):
    model, inputs = make_model(), make_inputs()
    model.save_pretrained(tmp_path / "model")
    scorer = SparseMoeVlmForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1).eval()
    with torch.no_grad():
        scores = scorer(**inputs).logits
        torch.testing.assert_close(scores, scorer.score(model.model(**inputs).last_hidden_state[:, -1]))
        scorer.save_pretrained(tmp_path / "scorer")
        again = SparseMoeVlmForSequenceClassification.from_pretrained(tmp_path / "scorer").eval()
        torch.testing.assert_close(again(**inputs).logits, scores)
    targets = torch.tensor([[0.0], [1.0]])
    loss = scorer(**inputs, labels=targets).loss
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(scores, targets))
    loss.backward()
    assert scorer.model.vision_tower.embeddings.patch_embedding.weight.grad.any()
