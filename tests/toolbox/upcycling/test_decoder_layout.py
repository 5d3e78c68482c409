"""Decoders with an unusual layout: those that our decoder can represent, and those that it cannot."""

import pytest
import torch
from torch import nn

from modeling_sparse_moe_vlm.toolbox.upcycling.decoder_layout import read_decoder
from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from modeling_sparse_moe_vlm.toolbox.upcycling.from_parts import upcycle_from_parts
from tests.toolbox.upcycling.test_from_parts import assert_same_logits, make_dense


def with_linear(old: nn.Linear, bias: bool) -> nn.Linear:
    """Returns a linear layer of the same shape with other weights."""
    torch.manual_seed(old.out_features)
    linear = nn.Linear(old.in_features, old.out_features, bias=bias)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, std=0.3)
    return linear


def layer_norm(eps: float = 1e-5) -> nn.LayerNorm:
    norm = nn.LayerNorm(32, eps=eps, bias=False)
    nn.init.normal_(norm.weight, mean=0.8, std=0.3)
    return norm


def narrow(layer: nn.Module, width: int) -> None:
    """Cuts the feed-forward block of a layer to a width."""
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
        linear.weight = nn.Parameter(linear.weight[:width].clone())
        linear.out_features = width
    layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight[:, :width].clone())
    layer.mlp.down_proj.in_features = width


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_biases_of_some_projections_are_zero_in_the_others(name):
    dense = make_dense()
    for layer in dense.model.layers:
        setattr(layer.self_attn, name, with_linear(getattr(layer.self_attn, name), bias=True))
    model = upcycle_from_parts(dense)
    assert (model.config.attention_bias, model.config.attention_out_bias) == (True, False)
    for other in {"q_proj", "k_proj", "v_proj"} - {name}:
        assert not getattr(model.model.layers[1].self_attn, other).bias.any()
    assert_same_logits(model, dense)


def test_only_the_output_has_a_bias():
    dense = make_dense("granite, scaled")
    for layer in dense.model.layers:
        layer.self_attn.o_proj = with_linear(layer.self_attn.o_proj, bias=True)
    model = upcycle_from_parts(dense)
    assert (model.config.attention_bias, model.config.attention_out_bias) == (False, True)
    assert_same_logits(model, dense)


def test_fused_projections_with_biases():
    dense = make_dense("phi3, fused")
    for layer in dense.model.layers:
        layer.self_attn.qkv_proj = with_linear(layer.self_attn.qkv_proj, bias=True)
    model = upcycle_from_parts(dense)
    weight, attention = dense.model.layers[1].self_attn.qkv_proj.weight, model.model.layers[1].self_attn
    assert torch.equal(attention.q_proj.weight, weight[:32])
    assert torch.equal(attention.k_proj.weight, weight[32:48])
    assert torch.equal(attention.v_proj.weight, weight[48:])
    assert_same_logits(model, dense)


@pytest.mark.parametrize(("family", "part"), [("qwen3", "q_norm"), ("qwen2", "q_proj")])
def test_another_scale_of_attention_is_merged_into_the_queries(family, part):
    dense = make_dense(family)
    for layer in dense.model.layers:
        layer.self_attn.scaling = 0.15
    model = upcycle_from_parts(dense)
    ours, theirs = (getattr(each.model.layers[2].self_attn, part).weight for each in (model, dense))
    torch.testing.assert_close(ours, 0.15 * dense.model.layers[0].self_attn.head_dim ** 0.5 * theirs)
    assert_same_logits(model, dense)


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_layer_norms_with_weights(tie_word_embeddings):
    dense = make_dense("olmo", tie_word_embeddings=tie_word_embeddings)
    for layer in dense.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = layer_norm(), layer_norm()
    dense.model.norm = layer_norm()
    model = upcycle_from_parts(dense)
    assert not model.config.tie_word_embeddings  # the mean is subtracted only from the embedding
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    assert model.model.embed_tokens.weight.mean(dim=1).abs().max() < 1e-6
    assert_same_logits(model, dense)


def test_a_decoder_with_layer_norms_and_norms_of_queries():
    dense = make_dense("qwen3")
    for layer in dense.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = layer_norm(1e-6), layer_norm(1e-6)
    dense.model.norm = layer_norm(1e-6)
    assert_same_logits(upcycle_from_parts(dense), dense)
    dense.model.layers[0].self_attn.k_norm = nn.LayerNorm(12, eps=1e-6, bias=False)
    with pytest.raises(UpcyclingError, match="Qwen3ForCausalLM has LayerNorms beside RMS norms"):
        upcycle_from_parts(dense)


