"""Export of the checkpoint of an upcycled model, before or after training, to the sparse twin of its base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from ... import modeling_upcycled
from ...experts_config import SparseMoeVlmExpertsConfig, experts_config_of
from ..hub import write_model_card
from ..meta_model import model_on_meta_device
from ..model_names import check_model_name
from .costs import costs_of
from .errors import UpcyclingError
from .native import ROUTER_BIAS, dense_config, native_on_meta, to_native
from .outcome import UpcycledCheckpoint, class_name
from .output_folder import check_files, whole_folder
from .processors import load_processor, save_processor
from .shard_files import MAX_SHARD_SIZE


def is_upcycled_checkpoint(source: str | os.PathLike, revision: str | None = None) -> bool:
    """Returns whether a checkpoint (a folder, or a model on the Hub) is an upcycled model."""
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
            Folder for the twin, the processor and the model card. All of them appear at once, at the end.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        dtype (`str`, defaults to `"auto"`):
            Type of the weights, by default the source's.
        max_shard_size (`int` or `str`, defaults to `"50GB"`):
            Largest size of a file of weights.
        overwrite (`bool`, defaults to `False`):
            Whether to replace a model that is in the output folder already.

    Returns:
        [`UpcycledCheckpoint`]

    Raises:
        OSError: If the source cannot be read, or the output cannot be written.
        UpcyclingError: If the source is not an upcycled model, Transformers has no twin of it, or the output folder
            contains a model already. Nothing is written then.
    """
    output = Path(output)
    check_files(output, source, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    options = {} if revision is None else {"revision": revision}
    model_class, config = _upcycled_class(source, revision)
    native_on_meta(model_on_meta_device(config))  # before any weights are read
    model = model_class.from_pretrained(source, dtype=dtype, **options)
    twin = to_native(model)
    dense = dense_config(config)
    processor = load_processor(source, config=dense, **options)
    with whole_folder(output, sum(tensor.nbytes for tensor in twin.state_dict().values())) as stage:
        twin.save_pretrained(stage, max_shard_size=max_shard_size)
        save_processor(processor, stage)
        name = output.resolve().name
        write_model_card(stage, config=twin.config, start=experts_config_of(config).start, model_name=name)
    return _outcome(source, config, twin, output=str(output), processor=class_name(processor))


def plan_export(source: str | os.PathLike, *, revision: str | None = None) -> UpcycledCheckpoint:
    """
    Describes what [`export_checkpoint`] would write. It reads no weights except the biases of routers, since a twin may
    be unable to have biases that are not zero. If the source is on the Hub, they count as not zero.

    Args:
        source, revision:
            See [`export_checkpoint`].

    Returns:
        [`UpcycledCheckpoint`]

    Raises:
        OSError, UpcyclingError: Under the same conditions as [`export_checkpoint`].
    """
    _, config = _upcycled_class(source, revision)
    bias = None
    if experts_config_of(config).router_bias_update_rate is not None:
        bias = _trained_bias(Path(source)) if os.path.isdir(source) else torch.ones(())
    return _outcome(source, config, native_on_meta(model_on_meta_device(config), bias))


def _upcycled_class(source: str | os.PathLike, revision: str | None) -> tuple[Any, Any]:
    """Returns this package's class for the upcycled model in a checkpoint, and its configuration."""
    found = _config_dict(source, revision)
    model_class: Any = getattr(modeling_upcycled, (found.get("architectures") or [""])[0], None)
    if _experts_of(found) is None or model_class is None:
        raise UpcyclingError(f"{source} is not an upcycled model: there is nothing to export.")
    return model_class, model_class.config_class.from_dict(found)


def _trained_bias(folder: Path) -> torch.Tensor | None:
    """Returns a router's bias `(num_modalities, E)` that differs by modality, or else one that is not zero, if any."""
    found = None
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                bias = file.get_tensor(name) if name.endswith(ROUTER_BIAS) else torch.zeros(1)
                if not bias.equal(bias[:1].expand_as(bias)):
                    return bias
                found = bias if bias.any() else found
    return found


def _outcome(
    source: Any, config: Any, twin: PreTrainedModel, output: str | None = None, processor: str | None = None
) -> UpcycledCheckpoint:
    # These figures were measured at the start, and say nothing about a trained model.
    measured = ("parity", "block_error")
    start = {key: value for key, value in experts_config_of(config).start.items() if key not in measured}
    return UpcycledCheckpoint(
        source=str(source),
        output=output,
        model_class=type(twin).__name__,
        start=start,
        dense=costs_of(dense_config(config)),
        sparse=costs_of(twin),
        processor=processor,
    )


def _config_dict(source: str | os.PathLike, revision: str | None) -> dict[str, Any]:
    check_model_name(source, revision)
    return PreTrainedConfig.get_config_dict(source, **({} if revision is None else {"revision": revision}))[0]


def _experts_of(config: dict[str, Any]) -> Any:
    experts = config.get(SparseMoeVlmExpertsConfig.base_config_key)
    return experts.get("blocks") if isinstance(experts, dict) else None
