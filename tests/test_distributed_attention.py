"""Distributed attention: every fast form equals the literal parts, and these agree with plain softmax attention."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from modeling_sparse_moe_vlm.attention_runs import MAX_RUNS, Run, attend_runs, find_runs
from modeling_sparse_moe_vlm.distributed_attention import (
    attend_by_channels,
    attend_by_row,
    attend_in_parts,
    count_free,
    merge,
)
from modeling_sparse_moe_vlm.visible_keys import visible_counts

pytestmark = pytest.mark.newest

B, H, H_KV, D, M = 2, 4, 2, 16, 3
SCALING = 0.3
LAYOUTS = {
    "text, image, text": [0] * 7 + [1] * 12 + [0] * 5,
    "image first": [1] * 9 + [0] * 6,
    "image last": [0] * 4 + [1] * 11,
    "three modalities": [0] * 5 + [2] * 4 + [1] * 6 + [2] * 3 + [0] * 7,
    "text only": [0] * 13,
    "image only": [1] * 8,
    "single tokens": [0, 1, 0, 2, 1, 0],
}
FORMS = ["runs", "eager", "sdpa"]


class Module(torch.nn.Module):
    """Has the attributes of an attention module that attention functions use."""

    num_key_value_groups = H // H_KV
    is_causal = True
    training = False


def make_tensors(length: int, seed: int = 0, dtype=torch.float32, queries: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(B, H, queries or length, D), (B, H_KV, length, D), (B, H_KV, length, D)]
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    tensors.append(torch.randn(H, M, generator=generator))
    return [tensor.requires_grad_() for tensor in tensors]


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def additive(visible: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def attend(form: str, ids, query, key, value, log_priors, visible=None, guidance=0.0):
    """Returns the output `(B, T, H, D)` and the weights, with a causal mask or the mask `visible`."""
    options = {"scaling": SCALING, "log_priors": log_priors, "guidance": guidance}
    if form == "parts":
        visible = causal(key.shape[2]) if visible is None else visible
        return attend_in_parts(query, key, value, ids, M, visible=visible, **options)[:2]
    if form == "runs":
        output, weights = attend_runs(query, key, value, find_runs(ids), M, **options)
        return output.transpose(1, 2), weights
    if form == "row":
        return attend_by_row(query, key, value, visible, ids, M, **options)[:2]
    function = eager_attention_forward if form == "eager" else ALL_ATTENTION_FUNCTIONS[form]
    mask = visible
    if form == "eager":
        mask = additive(causal(key.shape[2]) if visible is None else visible)
    return attend_by_channels(function, Module(), query, key, value, mask, ids, M, **options)[:2]


def values_and_gradients(form, ids, tensors, **kwargs):
    """Returns the output, the weights, and the gradients of a random projection of the output."""
    for tensor in tensors:
        tensor.grad = None
    output, weights = attend(form, ids, *tensors, **kwargs)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    (output * direction).sum().backward()
    return [output.detach(), weights.detach(), *(tensor.grad.clone() for tensor in tensors)]


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_priors_are_plain_softmax_attention(layout):
    ids = torch.tensor([LAYOUTS[layout]] * B)
    query, key, value, _ = make_tensors(ids.shape[1])
    output, weights = attend("parts", ids, query, key, value, None)
    scores = (query @ key.repeat_interleave(2, dim=1).mT * SCALING).masked_fill(~causal(ids.shape[1]), -torch.inf)
    probabilities = torch.softmax(scores, dim=-1)
    torch.testing.assert_close(output, (probabilities @ value.repeat_interleave(2, dim=1)).transpose(1, 2))
    for modality in range(M):
        expected = (probabilities * (ids == modality)[:, None, None]).sum(dim=-1)
        torch.testing.assert_close(weights[..., modality], expected)


def test_priors_are_factors_of_the_parts():
    """w_P ∝ π_P·exp(ℓ_P), so the odds of two parts change by the ratio of their priors, whatever the logits."""
    ids = torch.tensor([LAYOUTS["three modalities"]] * B)
    query, key, value, log_priors = make_tensors(ids.shape[1])
    plain = attend("parts", ids, query, key, value, None)[1][:, :, -1]
    weighted = attend("parts", ids, query, key, value, log_priors)[1][:, :, -1]
    odds = (weighted[..., 1] / weighted[..., 0]) / (plain[..., 1] / plain[..., 0])
    torch.testing.assert_close(odds, torch.exp(log_priors[:, 1] - log_priors[:, 0]).expand_as(odds))
    torch.testing.assert_close(weighted.sum(dim=-1), torch.ones(B, H))


def test_empty_parts_have_no_weight_and_no_nan():
    ids = torch.tensor([[0] * 6, [1] * 6])
    tensors = make_tensors(6)
    output, weights, *gradients = values_and_gradients("parts", ids, tensors)
    assert all(value.isfinite().all() for value in (output, weights, *gradients))
    assert weights[0, :, :, 0].eq(1).all()
    assert weights[1, :, :, 1].eq(1).all()
    assert weights[..., 2].eq(0).all()


def test_a_query_that_sees_nothing():
    outputs, logsumexps = torch.randn(2, 3, D), torch.full((2, 3), -torch.inf)
    merged, weights = merge(outputs, logsumexps)
    assert merged.eq(0).all()
    assert weights.eq(0).all()


# ---------------------------------------------------------------- the fast forms


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_priors", [False, True])
def test_fast_forms_equal_the_parts(form, layout, with_priors):
    """Compares the outputs and all gradients, including those of the priors."""
    ids = torch.tensor([LAYOUTS[layout]] * B)
    query, key, value, log_priors = make_tensors(ids.shape[1])
    if with_priors:
        tensors = [query, key, value, log_priors]
        fast, literal = (values_and_gradients(each, ids, tensors) for each in (form, "parts"))
    else:
        fast, literal = (attend(each, ids, query, key, value, None) for each in (form, "parts"))
    for ours, expected in zip(fast, literal, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("form", ["eager", "sdpa"])
def test_channels_support_any_mask_and_rows_of_any_layout(form):
    ids = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 2, 2, 0, 1]])
    visible = causal(8) & torch.tensor([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1]]).bool()[:, None, None]
    visible |= torch.eye(8, dtype=torch.bool)  # padding sees itself
    tensors = make_tensors(8)
    fast, literal = (values_and_gradients(each, ids, tensors, visible=visible) for each in (form, "parts"))
    for ours, expected in zip(fast, literal, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_row_equals_the_parts(mask):
    ids = torch.tensor([LAYOUTS["three modalities"], LAYOUTS["three modalities"][::-1]])
    query, key, value, log_priors = make_tensors(ids.shape[1], queries=1)
    visible = torch.ones(B, 1, 1, ids.shape[1], dtype=torch.bool)
    if mask is not None:
        visible[0, ..., :6] = False
    given = {None: None, "bool": visible, "additive": additive(visible)}[mask]
    row = attend("row", ids, query, key, value, log_priors, visible=given, guidance=0.5)
    literal = attend("parts", ids, query, key, value, log_priors, visible=visible, guidance=0.5)
    for ours, expected in zip(row, literal, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_guidance_subtracts_attention_to_text_only(form, layout):
    ids = torch.tensor([LAYOUTS[layout]] * B)
    with torch.no_grad():
        query, key, value, log_priors = make_tensors(ids.shape[1])
        guided = attend(form, ids, query, key, value, log_priors, guidance=0.7)[0]
        torch.testing.assert_close(
            guided, attend("parts", ids, query, key, value, log_priors, guidance=0.7)[0], rtol=1e-4, atol=2e-5
        )
        # By its definition, with attention over the text keys only.
        plain, weights = attend("parts", ids, query, key, value, log_priors)
        text_visible = causal(ids.shape[1]) & (ids == 0)[:, None, None]
        text = attend("parts", ids, query, key, value, None, visible=text_visible)[0]
        sees_both = ((weights[..., 0] > 0) & (weights[..., 1:].sum(dim=-1) > 0)).transpose(1, 2).unsqueeze(-1)
        expected = torch.where(sees_both, plain + 0.7 * (plain - text), plain)
        torch.testing.assert_close(guided, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("form", [*FORMS, "parts"])
@pytest.mark.parametrize("layout", ["image only", "no text", "image first", "text only"])
@torch.no_grad()
def test_guidance_is_the_plain_output_for_queries_that_do_not_see_both(form, layout):
    """The outputs are bit-identical, also for two parts without text, whatever their priors are."""
    layouts = {"image only": [1] * 5, "no text": [2, 1, 1, 2, 2], "image first": [1, 1, 2, 0, 0], "text only": [0] * 5}
    ids = torch.tensor([layouts[layout]] * B)
    tensors = make_tensors(5)
    plain, guided = (attend(form, ids, *tensors, guidance=guidance)[0] for guidance in (0.0, 50.0))
    without_both = 3 if layout == "image first" else 5
    assert torch.equal(guided[:, :without_both], plain[:, :without_both])
    assert not torch.isclose(guided[:, without_both:], plain[:, without_both:], rtol=0.1).all(dim=-1).any()


@pytest.mark.parametrize("hidden", [0, 1])
@torch.no_grad()
def test_guidance_is_the_plain_output_for_rows_that_do_not_see_both(hidden):
    """The first row has keys of text and of other modalities, but one of the two is masked."""
    ids = torch.tensor([[0, 1, 2, 0, 1] * 9, [0, 0, 1, 1, 0] * 9])  # long enough for shares that round to less than 1
    visible = torch.stack([ids[0] == 0 if hidden else ids[0] != 0, torch.ones(45, dtype=torch.bool)])[:, None, None]
    tensors = make_tensors(45, queries=1)
    plain, guided = (attend("row", ids, *tensors, visible=visible, guidance=guidance)[0] for guidance in (0.0, 50.0))
    assert torch.equal(guided[0], plain[0])
    assert not torch.isclose(guided[1], plain[1], rtol=0.1).all(dim=-1).any()


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_stays_within_its_precision(form):
    ids = torch.tensor([LAYOUTS["text, image, text"]] * B)
    query, key, value, log_priors = (tensor.detach() for tensor in make_tensors(ids.shape[1]))
    low = [tensor.bfloat16() for tensor in (query, key, value)]
    output, weights = attend(form, ids, *low, log_priors)
    exact, exact_weights = attend("parts", ids, *(tensor.float() for tensor in low), log_priors)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(weights, exact_weights, rtol=0.02, atol=0.02)


# ---------------------------------------------------------------- runs and counts


def test_runs():
    ids = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]])
    assert find_runs(ids) == (Run(0, 2, 0), Run(2, 5, 1), Run(5, 6, 0))
    ids[1, 2] = 0
    assert find_runs(ids) is None, "rows differ"
    assert find_runs(torch.tensor([[0, 1] * MAX_RUNS])) is None, "too many"
    assert find_runs(torch.zeros(3, 1, dtype=torch.long)) == (Run(0, 1, 0),)


def test_visible_counts():
    ids = torch.tensor([[0, 1, 1, 0], [1, 0, 2, 0]])
    expected = torch.tensor(
        [[[1, 0, 0], [1, 1, 0], [1, 2, 0], [2, 2, 0]], [[0, 1, 0], [1, 1, 0], [1, 1, 1], [2, 1, 1]]]
    )
    for mask in (None, torch.ones(2, 4), causal(4), additive(causal(4))):
        assert torch.equal(visible_counts(mask, ids, 4, M), expected.float())
    assert torch.equal(visible_counts(None, ids, 1, M), expected[:, -1:].float()), "one query after cached keys"
    padded = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    assert visible_counts(padded, ids, 4, M)[1, :, 1].tolist() == [0, 0, 0, 0]


def test_visible_counts_of_every_kind_of_mask():
    ids = torch.tensor([[0, 1, 1, 0], [1, 0, 2, 0]])
    # Two new queries after two cached keys, in a static cache with room for one more.
    roomy = torch.cat([ids, torch.zeros(2, 1, dtype=torch.long)], dim=1)
    visible = torch.tensor([[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]]]).bool()[:, None]
    expected = torch.tensor([[[1, 2, 0], [2, 2, 0]], [[1, 0, 1], [2, 0, 1]]]).float()
    for mask in (visible, additive(visible), additive(visible, torch.bfloat16)):
        assert torch.equal(visible_counts(mask, roomy, 2, M), expected)
        assert torch.equal(visible_counts(mask, ids, 2, M), expected), "ids of the room behind may be missing"
    assert torch.equal(visible_counts(visible[..., :4], roomy, 2, M), expected), "or too many"
    # Padding of the keys (flash attention), for one query and for the last two.
    padding = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    assert torch.equal(visible_counts(padding, ids, 2, M), expected)
    assert torch.equal(visible_counts(padding.bool(), ids, 1, M), expected[:, 1:])
    assert visible_counts(None, roomy, 4, M)[:, -1].tolist() == [[2, 2, 0], [2, 1, 1]], "the room is not counted"
    block_mask = create_block_mask(lambda b, h, q, k: visible[b, 0, q, k], 2, None, 2, 5, device="cpu")
    assert torch.equal(visible_counts(block_mask, roomy, 2, M), expected)


def test_visible_counts_of_a_sliding_window():
    ids = torch.tensor([[0, 1, 1, 0, 2]])
    expected = [[1, 0, 0], [1, 1, 0], [0, 2, 0], [1, 1, 0], [1, 0, 1]]  # the query's own key and the one before
    assert visible_counts(None, ids, 5, M, sliding_window=2)[0].tolist() == expected
    padding = torch.tensor([[0, 1, 1, 1, 1]])
    assert visible_counts(padding, ids, 2, M, sliding_window=2)[0].tolist() == expected[3:]
    assert visible_counts(padding, ids, 5, M, sliding_window=3)[0, 2].tolist() == [0, 2, 0]
    assert visible_counts(None, ids, 5, M, sliding_window=5)[0, 4].tolist() == [2, 2, 1]


def test_count_free_weights():
    """Each weight is divided by the number of keys of its part, and the results are scaled to sum to 1."""
    weights = torch.tensor([0.2, 0.6, 0.2]).expand(1, 1, 2, 3)
    counts = torch.tensor([[[2.0, 3.0, 1.0], [1.0, 6.0, 2.0]]])
    expected = torch.tensor([[0.1, 0.2, 0.2], [0.2, 0.1, 0.1]])
    torch.testing.assert_close(count_free(weights, counts)[0, 0], expected / expected.sum(dim=-1, keepdim=True))
    nothing = count_free(torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 3))
    assert nothing.eq(0).all(), "a query that sees nothing"


def test_count_free_weights_do_not_depend_on_the_number_of_equal_keys():
    """A part whose keys all appear twice has twice the weight, but the same count-free weight."""
    query, key, value, _ = make_tensors(3, queries=1)
    ids = torch.tensor([[0, 0, 1]] * B)
    doubled = torch.tensor([0, 1, 2, 2])
    once, twice = (
        attend("row", ids[:, rows], query, key[:, :, rows], value[:, :, rows], None)[1]
        for rows in (torch.arange(3), doubled)
    )
    odds = [weights[..., 1] / weights[..., 0] for weights in (once, twice)]
    torch.testing.assert_close(odds[1], 2 * odds[0])
    counts = [torch.tensor([[[2.0, 1.0, 0.0]]] * B), torch.tensor([[[2.0, 2.0, 0.0]]] * B)]
    torch.testing.assert_close(count_free(once, counts[0]), count_free(twice, counts[1]))
    torch.testing.assert_close(count_free(once, counts[0]).sum(dim=-1), torch.ones(B, H, 1))
