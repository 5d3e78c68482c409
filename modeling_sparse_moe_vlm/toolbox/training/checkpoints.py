"""Finds the newest complete checkpoint, from which an interrupted training resumes."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from transformers import TrainingArguments
from transformers.trainer import (
    FSDP_MODEL_NAME,
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    logging,
)

from ...checkpoint_integrity import ADVICE, check_weights, read_index

_OPTIMIZER = Path(OPTIMIZER_NAME).stem
_DEEPSPEED = "latest"  # the file that names the folder with model, optimizer and scheduler

logger = logging.get_logger(__name__)


def last_whole_checkpoint(arguments: TrainingArguments) -> str:
    """
    Finds the checkpoint from which to resume. `Trainer` resumes from the newest folder, but it writes the files of a
    checkpoint one after the other. If the process is killed meanwhile, the folder cannot be loaded or, worse, can be
    loaded without the optimizer.

    Args:
        arguments (`TrainingArguments`):
            Arguments of the training. With `save_only_model`, checkpoints without an optimizer are also complete.

    Returns:
        `str`: Path for `trainer.train(resume_from_checkpoint=...)`. The first process logs a warning that names the
        newer checkpoints that are incomplete.

    Raises:
        ValueError: If there is no complete checkpoint. The message says what each checkpoint lacks.
    """
    folder = Path(str(arguments.output_dir))
    numbers = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in folder.glob("*/")}
    checkpoints = {path: int(match[1]) for path, match in numbers.items() if match is not None}
    broken: list[str] = []
    for checkpoint in sorted(checkpoints, key=checkpoints.__getitem__, reverse=True):
        damage = _find_damage(checkpoint, arguments.save_only_model)
        if damage is None:
            if broken and arguments.process_index == 0:
                logger.warning(f"{' '.join(broken)} The training resumes from {checkpoint}.")
            return str(checkpoint)
        broken.append(f"The checkpoint {checkpoint} is incomplete: {damage}.")
    raise ValueError(
        f"There is no checkpoint in {folder} to resume from: start without resuming. {' '.join(broken)}".rstrip()
    )


def _find_damage(checkpoint: Path, only_model: bool) -> str | None:
    """Returns what a checkpoint lacks, or which of its files is incomplete; `None` if it is complete."""
    try:
        state = checkpoint / TRAINER_STATE_NAME
        if not state.exists():
            return f"{state} is missing (it is the last file to be written)"
        _check_weights(checkpoint)
        if not (checkpoint / _DEEPSPEED).exists() and not only_model:
            _require(checkpoint, OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, f"{_OPTIMIZER}_*")
            _require(checkpoint, SCHEDULER_NAME)
            _require(checkpoint, "rng_state.pth", "rng_state_0.pth")
        for folder in [*checkpoint.glob(f"{_OPTIMIZER}_*/"), *checkpoint.glob(f"{FSDP_MODEL_NAME}_*/")]:
            _require(folder, ".metadata")  # the last file of one of torch's distributed checkpoints
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            _check_file(path)
    except OSError as error:
        return str(error).removesuffix(f": {ADVICE}")
    return None


def _check_weights(checkpoint: Path) -> None:
    """Raises `OSError` unless the checkpoint contains weights of a model or of adapters, with their configuration."""
    adapters = {
        path.parent for path in checkpoint.rglob("adapter_*") if path.stem in ("adapter_model", "adapter_config")
    }
    for folder in adapters:
        _require(folder, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
        _require(folder, ADAPTER_CONFIG_NAME)
    sharded = list(checkpoint.glob("*.index*.json"))
    for index in sharded:
        weight_map = read_index(index)
        for name in sorted(set(weight_map.values())):
            _require(checkpoint, name)
        check_weights([checkpoint / name for name in set(weight_map.values())], weight_map)
    if sharded or any((checkpoint / name).exists() for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)):
        _require(checkpoint, CONFIG_NAME)
    elif not adapters:
        _require(checkpoint, SAFE_WEIGHTS_NAME, f"{FSDP_MODEL_NAME}*", _DEEPSPEED)


def _require(folder: Path, *patterns: str) -> None:
    """Raises `OSError` unless a folder contains a file or folder that matches one of the patterns."""
    if not any(list(folder.glob(pattern)) for pattern in patterns):
        raise OSError(f"{folder / patterns[0]} is missing")


def _check_file(path: Path) -> None:
    """Raises `OSError` if a file is truncated, as far as its format shows it."""
    if path.suffix == ".safetensors":
        check_weights([path])
    elif path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"{path} is incomplete ({error})") from error
    elif path.suffix in (".pt", ".pth", ".bin"):  # zip archives, whose table of contents is written last
        if not zipfile.is_zipfile(path):
            raise OSError(f"{path} is incomplete")
    elif path.name == ".metadata":
        _check_distributed(path.parent)
    elif path.name == _DEEPSPEED:
        _require(path.parent, path.read_text().strip() or "the folder that it names")


def _check_distributed(folder: Path) -> None:
    try:
        places = FileSystemReader(folder).read_metadata().storage_data.values()
    except Exception as error:  # reading a damaged pickle can raise any error
        raise OSError(f"{folder}/.metadata is incomplete ({error!r})") from error
    for place in places:
        _require(folder, place.relative_path)
        if (folder / place.relative_path).stat().st_size < place.offset + place.length:
            raise OSError(f"{folder}/{place.relative_path} is incomplete")
