"""Upcycling: a sparse mixture of experts from a dense model, with the same outputs."""

from .errors import UpcyclingError
from .from_parts import upcycle_from_parts
from .native import to_native
from .parts_processor import processor_from_parts
from .receipt import ParityReceipt
from .upcycle import upcycle

__all__ = [
    "ParityReceipt",
    "UpcyclingError",
    "processor_from_parts",
    "to_native",
    "upcycle",
    "upcycle_from_parts",
]