@pytest.mark.parametrize("place", ["the first", "the last"])
def test_layer_norms_beside_rms_norms_are_refused(place):
    dense = make_dense()
    owner, name = (dense.model, "norm") if place == "the last" else (dense.model.layers[0], "input_layernorm")
    setattr(owner, name, layer_norm(1e-6))
    with pytest.raises(UpcyclingError, match="LlamaForCausalLM has LayerNorms beside RMS norms"):
        upcycle_from_parts(dense)


def test_widths_can_differ_by_layer():
    dense = make_dense()
    narrow(dense.model.layers[1], 40)
    model = upcycle_from_parts(dense, expert_groups="joint")
    assert [group["intermediate_size"] for group in model.config.expert_groups] == [48, 40]
    assert_same_logits(model, dense)
    mixed = upcycle_from_parts(dense, layers=[0, 2])
    assert mixed.config.intermediate_size == 40
    assert mixed.config.sparse_layers == [0, 2]
    assert_same_logits(mixed, dense)
    with pytest.raises(UpcyclingError, match=r"stay dense have the widths \[40, 48\].*choose more `layers`"):
        upcycle_from_parts(dense, layers=[2])


def test_weights_are_shared_if_nothing_changes():
    dense = make_dense("qwen3")
    layout = read_decoder(dense)
    assert not layout.is_changed
    assert layout.outer_weights()["embed_tokens.weight"] is dense.model.embed_tokens.weight
    attention = dense.model.layers[2].self_attn
    weights = layout.layer_weights(2)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        assert weights[f"self_attn.{name}.weight"].data_ptr() == getattr(attention, name).weight.data_ptr(), name
    assert layout.block_weights(1).down.data_ptr() == dense.model.layers[1].mlp.down_proj.weight.data_ptr()
    assert layout.fields["hidden_act"] == "silu"
    for family in ("granite, scaled", "gemma", "olmo"):
        assert read_decoder(make_dense(family)).is_changed, family


def test_a_dense_block_runs_with_the_weights_that_experts_start_from():
    dense = make_dense("granite, scaled", torch.bfloat16)
    x = torch.randn(2, 3, 32)
    expected = 0.4 * dense.float().model.layers[1].mlp(x)
    torch.testing.assert_close(read_decoder(dense.bfloat16()).dense_block(1)(x), expected, rtol=1e-5, atol=1e-6)


def test_small_vocabularies():
    dense = make_dense(vocab_size=5)
    model = upcycle_from_parts(dense)
    ids = torch.tensor([[1, 4, 3]])
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-6)


class Several(nn.Module):
    """Runs one module after the other."""

    def __init__(self, *modules):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_wrapped_projections():
    dense = make_dense()
    for layer in dense.model.layers:
        layer.self_attn.q_proj = Several(layer.self_attn.q_proj)
    assert_same_logits(upcycle_from_parts(dense), dense)


def test_other_parts_are_refused():
    dense = make_dense()
    dense.model.embed_norm = layer_norm()
    dense.model.norm.register_forward_hook(lambda module, args, output: dense.model.embed_norm(output))
    with pytest.raises(UpcyclingError, match=r"LlamaForCausalLM runs \['norm', 'embed_norm'\] after its layers"):
        upcycle_from_parts(dense)

    dense = make_dense("qwen3")
    attention = dense.model.layers[1].self_attn
    attention.k_norm = Several(attention.k_norm, nn.Tanh())
    with pytest.raises(UpcyclingError, match=r"attention in layer 1 of Qwen3ForCausalLM runs .*k_norm.parts.1"):
        upcycle_from_parts(dense)

    dense = make_dense()
    dense.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(4))
    dense.vision = nn.Linear(2, 2)
    with pytest.raises(UpcyclingError, match=r"no place for: .*layers.1.self_attn.sinks, .*, vision.bias\. `"):
        upcycle_from_parts(dense)
    dense.audio = nn.Linear(2, 2)
    with pytest.raises(UpcyclingError, match=r"vision\.bias and 2 more"):
        upcycle_from_parts(dense)

    dense = make_dense()
    dense.config.num_attention_heads = 8
    with pytest.raises(UpcyclingError, match=r"layers.0.self_attn` \(LlamaAttention\) has projections of the shapes"):
        upcycle_from_parts(dense)

    dense = make_dense()
    dense.config.rope_parameters = {"full_attention": dense.config.rope_parameters}
    with pytest.raises(UpcyclingError, match="LlamaConfig does not have one rotary embedding for all layers"):
        upcycle_from_parts(dense)
