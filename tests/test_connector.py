"""The connector equals a loop over the squares of patches that it merges."""

import pytest
import torch

from modeling_sparse_moe_vlm.connector import SparseMoeVlmMultiModalProjector
from tests.support.models import TEXT_CONFIG, VISION_CONFIG, make_config


def make_connector(factor: int = 2, **kwargs) -> SparseMoeVlmMultiModalProjector:
    config = make_config()
    config = type(config)(text_config=TEXT_CONFIG, vision_config=VISION_CONFIG, pixel_shuffle_factor=factor, **kwargs)
    torch.manual_seed(0)
    return SparseMoeVlmMultiModalProjector(config)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_merges_squares_of_patches_row_by_row(factor):
    connector = make_connector(factor)
    patches = torch.randn(2, 4, 4, 16)  # a grid of 4 × 4
    tokens = connector(patches.flatten(1, 2))
    small = 4 // factor
    assert tokens.shape == (2, small * small, 32)
    for image in range(2):
        for row in range(small):
            for column in range(small):
                square = [
                    patches[image, row * factor + dy, column * factor + dx]
                    for dy in range(factor)
                    for dx in range(factor)
                ]
                hidden = torch.nn.functional.gelu(connector.linear_1(torch.cat(square)))
                torch.testing.assert_close(tokens[image, row * small + column], connector.linear_2(hidden))


def test_every_patch_reaches_exactly_one_token():
    connector = make_connector(2)
    patches = torch.randn(1, 16, 16, requires_grad=True)
    tokens = connector(patches)
    reached = torch.stack(
        [torch.autograd.grad(tokens[0, token].sum(), patches, retain_graph=True)[0][0].any(-1) for token in range(4)]
    )
    assert (reached.sum(dim=0) == 1).all()
    assert (reached.sum(dim=1) == 4).all()


def test_features_may_be_a_slice_without_class_and_register_tokens():
    connector = make_connector(2)
    features = torch.randn(3, 21, 16)
    torch.testing.assert_close(connector(features[:, 5:]), connector(features[:, 5:].clone()))


def test_options():
    assert make_connector(multimodal_projector_bias=False).linear_1.bias is None
    assert make_connector(multimodal_projector_bias=False).linear_2.bias is None
    relu = make_connector(projector_hidden_act="relu")
    x = torch.randn(1, 16, 16)
    assert not torch.allclose(relu(x), make_connector()(x))
