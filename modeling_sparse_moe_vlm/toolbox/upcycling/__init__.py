"""Upcycling: a sparse mixture of experts from a dense model, with the same outputs."""

from .native import to_native

__all__ = [
    "to_native",
]
