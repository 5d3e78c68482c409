"""Gated feed-forward blocks are recognised by their outputs, not by their names or structure."""

import copy
import functools

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers.activations import ACT2FN

from modeling_sparse_moe_vlm.toolbox.upcycling import gated_formula
from modeling_sparse_moe_vlm.toolbox.upcycling.gated_formula import (
    NotTheFormulaError,
    fingerprint,
    looks_like_feed_forward,
    read_formula,
)

pytestmark = pytest.mark.newest

D, INNER = 8, 12


class Gated(nn.Module):
    """A block with meaningless names. Only the sizes and the formula matter."""

    def __init__(self, act="silu", bias=False, width=INNER, **settings):
        super().__init__()
        self.a = nn.Linear(width, D, bias=False)
        self.b = nn.Linear(D, width, bias=bias)
        self.c = nn.Linear(D, width, bias=False)
        self.act = ACT2FN[act]
        self.__dict__.update(settings)

    def forward(self, x):
        return self.a(self.c(x) * self.act(self.b(x)))


class Fused(nn.Module):
    def __init__(self, gate_first=True):
        super().__init__()
        self.inner = nn.Linear(D, 2 * INNER, bias=False)
        self.outer = nn.Linear(INNER, D, bias=False)
        self.gate_first = gate_first

    def forward(self, x):
        first, second = self.inner(x).chunk(2, dim=-1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return self.outer(nn.functional.silu(gate) * up)


class Clamped(Gated):
    def forward(self, x):
        return self.a(self.c(x).clamp(-50, 50) * self.act(self.b(x)))


class Normalised(Gated):
    def forward(self, x):
        return super().forward(x / x.norm(dim=-1, keepdim=True) * D**0.5)


class Scaled(Gated):
    def forward(self, x):
        return super().forward(x) * self.factor


class Residual(Gated):
    def forward(self, x):
        return x + super().forward(x)


class Mixing(Gated):
    def forward(self, x):
        return super().forward(x + x.roll(1, dims=1))


class Dropping(Gated):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), self.rate, self.training)


class InnerNorm(Gated):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(INNER)

    def forward(self, x):
        return self.a(self.norm(self.c(x) * self.act(self.b(x))))


class Buffered(Gated):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))


class FurtherArguments(Gated):
    def forward(self, x, scale=None):
        return super().forward(x)


class Tuple(Gated):
    def forward(self, x):
        return super().forward(x), None


class Failing(Gated):
    def forward(self, x):
        raise RuntimeError("needs a kernel")


class OtherLinear(nn.Linear):
    pass


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, INNER, bias=False), nn.Linear(INNER, D, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.up(x)))


def test_names_do_not_matter():
    formula = read_formula(Gated())
    assert (formula.hidden_size, formula.intermediate_size, formula.hidden_act) == (D, INNER, "silu")
    assert formula.parameters == {"gate": ("b.weight", None), "up": ("c.weight", None), "down": ("a.weight", None)}


def test_square_projections_are_distinguished():
    formula = read_formula(Gated(width=D))
    assert formula.intermediate_size == D
    assert formula.parameters == {"gate": ("b.weight", None), "up": ("c.weight", None), "down": ("a.weight", None)}


@pytest.mark.parametrize("gate_first", [True, False])
def test_halves_of_a_fused_projection(gate_first):
    halves = [("inner.weight", slice(0, INNER)), ("inner.weight", slice(INNER, 2 * INNER))]
    gate, up = halves if gate_first else halves[::-1]
    formula = read_formula(Fused(gate_first))
    assert (formula.hidden_size, formula.intermediate_size) == (D, INNER)
    assert formula.parameters == {"gate": gate, "up": up, "down": ("outer.weight", None)}


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "relu6", "linear"])
def test_activations_are_found_by_value(act):
    assert read_formula(Gated(act)).hidden_act == act


def test_likely_activations_are_tried_first():
    assert read_formula(Gated("gelu_pytorch_tanh"), ["gelu", "gelu_new"]).hidden_act == "gelu_new"


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Clamped(), "something other than"),
        (Normalised(), "something other than"),
        (Scaled(factor=1.01), "something other than"),
        (Residual(), "something other than"),
        (Mixing(), "something other than"),
        (Gated("xielu"), "besides those of its projections"),
        (Dropping(rate=0.1), "in training mode .set its dropout to 0 first"),
        (InnerNorm(), r"besides those of its projections \(norm.weight\)"),
        (Buffered(), r"besides those of its projections \(scale\)"),
        (FurtherArguments(), "`FurtherArguments.forward` takes further arguments"),
        (Tuple(), "returns a tuple"),
        (Failing(), "does not run on hidden states .*needs a kernel"),
        (Gated(bias=True), r"linear layers with biases \(b\)"),
        (Plain(), "^not gated$"),
        (nn.Identity(), "^not gated$"),
    ],
)
def test_blocks_that_only_look_gated(block, reason):
    with pytest.raises(NotTheFormulaError, match=reason):
        read_formula(block)


