"""Re-ranking with a fusion layer."""

import inspect

import pytest
import torch

from modeling_sparse_moe_vlm.contrastive import softmax_loss
from modeling_sparse_moe_vlm.toolbox.data import retrieval_inputs
from modeling_sparse_moe_vlm.toolbox.evaluation import embed
from modeling_sparse_moe_vlm.toolbox.retrieval import FusionReranker, TokenStates, rerank, token_states
from tests.support.processors import make_image, make_processor
from tests.support.retrieval import make_retrieval_model

pytestmark = pytest.mark.newest

TEXTS = ["the cat", "a mat and the cat", "sat", "on the mat again"]
IMAGES = [make_image(seed) for seed in range(6)]


def make_reranker(trained: bool = True) -> FusionReranker:
    torch.manual_seed(0)
    reranker = FusionReranker(32, num_heads=4).eval()
    if trained:
        torch.nn.init.normal_(reranker.correction.weight, std=5.0)
    return reranker


def test_default_values():
    reranker = FusionReranker(32)
    assert reranker.aux_loss_coef == 0.01
    assert reranker.scale.tolist() == [10.0]
    assert reranker.fusion.head_dim == 4  # 8 heads
    assert reranker.fusion.config.num_experts == 4
    defaults = inspect.signature(rerank).parameters
    assert (defaults["top_k"].default, defaults["batch_size"].default) == (10, 64)


def test_states_of_tokens():
    model, processor = make_retrieval_model().train(), make_processor()
    states = token_states(model, processor, TEXTS)
    assert model.training
    model.eval()
    inputs = retrieval_inputs(processor, TEXTS)
    with torch.no_grad():
        outputs = model(**inputs)
    torch.testing.assert_close(states.hidden_states, outputs.last_hidden_state)
    torch.testing.assert_close(states.embeddings, outputs.embeddings)
    assert torch.equal(states.mask, inputs["attention_mask"])
    assert not states.hidden_states.requires_grad
    assert token_states(model.to(torch.bfloat16), processor, [IMAGES[0]]).hidden_states.dtype == torch.float32
    picked = states.select(torch.tensor([2, 0]))
    assert torch.equal(picked.embeddings, states.embeddings[[2, 0]])
    assert torch.equal(picked.mask, states.mask[[2, 0]])


def test_scores_are_the_similarity_and_a_correction_of_the_last_token():
    model, processor, reranker = make_retrieval_model(), make_processor(), make_reranker()
    texts, images = token_states(model, processor, TEXTS), token_states(model, processor, IMAGES[:4])
    scores, aux_loss = reranker(texts, images)
    fused = reranker.fusion(
        images.hidden_states, texts.hidden_states, images.mask, texts.mask, output_modality_weights=True
    )
    last = torch.stack([row[mask.bool()][-1] for row, mask in zip(fused.output, texts.mask)])
    similarity = (texts.embeddings * images.embeddings).sum(dim=1)
    expected = 10 * similarity + last @ reranker.correction.weight[0]
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(aux_loss, fused.aux_loss)
    assert (scores - 10 * similarity).abs().min() > 0.01
    # Padding does not matter.
    longer = TokenStates(
        torch.nn.functional.pad(texts.hidden_states, (0, 0, 0, 3), value=7.0),
        torch.nn.functional.pad(texts.mask, (0, 3)),
        texts.embeddings,
    )
    torch.testing.assert_close(reranker(longer, images)[0], scores, atol=1e-4, rtol=1e-4)


def test_the_loss_compares_all_texts_with_all_images():
    model, processor, reranker = make_retrieval_model(), make_processor(), make_reranker()
    texts, images = token_states(model, processor, TEXTS[:2]), token_states(model, processor, IMAGES[:3])
    positive = torch.tensor([[False, True, False], [True, False, True]])
    scores = torch.stack(
        [
            torch.stack(
                [reranker(texts.select(torch.tensor([i])), images.select(torch.tensor([j])))[0][0] for j in range(3)]
            )
            for i in range(2)
        ]
    )
    reranker.aux_loss_coef = 0.0
    torch.testing.assert_close(
        reranker.loss(texts, images, positive), softmax_loss(scores, positive), atol=1e-4, rtol=1e-4
    )
    two = images.select(torch.tensor([0, 1]))
    torch.testing.assert_close(
        reranker.loss(texts, two), softmax_loss(scores[:, :2], torch.eye(2).bool()), atol=1e-4, rtol=1e-4
    )
    without = reranker.loss(texts, images, positive)
    reranker.aux_loss_coef = 0.5
    aux_loss = (reranker.loss(texts, images, positive) - without) / 0.5
    assert aux_loss > 0.5


def test_an_untrained_reranker_keeps_the_order_of_retrieval():
    model, processor = make_retrieval_model(), make_processor()
    found, scores = rerank(make_reranker(trained=False), model, processor, TEXTS, IMAGES, top_k=4)
    similarity = embed(model, processor, TEXTS) @ embed(model, processor, IMAGES).T
    best = similarity.topk(4, dim=1)
    assert torch.equal(found, best.indices)
    torch.testing.assert_close(scores, 10 * best.values, atol=1e-4, rtol=1e-4)


def test_only_the_best_candidates_are_sorted_again():
    model, processor, reranker = make_retrieval_model(), make_processor(), make_reranker().train()
    found, scores = rerank(reranker, model, processor, TEXTS, IMAGES, top_k=4, batch_size=3)
    assert reranker.training
    similarity = embed(model, processor, TEXTS) @ embed(model, processor, IMAGES).T
    candidates = similarity.topk(4, dim=1).indices
    assert torch.equal(found.sort(dim=1).values, candidates.sort(dim=1).values)
    assert not torch.equal(found, candidates)
    for row in range(len(TEXTS)):
        images = token_states(model, processor, [IMAGES[i] for i in found[row]])
        text = token_states(model, processor, TEXTS[row : row + 1]).select(torch.zeros(4, dtype=torch.long))
        torch.testing.assert_close(reranker.eval()(text, images)[0], scores[row], atol=1e-3, rtol=1e-4)
    assert torch.equal(scores.sort(dim=1, descending=True).values, scores)
    assert rerank(reranker, model, processor, TEXTS[:1], IMAGES[:2])[0].shape == (1, 2)
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0"):
        rerank(reranker, model, processor, TEXTS, IMAGES, top_k=0)


def test_training_and_saving(tmp_path):
    model, processor, reranker = make_retrieval_model(), make_processor(), make_reranker(trained=False).train()
    texts, images = token_states(model, processor, TEXTS), token_states(model, processor, IMAGES[:4])
    optimizer = torch.optim.Adam(reranker.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = reranker.loss(texts, images)
        loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in reranker.parameters())
    found, scores = rerank(reranker, model, processor, TEXTS, IMAGES[:4])
    assert found[:, 0].tolist() == [0, 1, 2, 3]
    reranker.save_pretrained(tmp_path)
    loaded = FusionReranker.from_pretrained(tmp_path)
    torch.testing.assert_close(rerank(loaded, model, processor, TEXTS, IMAGES[:4])[1], scores)
