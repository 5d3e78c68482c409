"""Re-ranking: the best candidates of a retrieval model are compared with the query token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ...contrastive import pool_tokens, softmax_loss
from ...fusion import SparseMoeFusion
from ..data.retrieval import retrieval_inputs
from ..evaluation.retrieval import embed
from ..evaluation_mode import evaluating


class TokenStates(NamedTuple):
    """
    What a retrieval model computes for texts or images.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, D)`):
            Hidden states of the tokens.
        mask (`torch.Tensor` of shape `(B, T)`):
            0 for padding.
        embeddings (`torch.Tensor` of shape `(B, D)`):
            The embeddings.
    """

    hidden_states: torch.Tensor
    mask: torch.Tensor
    embeddings: torch.Tensor

    def select(self, rows: torch.Tensor) -> TokenStates:
        """Returns the given rows, in this order."""
        return TokenStates(*(values[rows] for values in self))


@torch.no_grad()
def token_states(
    model: PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase, items: Sequence[Any]
) -> TokenStates:
    """
    Runs a retrieval model on texts or images, as one batch without gradients.

    Args:
        model (`PreTrainedModel`):
            A retrieval model. It is in evaluation mode during the call.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of the model.
        items (`Sequence`):
            See [`~toolbox.data.retrieval_inputs`].

    Returns:
        [`TokenStates`]: The hidden states in float32, with one row per item.

    Raises:
        ValueError: If there are no items, or if an item cannot be processed.
    """
    inputs = retrieval_inputs(processor, items).to(model.device, dtype=model.dtype)
    with evaluating(model):
        outputs = model(**inputs)
    return TokenStates(outputs.last_hidden_state.float(), inputs["attention_mask"], outputs.embeddings)


class FusionReranker(nn.Module, PyTorchModelHubMixin):
    """
    A small model that scores a text and an image from the hidden states of a retrieval model, which stays frozen.

    A [`SparseMoeFusion`] layer lets the tokens of the text attend to the tokens of the image. The fused state of the
    last token gives a correction, which is added to the similarity of the embeddings times a learned scale. The
    correction starts at 0, so an untrained reranker keeps the order of the retrieval model.

    It is saved and loaded with `save_pretrained` and `from_pretrained` (see `PyTorchModelHubMixin` of
    `huggingface_hub`).

    Args:
        hidden_size (`int`):
            Width D of the hidden states of the retrieval model. A multiple of twice `num_heads`.
        num_experts (`int`, *optional*, defaults to 4):
            Number of experts: half for the text, half for the image.
        num_heads (`int`, *optional*, defaults to 8):
            Number of attention heads.
        aux_loss_coef (`float`, *optional*, defaults to 0.01):
            Weight of the load balancing loss of the experts in the loss.

    Raises:
        ValueError: If the sizes contradict each other.
    """

    def __init__(self, hidden_size: int, num_experts: int = 4, num_heads: int = 8, aux_loss_coef: float = 0.01):
        super().__init__()
        self.fusion = SparseMoeFusion(num_experts, hidden_size, hidden_size, num_heads=num_heads)
        self.correction = nn.Linear(hidden_size, 1, bias=False)
        nn.init.zeros_(self.correction.weight)
        self.scale = nn.Parameter(torch.tensor([10.0]))
        self.aux_loss_coef = aux_loss_coef

    def forward(self, texts: TokenStates, images: TokenStates) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Scores pairs: the first text with the first image, and so on.

        Args:
            texts ([`TokenStates`]):
                B texts.
            images ([`TokenStates`]):
                B images.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The scores `(B,)`, and the load balancing loss, a scalar.
        """
        fused = self.fusion(
            images.hidden_states, texts.hidden_states, images.mask, texts.mask, output_modality_weights=True
        )
        last = pool_tokens(fused.output, texts.mask, "last_token")
        similarity = (texts.embeddings * images.embeddings).sum(dim=1)
        return self.scale * similarity + self.correction(last)[:, 0], fused.aux_loss

    def loss(self, texts: TokenStates, images: TokenStates, positive: torch.Tensor | None = None) -> torch.Tensor:
        """
        Computes the contrastive loss over all combinations of texts and images.

        Args:
            texts ([`TokenStates`]):
                T texts.
            images ([`TokenStates`]):
                I images.
            positive (`torch.Tensor` of shape `(T, I)`, *optional*):
                Which text belongs to which image, of type bool. By default, the first text belongs to the first image,
                and so on.

        Returns:
            `torch.Tensor`: A scalar (see [`~contrastive.softmax_loss`]), with the load balancing loss added.
        """
        num_texts, num_images = len(texts.mask), len(images.mask)
        device = texts.mask.device
        if positive is None:
            positive = torch.eye(num_texts, num_images, dtype=torch.bool, device=device)
        of_text = torch.arange(num_texts, device=device).repeat_interleave(num_images)
        of_image = torch.arange(num_images, device=device).repeat(num_texts)
        scores, aux_loss = self(texts.select(of_text), images.select(of_image))
        return softmax_loss(scores.view(num_texts, num_images), positive) + self.aux_loss_coef * aux_loss


@torch.no_grad()
def rerank(
    reranker: FusionReranker,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    queries: Sequence[Any],
    images: Sequence[Any],
    top_k: int = 10,
    batch_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds images for texts in two steps: the retrieval model finds the best `top_k` images, and the reranker sorts them.

    Args:
        reranker ([`FusionReranker`]):
            The reranker. It is in evaluation mode during the call.
        model (`PreTrainedModel`):
            The retrieval model.
        processor (`ProcessorMixin`):
            Processor of the model.
        queries (`Sequence`):
            Texts, see [`~toolbox.data.retrieval_inputs`].
        images (`Sequence`):
            Images, see [`~toolbox.data.retrieval_inputs`].
        top_k (`int`, *optional*, defaults to 10):
            Number of images per text that are sorted again and returned.
        batch_size (`int`, *optional*, defaults to 64):
            Number of texts or images that are embedded together.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The positions of the images in `images`, best first, of type int64, and
        their scores in float32. Both have the shape `(number of queries, top_k)`, or fewer columns if there are fewer
        images.

    Raises:
        ValueError: If `top_k` is less than 1, if there are no queries or images, or if one cannot be processed.
    """
    if top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
    similarity = embed(model, processor, queries, batch_size) @ embed(model, processor, images, batch_size).T
    candidates = similarity.topk(min(top_k, len(images)), dim=1).indices
    device = reranker.scale.device
    found, scores = [], []
    with evaluating(reranker):
        for query, of_query in zip(queries, candidates, strict=True):
            states = token_states(model, processor, [images[int(i)] for i in of_query])
            text = token_states(model, processor, [query])
            repeated = text.select(torch.zeros(len(of_query), dtype=torch.long, device=text.mask.device))
            of_images, _ = reranker(_to(repeated, device), _to(states, device))
            order = of_images.cpu().sort(descending=True, stable=True)
            found.append(of_query[order.indices])
            scores.append(order.values)
    return torch.stack(found), torch.stack(scores)


def _to(states: TokenStates, device: torch.device) -> TokenStates:
    return TokenStates(*(values.to(device) for values in states))
