"""Pooling and the contrastive losses, against references that are written out term by term."""

import math

import pytest
import torch

from modeling_sparse_moe_vlm.contrastive import (
    at_most,
    contrastive_loss,
    gather_rows,
    pool_tokens,
    sigmoid_loss,
    softmax_loss,
    truncate,
)

pytestmark = pytest.mark.newest

HIDDEN = torch.arange(24.0).view(2, 4, 3)


@pytest.mark.parametrize(
    ("mask", "last", "mean"),
    [
        ([[1, 1, 1, 1], [1, 1, 1, 1]], [[9.0, 10, 11], [21, 22, 23]], [[4.5, 5.5, 6.5], [16.5, 17.5, 18.5]]),
        ([[1, 1, 0, 0], [1, 0, 0, 0]], [[3.0, 4, 5], [12, 13, 14]], [[1.5, 2.5, 3.5], [12, 13, 14]]),
        ([[0, 0, 1, 1], [0, 1, 1, 1]], [[9.0, 10, 11], [21, 22, 23]], [[7.5, 8.5, 9.5], [18, 19, 20]]),
        ([[0, 1, 1, 0], [1, 1, 1, 0]], [[6.0, 7, 8], [18, 19, 20]], [[4.5, 5.5, 6.5], [15, 16, 17]]),
    ],
)
def test_pooling_ignores_padding_on_both_sides(mask, last, mean):
    mask = torch.tensor(mask)
    assert pool_tokens(HIDDEN, mask, "last_token").tolist() == last
    assert pool_tokens(HIDDEN, mask, "mean").tolist() == mean
    assert pool_tokens(HIDDEN.bfloat16(), mask, "mean").dtype == torch.float32
    assert pool_tokens(HIDDEN.bfloat16(), mask.bool(), "last_token").tolist() == last


def test_pooling_without_a_mask_takes_all_tokens():
    assert pool_tokens(HIDDEN, None, "last_token").tolist() == [[9.0, 10, 11], [21, 22, 23]]
    assert pool_tokens(HIDDEN, None, "mean")[0].tolist() == [4.5, 5.5, 6.5]
    assert pool_tokens(HIDDEN, torch.zeros(2, 4), "mean").tolist() == [[0.0] * 3] * 2
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape \(2, 4\).*\(2, 3\)"):
        pool_tokens(HIDDEN, torch.ones(2, 3), "mean")


def test_truncated_embeddings_have_the_length_1():
    embeddings = torch.tensor([[3.0, 4.0, 12.0], [0.0, -2.0, 0.0]])
    torch.testing.assert_close(truncate(embeddings), torch.tensor([[3 / 13, 4 / 13, 12 / 13], [0, -1, 0]]))
    torch.testing.assert_close(truncate(embeddings, 2), torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    assert truncate(embeddings, 3).shape == (2, 3)
    for size in (0, 4, 1.5):
        with pytest.raises(ValueError, match=f"`embedding_size` must be an integer from 1 to 3, but got {size}"):
            truncate(embeddings, size)


def reference_softmax(scores, positive):
    """Each pair among its own score and those of the negatives; means over positives, rows and directions."""
    directions = []
    for s, p in ((scores, positive), (scores.T, positive.T)):
        rows = []
        for i in range(len(s)):
            negatives = sum(math.exp(s[i, j]) for j in range(s.shape[1]) if not p[i, j])
            terms = [
                -math.log(math.exp(s[i, j]) / (math.exp(s[i, j]) + negatives)) for j in range(s.shape[1]) if p[i, j]
            ]
            if terms:
                rows.append(sum(terms) / len(terms))
        directions.append(sum(rows) / len(rows))
    return sum(directions) / 2


def reference_sigmoid(scores, positive):
    total = 0.0
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            if positive[i].any() or positive[:, j].any():
                total += math.log1p(math.exp(-scores[i, j] if positive[i, j] else scores[i, j]))
    return total / int(positive.any(dim=1).sum())


SCORES = torch.tensor(
    [[2.0, -1.0, 0.5, 1.5], [0.3, 1.0, -0.7, 0.2], [-0.4, 0.8, 2.5, -1.1], [0.9, -0.2, 0.1, 0.6]], dtype=torch.float64
)
POSITIVES = {
    "one to one": torch.eye(4, dtype=torch.bool),
    # Three captions of one image, one of another one, and two further images, which are hard negatives.
    "several captions": torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]).bool(),
    # The last caption is a hard negative.
    "hard negatives": torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).bool(),
}


@pytest.mark.parametrize("kind", POSITIVES)
def test_losses_equal_their_definition(kind):
    positive = POSITIVES[kind]
    expected = reference_softmax(SCORES, positive)
    assert softmax_loss(SCORES, positive).item() == pytest.approx(expected, rel=1e-12)
    assert sigmoid_loss(SCORES, positive).item() == pytest.approx(reference_sigmoid(SCORES, positive), rel=1e-12)


