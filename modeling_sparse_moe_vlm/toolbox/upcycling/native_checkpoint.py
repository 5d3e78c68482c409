"""From the folder of an upcycled model, trained or not, to one of the sparse twin of its base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ... import modeling_upcycled
from ...experts_config import SparseMoeVlmExpertsConfig, experts_config_of
from ..hub import write_model_card
from .costs import costs_of
from .errors import UpcyclingError
from .native import dense_config, to_native
from .outcome import UpcycledCheckpoint, class_name
from .output_folder import check_dtype, check_output, whole_folder
from .processors import load_processor, save_processor
from .shard_files import MAX_SHARD_SIZE


def is_upcycled_checkpoint(source: str | os.PathLike, revision: str | None = None) -> bool:
    """Whether a folder, or a model on the Hub, is an upcycled model."""
    return _experts_of(_config_dict(source, revision)) is not None


def export_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> UpcycledCheckpoint:
    """
    Saves an upcycled model as the sparse twin of its base: see [`~native.to_native`]. The code that came with the
    checkpoint is not run: the model is loaded with this package.

    Args:
        source (`str` or `os.PathLike`):
            The upcycled model: a folder, or a name on the Hub.
        output (`str` or `os.PathLike`):
            Folder for the twin and the processor. It gets all of them at once, at the end.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        dtype (`str`, defaults to `"auto"`):
            Type of the weights, by default the source's.
        max_shard_size (`int` or `str`, defaults to `"50GB"`):
            Largest size of a file of weights.
        overwrite (`bool`, defaults to `False`):
            Whether a model in the output folder is replaced.

    Returns:
        [`UpcycledCheckpoint`]

    Raises:
        OSError: If the source cannot be read, or the output cannot be written.
        UpcyclingError: If the source is not an upcycled model, Transformers has no twin of it, or the output folder
            holds a model; nothing is written then.
    """
    output = Path(output)
    check_dtype(dtype)
    check_output(output, source, overwrite)
    options = {} if revision is None else {"revision": revision}
    config = _config_dict(source, revision)
    name = (config.get("architectures") or [""])[0]
    model_class: Any = getattr(modeling_upcycled, name, None)
    if _experts_of(config) is None or model_class is None:
        raise UpcyclingError(f"{source} is not an upcycled model: there is nothing to export.")
    model = model_class.from_pretrained(source, dtype=dtype, **options)
    twin = to_native(model)
    dense = dense_config(model.config)
    processor = load_processor(source, config=dense, **options)
    with whole_folder(output, sum(tensor.nbytes for tensor in twin.state_dict().values())) as stage:
        twin.save_pretrained(stage, max_shard_size=max_shard_size)
        save_processor(processor, stage)
        name = output.resolve().name
        write_model_card(stage, config=twin.config, start=experts_config_of(model.config).start, model_name=name)
    # What was measured when the experts started says nothing about a trained model.
    start = {
        key: value
        for key, value in experts_config_of(model.config).start.items()
        if key not in ("parity", "block_error")
    }
    return UpcycledCheckpoint(
        source=str(source),
        output=str(output),
        model_class=type(twin).__name__,
        start=start,
        dense=costs_of(dense),
        sparse=costs_of(twin),
        processor=class_name(processor),
    )


def _config_dict(source: str | os.PathLike, revision: str | None) -> dict[str, Any]:
    return PreTrainedConfig.get_config_dict(source, **({} if revision is None else {"revision": revision}))[0]


def _experts_of(config: dict[str, Any]) -> Any:
    experts = config.get(SparseMoeVlmExpertsConfig.base_config_key)
    return experts.get("blocks") if isinstance(experts, dict) else None
