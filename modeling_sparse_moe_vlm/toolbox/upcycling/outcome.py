"""The result of upcycling a checkpoint, in figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .costs import Costs, costs_table
from .receipt import ParityReceipt


@dataclass(frozen=True)
class UpcycledCheckpoint:
    """
    The result of upcycling a checkpoint, or of a dry run.

    Args:
        source (`str`): Folder of the dense model, or its name on the Hub.
        output (`str`, *optional*): Folder of the sparse model; `None` if nothing was written.
        model_class (`str`): Name of the sparse model's class.
        start (`dict`): How the experts start, with the parity receipt as `"parity"`.
        dense ([`Costs`]): Costs of the dense model.
        sparse ([`Costs`]): Costs of the sparse model.
        processor (`str`, *optional*): Class of the processor or tokenizer in the folder, if there is one.
    """

    source: str
    output: str | None
    model_class: str
    start: dict[str, Any]
    dense: Costs
    sparse: Costs
    processor: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        start = f", start {self.start['name']}" if "name" in self.start else ""
        lines = [costs_table({"dense": self.dense, "sparse": self.sparse}), "", f"{self.model_class}{start}"]
        if "parity" in self.start:
            lines.append(str(ParityReceipt(**self.start["parity"])))
        elif "block_error" in self.start:
            lines.append(f"outputs of blocks differ by {self.start['block_error']:.1e} at most")
        if self.output is not None:
            lines.append(f"{self.output} ({self.processor or 'the source has no processor and no tokenizer'})")
        return "\n".join(lines)


def class_name(processor: Any) -> str | None:
    """Returns the name of the class of a processor or tokenizer; `None` if there is none."""
    return None if processor is None else type(processor).__name__
