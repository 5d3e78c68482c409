"""Inputs of wrong shapes and names are refused, not broadcast, padded or ignored."""

import pytest
import torch
from transformers import BatchFeature, DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM
from modeling_sparse_moe_vlm.cache_name import CACHE_NAME
from modeling_sparse_moe_vlm.input_checks import keep_positions
from tests.support.models import make_inputs, make_model

pytestmark = pytest.mark.newest

B, T = 2, 14


@pytest.fixture(scope="module")
def model():
    return make_model()


def texts() -> dict[str, torch.Tensor]:
    return make_inputs(batch_size=B, length=T, images_per_row=0)


# ------------------------------------------------------------------------------------------------ masks and positions


@pytest.mark.parametrize("shape", [(1, T), (3, T), (B, T - 1), (B, T + 1), (T,), (B, 1, T), (B * T,)])
def test_masks_of_another_shape(model, shape):
    inputs = texts() | {"attention_mask": torch.ones(shape, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"`attention_mask` has shape .* but tokens and cache need \(2, 14\)"):
        model(**inputs)


def test_fewer_rows_of_ids_than_of_the_mask(model):
    inputs = make_inputs(batch_size=B, length=T)
    inputs["input_ids"], inputs["mm_token_type_ids"] = inputs["input_ids"][:1], inputs["mm_token_type_ids"][:1]
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \(2, 14\), .* need \(1, 14\)"):
        model(**inputs)


@pytest.mark.parametrize("shape", [(3, T), (B, T - 1), (1, T + 1), (T,), (3, B, T)])
def test_positions_of_another_shape(model, shape):
    inputs = texts() | {"position_ids": torch.zeros(shape, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"`position_ids` has shape .* tokens of shape \(2, 14\)"):
        model(**inputs)


@torch.no_grad()
def test_positions_for_every_row_or_for_all(model):
    inputs, positions = texts(), torch.arange(T)[None]
    expected = model(**inputs).logits
    for given in (positions, positions.expand(B, T)):
        torch.testing.assert_close(model(**inputs, position_ids=given).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_masks_cover_the_cache(model, static):
    cache = StaticCache(config=model.config.text_config, max_cache_len=20) if static else DynamicCache()
    inputs = texts()
    expected = model(**inputs).logits[:, 9:]
    model(input_ids=inputs["input_ids"][:, :9], use_cache=True, **{CACHE_NAME: cache})
    rest = {"input_ids": inputs["input_ids"][:, 9:], CACHE_NAME: cache}
    with pytest.raises(ValueError, match=r"`attention_mask` has shape \(2, 4\)"):
        model(**rest, attention_mask=torch.ones(B, 4))
    if not static:  # the length is a tensor on the device
        for length in (5, 13, 15):
            with pytest.raises(ValueError, match=rf"`attention_mask` has shape \(2, {length}\), .* need \(2, 14\)"):
                model(**rest, attention_mask=torch.ones(B, length))
    torch.testing.assert_close(
        model(**rest, attention_mask=inputs["attention_mask"]).logits, expected, atol=2e-5, rtol=1e-4
    )


# ------------------------------------------------------------------------------------------------ encoded inputs


@torch.no_grad()
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("images", "features", "has the key 'images', but the only one that the model reads is 'image'"),
        ("video", None, "has the key 'video'"),
        ("image", None, r"`mm_encoder_outputs\['image'\]` must be what `get_image_features` returns.*NoneType"),
        ("image", torch.ones(2, 4, 32), r"`mm_encoder_outputs\['image'\]` must be .*got Tensor"),
        ("image", BaseModelOutputWithPooling(), r"`mm_encoder_outputs\['image'\]` must be .*with a `pooler_output`"),
    ],
)
def test_encoded_inputs_that_the_model_would_ignore(model, key, value, message):
    inputs = make_inputs()
    features = model.get_image_features(inputs.pop("pixel_values"))
    value = features if isinstance(value, str) else value
    with pytest.raises(ValueError, match=message):
        model(**inputs, mm_encoder_outputs={key: value})
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, mm_encoder_outputs={"image": features, key: value}, max_new_tokens=1)


