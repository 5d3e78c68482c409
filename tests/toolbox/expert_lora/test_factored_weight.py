"""Products with a factored stack equal those with the sum, in every form that experts use."""

import pytest
import torch
import torch.nn.functional as F

from modeling_sparse_moe_vlm.toolbox.expert_lora.factored_weight import GROUPED, FactoredWeight, LowRankUpdate

pytestmark = pytest.mark.newest

E, IN, OUT, ROWS = 4, 8, 12, 10


def make(rescaled: bool = False, num_updates: int = 2):
    """Returns a stack of shape `(E, IN, OUT)` with updates, and the same weights as one tensor."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    base = random(E, IN, OUT)
    updates = [LowRankUpdate(random(E, r, IN), random(E, r, OUT), 0.5 + r) for r in (4, 8)[:num_updates]]
    rescale = random(E, OUT).abs() + 0.5 if rescaled else None
    total = base + sum(update.rows.transpose(1, 2) @ update.columns * update.scaling for update in updates)
    if rescale is not None:
        total = total * rescale[:, None, :]
    return FactoredWeight(base, updates, rescale), total, random(ROWS, IN)


rescaled = pytest.mark.parametrize("rescaled", [False, True])


def close(got, expected):
    assert isinstance(got, torch.Tensor)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@rescaled
def test_one_matrix(rescaled):
    weight, total, inputs = make(rescaled)
    close(inputs @ weight[2], inputs @ total[2])
    close(torch.matmul(inputs, weight[2]), inputs @ total[2])
    close(torch.mm(inputs, weight[2]), inputs @ total[2])
    transposed, bias = weight.transpose(1, 2), torch.randn(OUT)
    close(F.linear(inputs, transposed[2]), inputs @ total[2])
    close(F.linear(inputs, transposed[2], bias), inputs @ total[2] + bias)
    close(F.linear(inputs, transposed[2], bias=bias), inputs @ total[2] + bias)


@rescaled
def test_a_selection(rescaled):
    """Selects a matrix for each row, with some experts more than once, and multiplies from both sides."""
    weight, total, inputs = make(rescaled)
    experts = torch.tensor([3, 3, 0, 1, 2, 0, 3, 1, 1, 0])
    expected = torch.stack([row @ total[expert] for row, expert in zip(inputs, experts)])
    close(torch.bmm(inputs[:, None], weight[experts])[:, 0], expected)
    close(torch.bmm(weight.transpose(1, 2)[experts], inputs[:, :, None])[..., 0], expected)


@rescaled
@pytest.mark.parametrize(
    "function", [F.grouped_mm, torch.ops.transformers.grouped_mm_fallback], ids=["torch", "fallback"]
)
def test_groups(rescaled, function):
    """Groups of rows, one of them empty, with a stack and with the transpose of its transpose."""
    weight, total, inputs = make(rescaled)
    offsets = torch.tensor([3, 3, 8, 10], dtype=torch.int32)
    expected = torch.cat([inputs[:3] @ total[0], inputs[3:8] @ total[2], inputs[8:] @ total[3]])
    close(function(inputs, weight, offs=offsets), expected)
    close(function(inputs, weight.transpose(-2, -1).transpose(-2, -1), offs=offsets), expected)
    assert function in GROUPED


@rescaled
@pytest.mark.parametrize("num_updates", [1, 2])
@pytest.mark.parametrize("ends", [[1, 1, 2, 3], [3, 3, 4, 7], [0, 0, 0, 0]], ids=["one each", "several", "none"])
@torch.no_grad()
def test_few_rows_without_gradients(rescaled, num_updates, ends):
    """The products are computed for each expert. Rows after the last group belong to no expert."""
    weight, total, inputs = make(rescaled, num_updates)
    output = F.grouped_mm(inputs, weight, offs=torch.tensor(ends, dtype=torch.int32))
    assert output.shape == (ROWS, OUT)
    for expert, (start, end) in enumerate(zip([0, *ends], ends)):
        close(output[start:end], inputs[start:end] @ total[expert])


@torch.no_grad()
def test_few_rows_under_autocast_stay_as_exact_as_grouped_products():
    weight, total, inputs = make()
    with torch.autocast("cpu", torch.bfloat16):
        output = F.grouped_mm(inputs, weight, offs=torch.tensor([1, 2, 3, 10], dtype=torch.int32))
    close(output[:3], torch.stack([inputs[expert] @ total[expert] for expert in range(3)]))


def test_rows_of_no_expert_do_not_reach_gradients(monkeypatch):
    """A kernel does not write the rows after the last group. Here they contain NaN."""
    weight, total, inputs = make(rescaled=True)
    weight.rescale.requires_grad_(True)
    offsets = torch.tensor([3, 3, 5, 7], dtype=torch.int32)

    def grouped(inputs, weight, offs):
        output = torch.ops.transformers.grouped_mm_fallback(inputs, weight, offs=offs)
        return output.masked_fill((torch.arange(len(inputs)) >= offs[-1])[:, None], float("nan"))

    monkeypatch.setattr("modeling_sparse_moe_vlm.toolbox.expert_lora.factored_weight.GROUPED", {*GROUPED, grouped})
    output = weight._from_the_right(grouped, inputs, offs=offsets)
    output[:7].sum().backward()
    assert weight.rescale.grad.isfinite().all()
    close(output[3:5], inputs[3:5] @ total[2])


def test_gradients_are_those_of_the_sum():
    weight, total, inputs = make()
    factors = [factor.requires_grad_() for update in weight.updates for factor in (update.rows, update.columns)]
    offsets = torch.tensor([3, 4, 8, 10], dtype=torch.int32)
    gradients = torch.autograd.grad(F.grouped_mm(inputs, weight, offs=offsets).square().sum(), factors)
    total = weight.base + sum(update.product() for update in weight.updates)
    expected = torch.autograd.grad(F.grouped_mm(inputs, total, offs=offsets).square().sum(), factors)
    for got, wanted in zip(gradients, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_dropout_is_only_for_the_updates():
    weight, _, inputs = make(num_updates=1)
    weight.updates[0].dropout = torch.nn.Dropout(1.0)
    close(inputs @ weight[0], inputs @ weight.base[0])


def test_unsupported_operations_are_refused():
    weight, _, inputs = make()
    with pytest.raises(NotImplementedError, match="calls `einsum`, which factored adapters do not know"):
        torch.einsum("ti,eio->teo", inputs, weight)
    with pytest.raises(ValueError, match=r"no transpose\(0, 1\)"):
        weight.transpose(0, 1)


def test_it_looks_like_its_stack():
    weight, _, _ = make()
    assert (weight.dtype, weight.device, weight.shape) == (torch.float32, torch.device("cpu"), (E, IN, OUT))
    assert weight.data_ptr() == weight.base.data_ptr()
