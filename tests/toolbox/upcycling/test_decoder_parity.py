"""The comparison of our decoder with a dense one: what passes, what is named, and that the models do not change."""

import pytest
import torch
from torch import nn

from modeling_sparse_moe_vlm.toolbox.upcycling import decoder_parity
from modeling_sparse_moe_vlm.toolbox.upcycling.decoder_parity import check_decoder, difference, in_type
from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from modeling_sparse_moe_vlm.toolbox.upcycling.from_parts import upcycle_from_parts
from tests.toolbox.upcycling.test_from_parts import make_dense


def states(*values: float) -> decoder_parity._States:
    """Returns the states of two tokens by layer and in the logits: 2 for the first, given values for the second."""
    tensors = [torch.tensor([[[2.0, 2.0], [value, 1.0]]]) for value in values]
    return decoder_parity._States(tensors[:-1], tensors[-1])


def compare(other, expected, actual, floor: float = 1e-3, is_centred: bool = False) -> float:
    return decoder_parity._compare(make_dense(), ["text"], other, expected, actual, floor, is_centred)


def test_differences_are_relative_to_the_largest_value():
    assert difference(torch.tensor([1.0, -8.0]), torch.tensor([2.0, -8.0])) == 0.125
    assert difference(torch.tensor([0.0]), torch.tensor([0.0])) == 0
    assert difference(torch.tensor([1e-3, 1.0], dtype=torch.bfloat16), torch.tensor([0.0, 1.0])) == pytest.approx(
        1e-3, 1e-2
    )
    assert not difference(torch.tensor([torch.nan]), torch.tensor([1.0])) <= 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_bound_is_the_floor_or_four_times_the_dense_models_own_rounding(place):
    names = ["in the embedded tokens", "after layer 0", "in the logits, after the same hidden states"]
    expected = states(1.0, 1.0, 1.0)

    def at_place(value: float):
        return states(*(value if index == place else 1.0 for index in range(3)))

    assert compare(expected, expected, at_place(1.0019)) == 1e-3
    with pytest.raises(UpcyclingError, match=rf"{names[place]}, for .* 'text': .* is 1.1e-03, .* most 1.0e-03"):
        compare(expected, expected, at_place(1.0022))
    rounded = at_place(1.001)
    bound = compare(rounded, expected, at_place(1.0039))
    assert bound == pytest.approx(2e-3 if place == 2 else 1e-3, rel=1e-3)
    with pytest.raises(UpcyclingError, match=rf"{names[place]}, for .* 'text': .* is 2.1e-03, .* most 2.0e-03"):
        compare(rounded, expected, at_place(1.0042))
    with pytest.raises(UpcyclingError, match=rf"{names[place]}, .* is nan"):
        compare(rounded, expected, at_place(torch.nan))


def test_centred_streams_are_compared_with_dense_ones_minus_their_mean():
    expected, centred = states(1.5, 1.0), states(1.5, 1.0)
    centred.hidden_states[0] -= centred.hidden_states[0].mean(dim=-1, keepdim=True)
    compare(expected, expected, centred, is_centred=True)
    with pytest.raises(UpcyclingError, match="in the embedded tokens"):
        compare(expected, expected, centred)
    with pytest.raises(UpcyclingError, match="in the embedded tokens"):
        compare(expected, expected, expected, is_centred=True)


def test_a_dtype_for_the_duration_of_a_context():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, dtype=torch.float64)
    exact = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).double()
    exact.load_state_dict(model.state_dict())
    seen = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(model[0].weight.dtype))
    with in_type(model, torch.float64):
        assert torch.equal(model(x), exact(x))
    assert seen == [torch.bfloat16]  # one module at a time
    with pytest.raises(RuntimeError), in_type(model, torch.float64):
        model(torch.randn(2, 4))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])
    assert not any(module._forward_hooks for module in model)


def test_a_tied_weight_is_restored():
    dense = make_dense("llama, tied", torch.bfloat16)
    model = upcycle_from_parts(dense)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)


def test_equal_models_pass_and_a_rounded_weight_only_if_rounding_is_expected():
    dense = make_dense(dtype=torch.bfloat16)
    model = upcycle_from_parts(dense)
    layers = list(dense.model.layers)
    assert check_decoder(dense, layers, model).max_difference <= 1e-5
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3] *= 1 + 2**-7
    with pytest.raises(UpcyclingError, match="after layer 1"):
        check_decoder(dense, layers, model)
    receipt = check_decoder(dense, layers, model, is_rounded=True)
    assert 1e-5 < receipt.relative_difference < receipt.bound < 0.1
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3] *= 2
    with pytest.raises(UpcyclingError, match="after layer 1"):
        check_decoder(dense, layers, model, is_rounded=True)


def test_the_receipt_has_the_difference_of_the_logits():
    expected = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
    actual = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[3.0, 0.0], [5.0, 4.0]]])
    receipt = decoder_parity._receipt(actual, expected, 0.25, torch.bfloat16)
    assert receipt.relative_difference == pytest.approx(5 / 50**0.5)
    assert (receipt.max_difference, receipt.same_tokens, receipt.bound) == (5.0, 0.75, 0.25)
    assert (receipt.dtype, receipt.num_tokens, receipt.batch) == ("bfloat16", 4, "made")
