"""Load of the experts: whole shares, for every arrangement of experts and for inputs that leave things out."""

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.routing_statistics import expert_load
from tests.conftest import make_inputs, make_model

BY_LAYER = [
    {"name": "text", "num_experts": 3, "modalities": ["text"], "layers": [0]},
    {"name": "image", "num_experts": 2, "modalities": ["image"], "layers": [0]},
    {"name": "joint", "num_experts": 3, "layers": [1]},
]


def test_every_slot_is_counted_once(arrangement):
    model, inputs = make_model(expert_groups=arrangement), make_inputs()
    load = expert_load(model, [inputs, make_inputs(seed=1)])
    assert set(load) == {"text", "image"}
    for shares in load.values():
        assert shares.shape == (2, 4)
        torch.testing.assert_close(shares.nansum(dim=1), torch.ones(2))


def test_shares_are_those_of_the_chosen_experts():
    model, inputs = make_model(), make_inputs(batch_size=1)
    logits = model(**inputs, output_router_logits=True).router_logits
    is_image = inputs["mm_token_type_ids"].flatten() == 1
    for layer, shares in enumerate(expert_load(model, [inputs])["image"]):
        chosen = logits[layer][is_image].topk(2).indices.flatten()
        torch.testing.assert_close(shares, torch.bincount(chosen, minlength=4) / len(chosen))


def test_layers_with_other_experts_leave_gaps():
    model = make_model(expert_groups=BY_LAYER, num_experts=None)
    load = expert_load(model, [make_inputs()])
    gaps = {modality: shares.isnan().int().tolist() for modality, shares in load.items()}
    assert gaps == {"text": [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]], "image": [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]}
    for shares in load.values():
        torch.testing.assert_close(shares.nansum(dim=1), torch.ones(2))


def test_dense_models_have_no_load():
    assert expert_load(make_model(mlp_only_layers=[0, 1]), [make_inputs()]) == {}


def test_modalities_without_tokens_have_no_share():
    load = expert_load(make_model(), [make_inputs(images_per_row=0)])
    assert load["image"].tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize(
    "missing", [["attention_mask"], ["mm_token_type_ids"], ["attention_mask", "mm_token_type_ids"]]
)
def test_inputs_may_be_left_out(missing):
    model, inputs = make_model(), make_inputs()
    whole = expert_load(model, [inputs])
    load = expert_load(model, [{name: value for name, value in inputs.items() if name not in missing}])
    for modality, shares in whole.items():
        torch.testing.assert_close(load[modality], shares)


def test_padding_and_labels_do_not_count():
    model, inputs = make_model(), make_inputs()
    padded = {
        name: value if name == "pixel_values" else torch.nn.functional.pad(value, (0, 5))
        for name, value in inputs.items()
    }
    padded["labels"] = padded["input_ids"]
    for modality, shares in expert_load(model, [inputs]).items():
        torch.testing.assert_close(expert_load(model, [padded])[modality], shares)
