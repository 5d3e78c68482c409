"""Upcycling: a sparse mixture of experts from a dense model, with the same outputs."""

from .checkpoints import plan_checkpoint, upcycle_checkpoint
from .errors import UpcyclingError
from .from_parts import upcycle_from_parts
from .native import to_native
from .parts_processor import processor_from_parts
from .receipt import ParityReceipt
from .upcycle import upcycle

__all__ = [
    "ParityReceipt",
    "UpcyclingError",
    "plan_checkpoint",
    "processor_from_parts",
    "to_native",
    "upcycle",
    "upcycle_checkpoint",
    "upcycle_from_parts",
]
