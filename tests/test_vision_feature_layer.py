"""The model reads the hidden states of the chosen layer of the vision tower."""

import pytest
import torch

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmModel
from tests.support.models import IMAGE_TOKEN_ID, TEXT_CONFIG, TINY_TOWER, VISION_CONFIG

TOWERS = {
    "siglip": VISION_CONFIG,
    "clip": TINY_TOWER | {"model_type": "clip_vision_model"},
    "dinov2": TINY_TOWER | {"model_type": "dinov2"},
    "vit": TINY_TOWER | {"model_type": "vit"},
}


def make_config(tower: str = "clip", **fields) -> SparseMoeVlmConfig:
    vision = TOWERS[tower] | {"num_hidden_layers": 3}
    return SparseMoeVlmConfig(text_config=TEXT_CONFIG, vision_config=vision, image_token_id=IMAGE_TOKEN_ID, **fields)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layer", [None, -2, 1, 0])
def test_features_are_those_of_the_layer(tower, layer):
    torch.manual_seed(0)
    model = SparseMoeVlmModel(make_config(tower, vision_feature_layer=layer)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        actual = torch.stack(model.get_image_features(pixels).pooler_output)
        outputs = model.vision_tower(pixels, output_hidden_states=True, return_dict=True)
        hidden = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
        assert len(outputs.hidden_states) == 4
        expected = model.multi_modal_projector(hidden[:, -16:])
    torch.testing.assert_close(actual, expected)


def test_invalid_layers():
    for layer, message in (
        (4, "`vision_feature_layer` is 4, but `vision_config` has 3 layers"),
        (-5, "`vision_feature_layer` must be an integer of at least -4, got -5"),
        (True, "`vision_feature_layer` must be an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(vision_feature_layer=layer)
    assert make_config(vision_feature_layer=3).vision_feature_layer == 3
    assert make_config(vision_feature_layer=-4).vision_feature_layer == -4
    assert make_config().vision_feature_layer is None


def test_a_tower_without_hidden_states(monkeypatch):
    model = SparseMoeVlmModel(make_config("siglip", vision_feature_layer=-2))
    forward = model.vision_tower.forward

    def without(*args, output_hidden_states=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.vision_tower, "forward", without)
    with pytest.raises(ValueError, match=r"siglip_vision_model. does not return .* leave out `vision_feature_layer`"):
        model.get_image_features(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("layer", [None, 1])
def test_processes_have_gradients_of_all_weights(layer, monkeypatch):
    """Data parallelism waits for those of later layers and of the pooled output. Their gradients are zero."""
    torch.manual_seed(0)
    model = SparseMoeVlmModel(make_config("clip", vision_feature_layer=layer)).train()
    pixels = torch.randn(2, 3, 16, 16)
    expected = torch.stack(model.get_image_features(pixels).pooler_output)
    monkeypatch.setattr("modeling_sparse_moe_vlm.visual_features.is_one_of_several_processes", lambda: True)
    actual = torch.stack(model.get_image_features(pixels).pooler_output)
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    grads = {name: parameter.grad for name, parameter in model.vision_tower.named_parameters()}
    unused = ["post_layernorm.weight", *(["encoder.layers.2.mlp.fc1.weight"] if layer == 1 else [])]
    assert [name for name, grad in grads.items() if grad is None] == []
    assert all(grads[name].abs().max() == 0 for name in unused)
    assert grads["encoder.layers.0.mlp.fc1.weight"].abs().max() > 0
