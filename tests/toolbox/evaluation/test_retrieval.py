"""Recall at k and median rank, against cases computed by hand."""

import evaluate
import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.data import retrieval_inputs
from modeling_sparse_moe_vlm.toolbox.evaluation import embed, evaluate_retrieval, retrieval
from modeling_sparse_moe_vlm.toolbox.evaluation.metrics.retrieval_recall.retrieval_recall import recall_of_ranks
from modeling_sparse_moe_vlm.toolbox.evaluation.retrieval import ranks_of
from modeling_sparse_moe_vlm.toolbox.evaluation.scores import METRICS
from tests.support.processors import make_image, make_processor
from tests.support.retrieval import make_pairs, make_retrieval_model


def test_recall_and_median_rank_by_hand():
    figures = recall_of_ranks([1, 5, 2, 11, 6, 10])
    assert figures == {
        "recall@1": pytest.approx(100 / 6),
        "recall@5": pytest.approx(50),
        "recall@10": pytest.approx(500 / 6),
        "median_rank": 5.5,
    }
    assert recall_of_ranks([3, 1, 7])["median_rank"] == 3


def test_the_evaluate_module():
    metric = evaluate.load(str(METRICS / "retrieval_recall"))
    ranked = [["a", "b", "c"], ["b", "c", "a"], ["c", "b", "a"], [str(i) for i in range(20)]]
    figures = metric.compute(predictions=ranked, references=[["a"], ["a", "c"], ["x"], ["9", "10"]])
    assert figures == {"recall@1": 25.0, "recall@5": 50.0, "recall@10": 75.0, "median_rank": 6.0}


UNIT = torch.eye(4)
# Scores of three captions (numbers of their images: 0, 0, 1) for the images 0 and 1.
CAPTIONS = torch.tensor([[0.6, 0.8, 0, 0], [0.8, 0.6, 0, 0], [1.0, 0, 0, 0]])


def test_an_image_is_found_by_any_of_its_captions():
    of_image, of_caption = torch.arange(2), torch.tensor([0, 0, 1])
    # Image 0 scores 0.6, 0.8 and (wrong) 1.0. Image 1 scores 0.8, 0.6 (wrong) and 0.0.
    assert ranks_of(UNIT[:2], CAPTIONS, of_image, of_caption).tolist() == [2, 3]
    # Caption 0 prefers image 1, caption 1 image 0, and caption 2 image 0.
    assert ranks_of(CAPTIONS, UNIT[:2], of_caption, of_image).tolist() == [2, 1, 2]
    # A better second caption does not count twice.
    both = torch.tensor([[0.9, 0.1, 0, 0], [0.8, 0.6, 0, 0], [0.5, 0, 0, 0]])
    assert ranks_of(UNIT[:1], both, of_image[:1], of_caption).tolist() == [1]


def test_ties_count_against_the_model():
    same = torch.ones(5, 3) / 3**0.5
    numbers = torch.arange(5)
    assert ranks_of(same, same, numbers, numbers).tolist() == [5] * 5
    nearly = same * torch.tensor([1, 1 + 3e-7, 1, 1, 1])[:, None]
    assert ranks_of(same, nearly, numbers, numbers).tolist() == [5] * 5
    better = same * torch.tensor([1, 1.001, 1, 1, 1])[:, None]
    assert ranks_of(same, better, numbers, numbers).tolist() == [5, 1, 5, 5, 5]
    # Candidates of the same image do not count against each other.
    assert ranks_of(same[:1], same, numbers[:1], torch.tensor([0, 0, 0, 1, 2])).tolist() == [3]
    assert ranks_of(same[:1], same, torch.tensor([9]), numbers).tolist() == [6]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_ranks_do_not_depend_on_the_size_of_the_blocks(chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK_SIZE", chunk)
    generator = torch.Generator().manual_seed(0)
    queries, candidates = (torch.randn(number, 4, generator=generator) for number in (9, 14))
    of_query, of_candidate = torch.arange(9), torch.arange(14) % 9
    scores = queries @ candidates.T
    expected = []
    for i in range(9):
        order = sorted(range(14), key=lambda j: -scores[i, j])
        expected.append(next(rank for rank, j in enumerate(order, 1) if of_candidate[j] == i))
    assert ranks_of(queries, candidates, of_query, of_candidate).tolist() == expected
    assert len(set(expected)) > 2


@pytest.mark.parametrize("batch_size", [2, 64])
def test_evaluation_of_a_model(batch_size):
    model, processor = make_retrieval_model().train(), make_processor()
    rows = make_pairs(5, captions=2)
    # The same image again, with a further caption.
    rows.append({"image": make_image(1), "caption": "further", "image_id": "one"})
    rows[1]["image_id"] = "one"
    figures = evaluate_retrieval(model, processor, rows, batch_size)
    assert model.training
    model.eval()
    captions = [caption for row in rows[:5] for caption in row["captions"]] + ["further"]
    owners = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 1]
    with torch.no_grad():
        texts = model(**retrieval_inputs(processor, captions)).embeddings
        images = model(**retrieval_inputs(processor, [row["image"] for row in rows[:5]])).embeddings
    scores = texts @ images.T
    to_image = [1 + sum(bool(scores[i, j] > scores[i, own]) for j in range(5)) for i, own in enumerate(owners)]
    to_text = []
    for j in range(5):
        best = max(scores[i, j] for i in range(11) if owners[i] == j)
        to_text.append(1 + sum(bool(scores[i, j] > best) for i in range(11) if owners[i] != j))
    expected = {f"image_to_text/{name}": value for name, value in recall_of_ranks(to_text).items()}
    expected |= {f"text_to_image/{name}": value for name, value in recall_of_ranks(to_image).items()}
    assert figures == pytest.approx(expected)
    assert 0 < figures["text_to_image/recall@1"] < 100
    truncated = evaluate_retrieval(model, processor, rows, batch_size, embedding_size=2)
    assert truncated != figures


def test_embeddings_in_batches():
    model, processor = make_retrieval_model(), make_processor()
    items = ["a cat", make_image(), {"image": make_image(1), "text": "mat"}]
    with torch.no_grad():
        expected = model(**retrieval_inputs(processor, items)).embeddings
    torch.testing.assert_close(embed(model, processor, items, batch_size=2), expected, atol=1e-5, rtol=1e-4)
    assert embed(model, processor, items, embedding_size=8).shape == (3, 8)
    with pytest.raises(ValueError, match="`items` is empty"):
        embed(model, processor, [])
    with pytest.raises(ValueError, match=r"items\[2\] has no image"):
        embed(model, processor, ["a", "b", None], batch_size=2)


def test_mistakes_in_the_evaluation():
    model, processor = make_retrieval_model(), make_processor()
    with pytest.raises(ValueError, match="`rows` is empty"):
        evaluate_retrieval(model, processor, [])
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        evaluate_retrieval(model, processor, make_pairs(1), batch_size=0)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        embed(model, processor, ["a"], batch_size=0)
    with pytest.raises(ValueError, match="row 2 has no caption"):
        evaluate_retrieval(model, processor, [*make_pairs(2), {"image": make_image()}], batch_size=2)
