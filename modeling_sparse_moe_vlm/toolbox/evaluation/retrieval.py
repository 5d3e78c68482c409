"""Evaluation of image-text retrieval: recall at k and median rank in both directions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ...parallel_plans import is_one_of_several_processes
from ..data.retrieval import Pair, read_pair, retrieval_inputs
from ..evaluation_mode import evaluating, is_spread
from .metrics.retrieval_recall.retrieval_recall import recall_of_ranks

# Number of queries and of candidates whose scores are in memory at once.
CHUNK_SIZE = 2048
# Cosine similarities that differ by less are ties: they are equal except for rounding.
TIE = 1e-6


@torch.no_grad()
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


@dataclass
class RetrievalRanks:
    """
    Ranks of the right candidates, counted from 1.

    Args:
        image_to_text (`list[int]`):
            For every image, the rank of its best caption among all captions.
        text_to_image (`list[int]`):
            For every caption, in the order of the rows, the rank of its image among all images.
        of_image (`list[int]`):
            For every caption, the number of its image.
        of_row (`list[int]`):
            For every caption, the number of its row.
    """

    image_to_text: list[int]
    text_to_image: list[int]
    of_image: list[int]
    of_row: list[int]

    def figures(self) -> dict[str, float]:
        """Returns recall and median rank in both directions, see [`evaluate_retrieval`]."""
        figures = {f"image_to_text/{name}": value for name, value in recall_of_ranks(self.image_to_text).items()}
        return figures | {f"text_to_image/{name}": value for name, value in recall_of_ranks(self.text_to_image).items()}


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
    return rank_rows(model, processor, rows, batch_size, embedding_size).figures()


def rank_rows(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 64,
    embedding_size: int | None = None,
    share: bool = False,
) -> RetrievalRanks:
    """
    Ranks all captions of the rows for every image, and all images for every caption.

    Args:
        model (`PreTrainedModel`):
            A retrieval model.
        processor (`ProcessorMixin`):
            Processor of the model.
        rows (`Sequence[Mapping]`):
            Rows, as for [`evaluate_retrieval`].
        batch_size (`int`, *optional*, defaults to 64):
            Number of texts or images per batch.
        embedding_size (`int`, *optional*):
            Number of components of the embeddings. Defaults to all.
        share (`bool`, *optional*, defaults to `False`):
            Whether several processes embed the rows together. All of them must then call this function, and all get
            the ranks. If every process has only a part of the model, each of them embeds all rows.

    Returns:
        [`RetrievalRanks`]: The ranks.

    Raises:
        ValueError: In the same cases as [`evaluate_retrieval`].
    """
    if not len(rows):
        raise ValueError("`rows` is empty: pass at least one image with a caption.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    number, of_processes = 0, 1
    if share and is_one_of_several_processes() and not is_spread(model):
        number, of_processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    starts = range(0, len(rows), batch_size)[number::of_processes]
    batches: list[_Batch] = []
    known: set[str] = set()
    for start in tqdm(starts, desc="Embedding", unit="batch", disable=number > 0):
        numbers = range(start, min(start + batch_size, len(rows)))
        batches.append(_embed_batch(model, processor, rows, numbers, known, batch_size, embedding_size))
        known |= batches[-1].images.keys()
    if of_processes > 1:
        gathered: list[Any] = [None] * of_processes
        torch.distributed.all_gather_object(gathered, batches)
        batches = sorted((batch for of_process in gathered for batch in of_process), key=lambda batch: batch.of_row[0])
    images: dict[str, torch.Tensor] = {}
    for batch in batches:
        for image, embedding in batch.images.items():
            images.setdefault(image, embedding)  # another process may have embedded it, too
    number_of = {image: number for number, image in enumerate(images)}
    of_text = torch.tensor([number_of[image] for batch in batches for image in batch.of_image])
    of_image = torch.arange(len(images))
    all_texts, all_images = torch.cat([batch.texts for batch in batches]), torch.stack(list(images.values()))
    return RetrievalRanks(
        ranks_of(all_images, all_texts, of_image, of_text).tolist(),
        ranks_of(all_texts, all_images, of_text, of_image).tolist(),
        of_text.tolist(),
        [row for batch in batches for row in batch.of_row],
    )


@dataclass
class _Batch:
    """
    The embeddings of some rows.

    Args:
        texts (`torch.Tensor` of shape `(number of captions, embedding_size)`):
            Embeddings of the captions.
        of_image (`list[str]`):
            Name of the image of each caption.
        of_row (`list[int]`):
            Number of the row of each caption.
        images (`dict[str, torch.Tensor]`):
            Embedding of each image that this process sees for the first time, by name.
    """

    texts: torch.Tensor
    of_image: list[str]
    of_row: list[int]
    images: dict[str, torch.Tensor]


def _embed_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Sequence[Mapping[str, Any]],
    numbers: range,
    known: Collection[str],
    batch_size: int,
    embedding_size: int | None,
) -> _Batch:
    """Embeds the captions of some rows, and their images except those that are already known."""
    pairs = {number: read_pair(rows[number], number) for number in numbers}
    images = {
        number: f"row {number}" if pair.image_id is None else f"id {pair.image_id}" for number, pair in pairs.items()
    }
    new: dict[str, Pair] = {}
    for number, pair in pairs.items():
        if images[number] not in known:
            new.setdefault(images[number], pair)
    captions = [caption for pair in pairs.values() for caption in pair.captions]
    names = [pair.name for pair in pairs.values() for _ in pair.captions]
    texts = embed(model, processor, captions, batch_size, embedding_size, names)
    embedded: dict[str, torch.Tensor] = {}
    if new:
        names = [pair.name for pair in new.values()]
        found = embed(model, processor, [pair.image for pair in new.values()], batch_size, embedding_size, names)
        embedded = dict(zip(new, found, strict=True))
    of_row = [number for number, pair in pairs.items() for _ in pair.captions]
    return _Batch(texts, [images[number] for number in of_row], of_row, embedded)


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
