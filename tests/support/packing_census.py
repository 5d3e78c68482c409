"""Finds the types of Transformers whose models support packed rows: runs a tiny model of each on rows of text."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from modeling_sparse_moe_vlm.toolbox.data.packing import RowPacker, RowPositions
from modeling_sparse_moe_vlm.toolbox.data.packing_check import fit_packer
from tests.support.tiny_models import TEXT_TOKENS, tiny_model
from tests.support.upcycling_census import KINDS

YES, ONE_SEQUENCE, NO, NOT_RUN = "yes", "one sequence per batch", "no", "does not run rows of text"


def census(model_types: list[str] | None = None) -> Iterator[tuple[str, str, str]]:
    """Yields the name of every type of vision-language models, or of the given types, the outcome and the reason."""
    auto_class, names = KINDS["Images and text"]
    for model_type in sorted(names):
        if model_type != "sparse_moe_vlm" and model_type in (model_types or names):
            yield model_type, *examine(model_type, auto_class)


def examine(model_type: str, auto_class) -> tuple[str, str]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (14, 9, 6):
        input_ids = torch.randint(TEXT_TOKENS.start, TEXT_TOKENS.stop, (1, length), generator=generator)
        rows.append({"input_ids": input_ids, "labels": input_ids})
    try:
        model = tiny_model(model_type, auto_class)
        packer = RowPacker(0, {"input_ids": True, "labels": True}, RowPositions(model))
        fit_packer(packer, model, rows)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return (NO, reason) if "does not support packed rows" in reason else (NOT_RUN, reason)
    return ONE_SEQUENCE if packer.one_sequence else YES, ""
