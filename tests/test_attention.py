"""Attention equals a literal implementation of the formula, query by query and head by head."""

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from modeling_sparse_moe_vlm.attention import SparseMoeVlmAttention
from tests.support.models import make_config

OPTIONS = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True},
    "biases but for the output": {"attention_bias": True, "attention_out_bias": False},
    "only a bias of the output": {"attention_out_bias": True},
    "no rotary positions": {"nope_layers": [0]},
    "rotary positions here": {"nope_layers": [1]},
    "no QK-norm": {"use_qk_norm": False},
    "narrow heads": {"head_dim": 6},
}
BATCH, LENGTH = 2, 5


def make_attention(implementation: str = "eager", **text_config):
    config = make_config(**text_config).text_config
    config._attn_implementation = implementation
    attention = SparseMoeVlmAttention(config, layer_idx=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return attention, config


def positions(config, start: int = 0, length: int = LENGTH):
    ids = torch.arange(start, start + length)[None]
    return LlamaRotaryEmbedding(config)(torch.zeros(1), position_ids=ids)


def causal_mask(length: int = LENGTH) -> torch.Tensor:
    return torch.full((length, length), -torch.inf).triu(1)[None, None]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean() + eps)


def rotate(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Turns each pair (x_i, x_{i+d/2}) by position · theta^(-2i/d) (RoFormer, arXiv 2104.09864, in Llama's layout)."""
    half = len(x) // 2
    angle = position * theta ** (-torch.arange(half, dtype=x.dtype) * 2 / len(x))
    first, second = x[:half], x[half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])


def literal_attention(attention, config, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns causal attention in float64: output `(B, T, D)`, weights `(B, heads, T, T)`."""
    exact = {name: parameter.double() for name, parameter in attention.named_parameters()}
    size, theta = config.head_dim, config.rope_parameters["rope_theta"]

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        return exact[f"{name}.weight"] @ x + exact.get(f"{name}.bias", 0.0)

    def head_of(name: str, x: torch.Tensor, head: int, position: int | None = None) -> torch.Tensor:
        vector = project(f"{name}_proj", x)[head * size : (head + 1) * size]
        if position is None:
            return vector
        if config.use_qk_norm:
            vector = rms_norm(vector, exact[f"{name}_norm.weight"], config.rms_norm_eps)
        return vector if 0 in config.nope_layers else rotate(vector, position, theta)

    heads, shared_by = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    output = torch.zeros(BATCH, LENGTH, config.hidden_size, dtype=torch.float64)
    weights = torch.zeros(BATCH, heads, LENGTH, LENGTH, dtype=torch.float64)
    for row, tokens in enumerate(hidden_states.double()):
        for t in range(LENGTH):
            values = []
            for head in range(heads):
                query = head_of("q", tokens[t], head, t)
                keys = [head_of("k", tokens[s], head // shared_by, s) for s in range(t + 1)]
                probabilities = torch.softmax(torch.stack([query @ key for key in keys]) / size**0.5, dim=0)
                weights[row, head, t, : t + 1] = probabilities
                values.append(sum(p * head_of("v", tokens[s], head // shared_by) for s, p in enumerate(probabilities)))
            output[row, t] = project("o_proj", torch.cat(values))
    return output, weights


@pytest.fixture
def hidden_states() -> torch.Tensor:
    return torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_is_the_literal_formula(name, hidden_states):
    attention, config = make_attention(**OPTIONS[name])
    with torch.no_grad():
        expected, expected_weights = literal_attention(attention, config, hidden_states)
        output, weights = attention(hidden_states, positions(config), causal_mask())
    torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, expected_weights.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_sdpa_equals_eager_in_forward_and_gradients(name, hidden_states):
    results = []
    for implementation, mask in (("eager", causal_mask()), ("sdpa", causal_mask()), ("sdpa", None)):
        attention, config = make_attention(implementation, **OPTIONS[name])
        output, _ = attention(hidden_states, positions(config), mask)
        output.square().mean().backward()
        results.append([output, *(parameter.grad for parameter in attention.parameters())])
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cached_tokens_give_the_same_output(implementation, hidden_states):
    attention, config = make_attention(implementation)
    with torch.no_grad():
        expected, _ = attention(hidden_states, positions(config), causal_mask())
        cache = DynamicCache(config=config)
        steps = [
            attention(hidden_states[:, t : t + 1], positions(config, t, 1), None, past_key_values=cache)[0]
            for t in range(LENGTH)
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_is_only_active_in_training(implementation, hidden_states):
    attention, config = make_attention(implementation, attention_dropout=0.5)
    attention.eval()
    first, again = (attention(hidden_states, positions(config), causal_mask())[0] for _ in range(2))
    assert torch.equal(first, again)
    attention.train()
    assert not torch.allclose(attention(hidden_states, positions(config), causal_mask())[0], first)


def test_parameters_have_the_names_of_the_llama_and_qwen3_family():
    names = set(dict(make_attention(attention_bias=True)[0].named_parameters()))
    projections = {f"{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")}
    assert names == projections | {"q_norm.weight", "k_norm.weight"}
    qwen2 = set(dict(make_attention(attention_bias=True, attention_out_bias=False)[0].named_parameters()))
    assert qwen2 == names - {"o_proj.bias"}
    only_output = set(dict(make_attention(attention_out_bias=True)[0].named_parameters()))
    assert only_output == names - {f"{name}_proj.bias" for name in "qkv"}
    plain = set(dict(make_attention(use_qk_norm=False)[0].named_parameters()))
    assert plain == {f"{name}_proj.weight" for name in "qkvo"}
