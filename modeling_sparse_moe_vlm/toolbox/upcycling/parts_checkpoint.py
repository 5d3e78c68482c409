"""A checkpoint of this package's architecture from the checkpoints of a language model and a vision encoder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from ..hub import write_model_card
from ..model_names import check_model_name
from .costs import costs_of
from .from_parts import upcycle_from_parts
from .outcome import UpcycledCheckpoint, class_name
from .output_folder import check_files, whole_folder
from .parts_processor import processor_from_parts
from .processors import batches_of, save_processor
from .shard_files import MAX_SHARD_SIZE


def upcycle_parts_checkpoint(
    language_model: str | os.PathLike,
    vision_encoder: str | os.PathLike | None,
    output: str | os.PathLike,
    *,
    dtype: str = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    rows: Sequence[Mapping[str, Any]] = (),
    router_init: str = "random",
    seed: int = 0,
    **request: Any,
) -> UpcycledCheckpoint:
    """
    Writes a checkpoint of a model from [`upcycle_from_parts`]. All three models are in memory.

    Args:
        language_model (`str` or `os.PathLike`):
            The language model, with its tokenizer: a folder, or a name on the Hub.
        vision_encoder (`str` or `os.PathLike`, *optional*):
            The vision encoder, with its image processor; without one, the result is a language model.
        output, dtype, max_shard_size, overwrite, rows, router_init, seed:
            See [`upcycle_checkpoint`]. Here, rows are conversations without images.
        request:
            Further arguments of [`upcycle_from_parts`].

    Returns:
        [`UpcycledCheckpoint`]: The result; the dense costs are those of the language model.

    Raises:
        OSError: If a part cannot be read, or the output cannot be written.
        UpcyclingError: If the parts do not fit, or the output folder contains a model already. Nothing is written then.
    """
    output = Path(output)
    for part in (language_model, vision_encoder):
        check_files(output, part, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
        if part is not None:
            check_model_name(part)
    tokenizer: Any = AutoTokenizer.from_pretrained(language_model)
    decoder = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype)
    encoder = None if vision_encoder is None else AutoModel.from_pretrained(vision_encoder, dtype=dtype)
    batch = batches_of(tokenizer, rows) if router_init == "data" else None
    dense = costs_of(decoder)
    model = upcycle_from_parts(
        decoder, encoder, tokenizer=tokenizer, router_init=router_init, batch=batch, seed=seed, **request
    )
    processor = tokenizer
    if vision_encoder is not None:
        processor = processor_from_parts(model, tokenizer, AutoImageProcessor.from_pretrained(vision_encoder))
    with whole_folder(output, sum(tensor.nbytes for tensor in model.state_dict().values())) as stage:
        save_processor(processor, stage)
        model.save_pretrained(stage, max_shard_size=max_shard_size)
        write_model_card(stage, config=model.config, model_name=output.resolve().name)
    return UpcycledCheckpoint(
        source=str(language_model) if vision_encoder is None else f"{language_model} + {vision_encoder}",
        output=str(output),
        model_class=type(model).__name__,
        start=model.config.get_text_config().start,
        dense=dense,
        sparse=costs_of(model),
        processor=class_name(processor),
    )
