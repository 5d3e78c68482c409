"""Image-text retrieval: makes retrieval models of trained models, and sorts what they find again."""

from .conversion import to_retrieval
from .reranking import FusionReranker, TokenStates, rerank, token_states

__all__ = ["FusionReranker", "TokenStates", "rerank", "to_retrieval", "token_states"]