@torch.no_grad()
def test_encoded_inputs_of_another_type(model):
    inputs = make_inputs()
    features = model.get_image_features(inputs.pop("pixel_values"))
    with pytest.raises(ValueError, match="`mm_encoder_outputs` must be a dict, got list"):
        model(**inputs, mm_encoder_outputs=[features])
    expected = model(**inputs, mm_encoder_outputs={"image": features}).logits
    torch.testing.assert_close(model(**inputs, mm_encoder_outputs=BatchFeature({"image": features})).logits, expected)


def test_values_without_an_encoder(model):
    with pytest.raises(ValueError, match=r"`modality_values` has 'audio', but there are encoders for \[\] only"):
        model(**make_inputs(), modality_values={"audio": torch.ones(1, 4)})


# ------------------------------------------------------------------------------------------------ head


@torch.no_grad()
def test_logits_to_keep(model):
    inputs = texts()
    whole = model(**inputs).logits
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 3] = mask[1, 5] = mask[1, 0] = True
    by_row = torch.tensor([[2, 4], [0, 13]])
    cases = [
        (0, whole),
        (1, whole[:, 13:]),
        (3, whole[:, 11:]),
        (T, whole),
        (99, whole),
        (torch.tensor([1, 5]), whole[:, [1, 5]]),
        (by_row, torch.stack([whole[0, [2, 4]], whole[1, [0, 13]]])),
        (mask, whole[[0, 1, 1], [3, 0, 5]]),
    ]
    for kept, expected in cases:
        torch.testing.assert_close(model(**inputs, logits_to_keep=kept).logits, expected)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (-1, "got -1"),
        (True, "got True"),
        (1.0, "got 1.0"),
        (None, "got None"),
        ([1, 2], r"got \[1, 2\]"),
        (torch.tensor(1), r"got a tensor of shape \(\) and type torch.int64"),
        (torch.tensor([1.0]), r"got a tensor of shape \(1,\) and type torch.float32"),
        (torch.ones(3, 2, dtype=torch.long), r"shape \(3, 2\)"),
        (torch.ones(T, dtype=torch.bool), r"shape \(14,\) and type torch.bool"),
        (torch.ones(B, T - 1, dtype=torch.bool), r"shape \(2, 13\)"),
    ],
)
def test_invalid_logits_to_keep(kept, message):
    with pytest.raises(ValueError, match=f"`logits_to_keep` must be .*{message}"):
        keep_positions(torch.zeros(B, T, 3), kept)


@pytest.mark.parametrize("shape", [(1, T), (B, T - 1), (B, T, 1), (B * T,)])
def test_labels_of_another_shape(model, shape):
    with pytest.raises(ValueError, match=r"`labels` has shape .* logits for tokens of shape \(2, 14\)"):
        model(**texts(), labels=torch.ones(shape, dtype=torch.long))


def test_labels_with_logits_to_keep(model):
    inputs = texts()
    labels = inputs["input_ids"]
    with pytest.raises(ValueError, match=r"`labels` has shape \(2, 14\), but there are logits .* \(2, 3\)"):
        model(**inputs, labels=labels, logits_to_keep=3)
    logits = model(**inputs).logits[:, 11:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 12:].flatten())
    torch.testing.assert_close(model(**inputs, labels=labels[:, 11:], logits_to_keep=3).loss, expected)


# ------------------------------------------------------------------------------------------------ language models


@pytest.mark.parametrize("name", ["pixel_values", "mm_encoder_outputs", "modality_values"])
@pytest.mark.parametrize("has_head", [True, False])
def test_language_models_accept_only_tokens(model, name, has_head):
    language_model = SparseMoeVlmForCausalLM(model.config.text_config) if has_head else model.model.language_model
    value = {"image": torch.zeros(1)} if name != "pixel_values" else torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=rf"a language model takes tokens only, but got `{name}`"):
        language_model(**texts(), **{name: value})
    assert language_model(**texts(), **{name: None})[0].shape[:2] == (B, T)
