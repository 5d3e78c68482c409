"""Upcycling: a sparse mixture of experts from a dense model, with the same outputs."""

from .from_parts import upcycle_from_parts
from .native import to_native
from .parts_processor import processor_from_parts

__all__ = [
    "processor_from_parts",
    "to_native",
    "upcycle_from_parts",
]