def test_losses_equal_those_of_clip_and_siglip_for_one_caption_per_image():
    cross_entropy = torch.nn.functional.cross_entropy
    targets = torch.arange(4)
    clip = (cross_entropy(SCORES, targets) + cross_entropy(SCORES.T, targets)) / 2
    torch.testing.assert_close(softmax_loss(SCORES, POSITIVES["one to one"]), clip)
    siglip = -torch.nn.functional.logsigmoid((2 * torch.eye(4) - 1) * SCORES).sum() / 4
    torch.testing.assert_close(sigmoid_loss(SCORES, POSITIVES["one to one"]), siglip)


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_losses_without_negatives_or_pairs_are_finite(loss):
    scores = SCORES.clone().requires_grad_()
    for positive in (torch.ones(4, 4).bool(), torch.zeros(4, 4).bool()):
        value = loss(scores, positive)
        value.backward()
        assert scores.grad.isfinite().all()
    assert value == 0
    assert softmax_loss(SCORES, torch.ones(4, 4).bool()) == 0
    assert loss(SCORES[:, :0], torch.ones(4, 0).bool()) == 0


def test_the_loss_compares_queries_and_documents_at_all_sizes():
    torch.manual_seed(0)
    rows = torch.randn(7, 6, dtype=torch.float64)
    labels = torch.tensor([5, -2, -2, 5, -2, -1, -1])
    is_document = torch.tensor([0, 0, 0, 1, 1, 1, 0]).bool()
    scale = torch.tensor([3.0], dtype=torch.float64)
    # Queries 0, 1, 2 and the hard negative 6; documents 3, 4 and the hard negative 5.
    positive = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0]]).bool()

    def expected(size, reference, bias=0.0):
        unit = rows[:, :size] / rows[:, :size].norm(dim=1, keepdim=True)
        return reference(3.0 * unit[[0, 1, 2, 6]] @ unit[[3, 4, 5]].T + bias, positive)

    for sizes in ([6], [2, 6]):
        both = {"scale": scale, "sizes": sizes}
        value = contrastive_loss(rows, labels, is_document, loss="softmax", bias=None, **both)
        wanted = sum(expected(size, reference_softmax) for size in sizes) / len(sizes)
        assert value.item() == pytest.approx(wanted, rel=1e-12)
        bias = torch.tensor([-1.5], dtype=torch.float64)
        value = contrastive_loss(rows, labels, is_document, loss="sigmoid", bias=bias, **both)
        wanted = sum(expected(size, reference_sigmoid, -1.5) for size in sizes) / len(sizes)
        assert value.item() == pytest.approx(wanted, rel=1e-12)


def test_a_value_over_its_limit_keeps_only_the_gradient_that_brings_it_back():
    for direction, expected in ((1.0, [1.0, 1.0, 1.0]), (-1.0, [-1.0, 0.0, 0.0])):
        values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        limited = at_most(values, 2.0)
        assert limited.tolist() == [1.0, 2.0, 2.0]
        (direction * limited).sum().backward()
        assert values.grad.tolist() == expected


def test_rows_of_one_process_are_not_changed():
    rows = torch.randn(3, 2), torch.tensor([0, -1, -2]), torch.tensor([True, False, True])
    assert all(a is b for a, b in zip(gather_rows(*rows), rows))


def test_rows_of_several_processes(monkeypatch):
    """Process 1 of 2 with three rows, next to two rows of process 0."""
    embeddings = {0: torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1: torch.tensor([[5.0, 6.0], [7.0, 8.0], [9.0, 1.0]])}
    # Label 7 is the same in both processes, -2 and -3 are not, and -1 is a hard negative.
    labels = {0: torch.tensor([7, -2]), 1: torch.tensor([7, -3, -1])}
    documents = {0: torch.tensor([True, False]), 1: torch.tensor([False, True, True])}
    of_first = [torch.tensor([2]), torch.stack([labels[0], documents[0].long()], dim=1), embeddings[0]]

    def all_gather(gathered, own):
        assert len(gathered) == 2
        first = of_first.pop(0)
        gathered[0].zero_()
        gathered[0][: len(first)] = first
        gathered[1].copy_(own)

    monkeypatch.setattr("modeling_sparse_moe_vlm.contrastive.is_one_of_several_processes", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    own = embeddings[1].requires_grad_()
    rows, of_rows, is_document = gather_rows(own, labels[1], documents[1])
    assert rows.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 1]]
    assert of_rows.tolist() == [7, -2, 7, -3 - 2**40, -1]
    assert is_document.tolist() == [True, False, False, True, True]
    (rows * torch.arange(10.0).view(5, 2)).sum().backward()
    assert own.grad.tolist() == [[8, 10], [12, 14], [16, 18]]  # two processes have the same gradients
