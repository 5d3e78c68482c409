"""Evaluation of image-text retrieval: recall at k and median rank in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..data.retrieval import Pair, read_pair, retrieval_inputs
from ..evaluation_mode import evaluating
from .metrics.retrieval_recall.retrieval_recall import recall_of_ranks

# Number of queries and of candidates whose scores are in memory at once.
CHUNK_SIZE = 2048
# Cosine similarities that differ by less are ties: they are equal except for rounding.
TIE = 1e-6


@torch.inference_mode()
def embed(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    items: Sequence[Any],
    batch_size: int = 64,
    embedding_size: int | None = None,
    names: Sequence[str] | None = None,
) -> torch.Tensor:
    """
    Embeds texts, images, and texts with images, in batches.

    Args:
        model (`PreTrainedModel`):
            A retrieval model. It is in evaluation mode during the call.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of the model.
        items (`Sequence`):
            See [`~toolbox.data.retrieval_inputs`].
        batch_size (`int`, *optional*, defaults to 64):
            Number of items per batch.
        embedding_size (`int`, *optional*):
            Number of components of the embeddings. Defaults to all.
        names (`Sequence[str]`, *optional*):
            Name of each item in error messages. Defaults to `items[0]` and so on.

    Returns:
        `torch.Tensor` of shape `(number of items, embedding_size)`: The embeddings, in float32 on the CPU. Their rows
        have the length 1.

    Raises:
        ValueError: If `batch_size` is less than 1, if there are no items, or if an item cannot be processed. The
            message names the item.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if names is None:
        names = [f"items[{number}]" for number in range(len(items))]
    embeddings = []
    with evaluating(model):
        for start in range(0, max(len(items), 1), batch_size):
            batch = slice(start, start + batch_size)
            inputs = retrieval_inputs(processor, items[batch], names[batch]).to(model.device, dtype=model.dtype)
            embeddings.append(model(**inputs, embedding_size=embedding_size).embeddings.float().cpu())
    return torch.cat(embeddings)


def evaluate_retrieval(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 64,
    embedding_size: int | None = None,
) -> dict[str, float]:
    """
    Evaluates retrieval in both directions among all images and all captions of the rows, with the protocol of COCO and
    Flickr30k: an image counts as found if any of its captions is among the first k, and a caption if its image is.

    Memory contains all embeddings, but only one batch of images and one block of scores.

    Args:
        model (`PreTrainedModel`):
            A retrieval model. It is in evaluation mode during the call.
        processor (`ProcessorMixin`):
            Processor of the model.
        rows (`Sequence[Mapping]`):
            Rows in the form that [`~toolbox.data.RetrievalCollator`] takes. Rows with the same `image_id` are one
            image, which is embedded once. Hard negatives are not used.
        batch_size (`int`, *optional*, defaults to 64):
            Number of texts or images per batch.
        embedding_size (`int`, *optional*):
            Number of components of the embeddings. Defaults to all.

    Returns:
        `dict[str, float]`: `recall@1`, `recall@5`, `recall@10` (in percent) and `median_rank` (counted from 1), with
        the prefixes `image_to_text/` and `text_to_image/`. See [`ranks_of`] for ties.

    Raises:
        ValueError: If there are no rows, if `batch_size` is less than 1, or if a row is malformed. The message names
            the row.
    """
    if not len(rows):
        raise ValueError("`rows` is empty: pass at least one image with a caption.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    number_of: dict[str, int] = {}  # of each image
    owners: list[int] = []  # number of the image of each caption
    texts, images = [], []
    for start in tqdm(range(0, len(rows), batch_size), desc="Embedding", unit="batch"):
        pairs = [read_pair(rows[i], i) for i in range(start, min(start + batch_size, len(rows)))]
        new: list[Pair] = []
        for number, pair in enumerate(pairs, start):
            key = f"row {number}" if pair.image_id is None else f"id {pair.image_id}"
            if key not in number_of:
                number_of[key] = len(number_of)
                new.append(pair)
            owners += [number_of[key]] * len(pair.captions)
        captions = [caption for pair in pairs for caption in pair.captions]
        names = [pair.name for pair in pairs for _ in pair.captions]
        texts.append(embed(model, processor, captions, batch_size, embedding_size, names))
        if new:
            names = [pair.name for pair in new]
            images.append(embed(model, processor, [pair.image for pair in new], batch_size, embedding_size, names))
    of_text, of_image = torch.tensor(owners), torch.arange(len(number_of))
    all_texts, all_images = torch.cat(texts), torch.cat(images)
    to_text = recall_of_ranks(ranks_of(all_images, all_texts, of_image, of_text).tolist())
    to_image = recall_of_ranks(ranks_of(all_texts, all_images, of_text, of_image).tolist())
    figures = {f"image_to_text/{name}": value for name, value in to_text.items()}
    return figures | {f"text_to_image/{name}": value for name, value in to_image.items()}


def ranks_of(
    queries: torch.Tensor, candidates: torch.Tensor, of_query: torch.Tensor, of_candidate: torch.Tensor
) -> torch.Tensor:
    """
    Returns the rank of the best right candidate of each query, counted from 1.

    Ties count against the model: wrong candidates with the same score (up to 1e-6) come first. Otherwise, a model that
    gives the same embedding to everything would find everything.

    Args:
        queries (`torch.Tensor` of shape `(Q, D)`):
            Embeddings of the queries.
        candidates (`torch.Tensor` of shape `(C, D)`):
            Embeddings of the candidates.
        of_query (`torch.Tensor` of shape `(Q,)`):
            Number of the image of each query.
        of_candidate (`torch.Tensor` of shape `(C,)`):
            Number of the image of each candidate. The right candidates of a query have its number.

    Returns:
        `torch.Tensor` of shape `(Q,)`: The ranks, of type int64. Scores are computed in blocks, so memory does not grow
        with Q × C. A query without right candidates has the rank C + 1.
    """
    ranks = []
    for start in range(0, len(queries), CHUNK_SIZE):
        block, owner = queries[start : start + CHUNK_SIZE], of_query[start : start + CHUNK_SIZE, None]
        best = torch.full((len(block),), -torch.inf)
        for scores, is_right in _scores(block, owner, candidates, of_candidate):
            best = torch.maximum(best, scores.masked_fill(~is_right, -torch.inf).amax(dim=1))
        rank = torch.ones(len(block), dtype=torch.long)
        for scores, is_right in _scores(block, owner, candidates, of_candidate):
            rank += ((scores >= best[:, None] - TIE) & ~is_right).sum(dim=1)
        ranks.append(rank)
    return torch.cat(ranks)


def _scores(block: torch.Tensor, owner: torch.Tensor, candidates: torch.Tensor, of_candidate: torch.Tensor):
    """Yields blocks of scores, and which of them belong to right candidates."""
    for start in range(0, len(candidates), CHUNK_SIZE):
        part = slice(start, start + CHUNK_SIZE)
        yield block @ candidates[part].T, owner == of_candidate[None, part]