def test_other_linear_layers_are_refused():
    block = Gated()
    block.c = OtherLinear(D, INNER, bias=False)
    with pytest.raises(NotTheFormulaError, match="`c` is a OtherLinear"):
        read_formula(block)


def test_settings_without_effect():
    assert read_formula(Scaled(factor=1.0)).hidden_act == "silu"
    assert read_formula(Dropping(rate=0.0)).hidden_act == "silu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neither_the_block_nor_random_states_change(dtype):
    block, dropping = Dropping(rate=0.0).to(dtype).train(), Dropping(rate=0.5)
    calls = []
    block.register_forward_hook(lambda *args: calls.append(args))
    before, state = copy.deepcopy(block.state_dict()), torch.get_rng_state()
    read_formula(block)
    with pytest.raises(NotTheFormulaError):
        read_formula(dropping)
    assert torch.equal(torch.get_rng_state(), state)
    assert block.training
    assert all(module.training for module in block.modules())
    assert not calls
    assert block.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    assert all(parameter.requires_grad for parameter in block.parameters())


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_blocks_without_weights(act):
    with torch.device("meta"):
        block = Gated(act)
        formula = read_formula(block)
    assert formula == read_formula(Gated(act))
    assert block.a.weight.is_meta


def test_weights_are_not_read():
    block = Residual()
    nn.init.zeros_(block.a.weight)
    with pytest.raises(NotTheFormulaError, match="something other than"):
        read_formula(block)
    block = Gated()
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    assert read_formula(block).parameters["gate"] == ("b.weight", None)


def test_offloaded_blocks():
    block = nn.Sequential(Gated())
    cpu_offload(block, execution_device="cpu")
    assert block[0].a.weight.is_meta
    assert read_formula(block[0]).parameters == read_formula(Gated()).parameters
    assert block[0].a.weight.is_meta
    assert block(torch.ones(1, D)).shape == (1, D)


def test_surroundings_do_not_matter():
    block = Gated("gelu")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert read_formula(block).hidden_act == "gelu"
    finally:
        torch.set_default_dtype(torch.float32)


def test_blocks_that_compute_the_same_have_the_same_fingerprint():
    for act in ("silu", "gelu_pytorch_tanh"):  # which stores its own partial function
        assert fingerprint(Gated(act)) == fingerprint(Gated(act).bfloat16().eval())


def test_blocks_that_compute_something_else_have_other_fingerprints():
    patched = Gated()
    patched.forward = functools.partial(Residual.forward, patched)
    blocks = [
        Gated(),
        Gated("gelu"),
        Gated(width=INNER + 1),
        Gated(bias=True),
        Gated(factor=1.0),
        Scaled(factor=1.0),
        Scaled(factor=2.0),
        Buffered(),
        patched,
    ]
    assert len({fingerprint(block) for block in blocks}) == len(blocks)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Gated(), True),
        (Gated(width=D), False),
        (Gated(bias=True), True),
        (Fused(), True),
        (InnerNorm(), True),
        (FurtherArguments(), True),
        (Plain(), True),
        (nn.Sequential(nn.Linear(D, INNER - D), nn.Linear(INNER - D, D)), False),
        (nn.Sequential(nn.Linear(D, INNER), nn.Linear(INNER, INNER)), False),
        (nn.Linear(D, INNER), False),
    ],
)
def test_look_of_feed_forward_blocks(module, expected):
    assert looks_like_feed_forward(module) is expected


def test_mixers_of_a_sequence_do_not_look_like_feed_forward_blocks():
    class Mixer(InnerNorm):
        def forward(self, x, cache=None):
            return super().forward(x)

    assert not looks_like_feed_forward(Mixer())


def test_no_activation_that_prints_a_message_is_created(monkeypatch):
    """xIELU warns if its kernel is not installed, for any block."""
    made = []
    make = type(ACT2FN).__getitem__
    monkeypatch.setattr(type(ACT2FN), "__getitem__", lambda table, name: made.append(name) or make(table, name))
    gated_formula._activations.cache_clear()
    read_formula(Gated("relu2"))
    assert "relu2" in made
    assert "xielu" not in made
