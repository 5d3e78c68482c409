"""Norms are recognised by their formula: their scale, their epsilon, and whether they subtract the mean."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from modeling_sparse_moe_vlm.toolbox.upcycling.norms import Norm, read_norm

WIDTH = 6
WEIGHT = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.5, 3.0])


class Shifted(LlamaRMSNorm):
    """Its epsilon is outside the root."""

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Clipped(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x).clamp(-3, 3)


def with_weight(norm: nn.Module) -> nn.Module:
    norm.weight = nn.Parameter(WEIGHT.clone())
    return norm


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-3])
def test_an_rms_norm_keeps_its_own_weight(eps):
    module = with_weight(LlamaRMSNorm(WIDTH, eps=eps)).bfloat16()
    norm = read_norm("n", module, WIDTH)
    assert norm[1:] == (eps, False, False)
    assert norm.weight.data_ptr() == module.weight.data_ptr()
    assert not norm.weight.requires_grad
    assert module.weight.dtype == torch.bfloat16


def test_a_norm_of_gemma_scales_by_one_plus_its_weight():
    norm = read_norm("n", with_weight(GemmaRMSNorm(WIDTH, eps=1e-4)), WIDTH)
    assert norm[1:] == (1e-4, False, True)
    assert torch.equal(norm.weight, 1.0 + WEIGHT)


def test_layer_norms_without_a_bias():
    norm = read_norm("n", with_weight(nn.LayerNorm(WIDTH, eps=1e-4, bias=False)), WIDTH)
    assert norm[1:] == (1e-4, True, False)
    assert torch.equal(norm.weight, WEIGHT)
    plain = read_norm("n", OlmoLayerNorm(WIDTH), WIDTH)
    assert plain[1:] == (1e-5, True, False)
    assert torch.equal(plain.weight, torch.ones(WIDTH))


class Hidden(nn.Module):
    """Has no attribute for its epsilon."""

    def __init__(self, eps: float):
        super().__init__()
        self.options = {"eps": eps}

    def forward(self, x):
        return nn.functional.layer_norm(x, (WIDTH,), **self.options)


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-8])
def test_an_epsilon_without_an_attribute_is_found(eps):
    assert read_norm("n", Hidden(eps), WIDTH)[1:] == (eps, True, False)


@pytest.mark.parametrize("is_centred", [False, True])
def test_norms_equal_the_literal_formula(is_centred):
    x = torch.tensor([[1.0, 2.0, 3.0, -4.0, 0.5, 0.1]])
    centred = x - x.sum() / 6 if is_centred else x
    expected = WEIGHT * centred / ((centred * centred).sum() / 6 + 0.01).sqrt()
    torch.testing.assert_close(Norm(WEIGHT, 0.01, is_centred, False)(x), expected)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.LayerNorm(WIDTH), r"`n` \(LayerNorm\) has parameters that .* do not have: \['bias'\]"),
        (LlamaRMSNorm(12), r"`n` \(LlamaRMSNorm\) has a weight of the shape \(12,\), .* a norm of 6 features"),
        (Shifted(WIDTH, eps=1e-2), r"`n` \(Shifted\) is neither an RMS norm nor a LayerNorm without a bias"),
        (Clipped(WIDTH), "neither"),
        (nn.SiLU(), "neither"),
    ],
)
def test_others_are_refused(module, message):
    if isinstance(module, Clipped):
        module.weight.data *= 4
    with pytest.raises(UpcyclingError, match=message):
        read_norm("n", module, WIDTH)
