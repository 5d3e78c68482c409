"""Image-text retrieval: makes retrieval models of trained models."""

from .conversion import to_retrieval

__all__ = ["to_retrieval"]
