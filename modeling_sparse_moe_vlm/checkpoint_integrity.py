"""Checks that the files of a checkpoint are complete and not damaged."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

ADVICE = "copy or download the file again, or save the model again."

# Number of bits per element for each dtype of the format (https://github.com/huggingface/safetensors#format).
_DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

# Names of tensors that a model can have because of a setting that was switched on after the checkpoint was saved.
_OF_SETTINGS = ("e_score_correction_bias", "modality_log_priors")

# Names of files with weights in the older formats of Transformers and PyTorch.
_PICKLED_WEIGHTS = re.compile(r"((pytorch_|adapter_)?model.*|consolidated.*)\.(bin|pt|pth|ckpt|pkl|pickle)")


@contextmanager
def named_damage(checkpoint: str | os.PathLike | None, subfolder: str = "") -> Iterator[None]:
    """
    Context manager for loading a checkpoint, which names the damaged file if loading fails because of it.

    Args:
        checkpoint (`str` or `os.PathLike`, *optional*):
            The checkpoint. Only local folders are checked.
        subfolder (`str`, *optional*, defaults to `""`):
            Subfolder of the checkpoint that contains the weights.

    Raises:
        OSError: If loading failed and a file is damaged or missing, or if the weights are pickles. The message names
            the file and what to do.
    """
    try:
        yield
    except Exception as error:
        if checkpoint is not None and os.path.isdir(checkpoint):
            folder = Path(checkpoint, subfolder)
            try:
                _check_config_file(Path(checkpoint, subfolder, "config.json"))
                refuse_pickles(folder)
                for index in sorted(folder.glob("*.safetensors.index*.json")):
                    weight_map = read_index(index)
                    check_weights((folder / name for name in set(weight_map.values())), weight_map)
                check_weights(sorted(folder.glob("*.safetensors")))
            except OSError as damage:
                raise damage from error
        raise


def _check_config_file(path: Path) -> None:
    """Raises `OSError` if the file of a configuration exists, but does not contain a JSON object."""
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("it is not a JSON object")
    except (ValueError, TypeError, RecursionError) as error:
        raise OSError(f"{path} is damaged, it is not a configuration ({error}): {ADVICE}") from error


def refuse_pickles(folder: str | os.PathLike) -> None:
    """
    Raises `OSError` if a folder has weights only in pickles, which can run code when they are read. The message names
    the file and what to do.
    """
    files = [path for path in Path(folder).iterdir() if path.is_file()]
    pickles = sorted(path for path in files if _PICKLED_WEIGHTS.fullmatch(path.name))
    if pickles and not any(path.suffix == ".safetensors" for path in files):
        raise OSError(
            f"{pickles[0]} is a pickle, which can run code when it is read, so it is refused: convert it to "
            "safetensors with `safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')`."
        )


def check_weights(files: Iterable[str | os.PathLike], weight_map: Mapping[str, str] | None = None) -> None:
    """
    Checks that files with weights are complete and contain the tensors listed in their index. Only the headers are
    read.

    Args:
        files (`Iterable[str | os.PathLike]`):
            The files. Files in formats other than safetensors are ignored.
        weight_map (`Mapping[str, str]`, *optional*):
            The index: name of the file for each tensor.

    Raises:
        OSError: If a file is damaged or missing, or does not contain a tensor, or if the index lists a file elsewhere.
            The message names the file and what to do.
    """
    check_names_of_files(weight_map or {})
    for path in (Path(file) for file in files if os.fspath(file).endswith(".safetensors")):
        try:
            header, start = read_header(path)
        except FileNotFoundError as error:
            raise OSError(f"{path} is missing: {ADVICE}") from error
        size, whole = (
            path.stat().st_size,
            start + max((entry["data_offsets"][1] for entry in header.values()), default=0),
        )
        if size < whole:
            raise OSError(f"{path} is incomplete, it has {size} of {whole} bytes: {ADVICE}")
        if size > whole:
            raise OSError(f"{path} is damaged, it has {size} bytes where its header lists {whole}: {ADVICE}")
        for name, file in (weight_map or {}).items():
            if file == path.name and name not in header:
                raise OSError(f"{path} lacks the tensor {name!r}, which the index lists: {ADVICE}")


def check_names(files: Iterable[str | os.PathLike], expected: Collection[str]) -> None:
    """
    Checks that no tensor is missing because of a flipped bit in its name. Transformers would log a warning and
    initialise such a tensor.

    Args:
        files (`Iterable[str | os.PathLike]`):
            The files of a checkpoint, in safetensors format.
        expected (`Collection[str]`):
            Names that the tensors of the model have in checkpoints.

    Raises:
        OSError: If an unexpected name differs from a missing name in a single bit. The message names the file and what
            to do.
    """
    names = {path: list(read_header(path)[0]) for path in files}
    missing = set(expected).difference(*names.values())
    unexpected = [(path, name) for path in names for name in names[path] if name not in expected]
    for path, name in unexpected:
        for place, bit in itertools.product(range(len(name)), range(7)):
            flipped = chr(ord(name[place]) ^ 1 << bit)
            meant = name[:place] + flipped + name[place + 1 :]
            # Names that differ in a digit can also belong to two layers, unless only one name is unexpected.
            if meant in missing and (len(unexpected) == 1 or not (name[place] + flipped).isdigit()):
                raise OSError(f"{path} is damaged, it has the tensor {name!r} instead of {meant!r}: {ADVICE}")


def check_names_of_files(weight_map: Mapping[str, str]) -> None:
    """Raises `OSError` unless all files of an index are safetensors files beside the index."""
    for tensor, name in weight_map.items():
        if re.fullmatch(r"[^/\\:]+\.safetensors", name) is None:
            raise OSError(
                f"the index of the checkpoint lists the file {name!r} for the tensor {tensor!r}, but its files must be "
                f"safetensors files in the same folder: {ADVICE}"
            )


def check_number_of_weights(files: Iterable[str | os.PathLike], needed: int) -> None:
    """
    Raises `ValueError` if a model has many times the weights of its checkpoint, before memory is allocated for them.

    Args:
        files (`Iterable[str | os.PathLike]`):
            Files of the checkpoint, in safetensors format. Nothing is checked without files.
        needed (`int`):
            Number of weights of the model.
    """
    headers = [read_header(file)[0] for file in files]
    found = sum(math.prod(entry["shape"]) for header in headers for entry in header.values())
    if headers and needed > 4 * found + 2**26:  # a new head can add some
        raise ValueError(
            f"a model of this configuration has {needed:,} weights, but the files of the checkpoint contain {found:,}: "
            "load it with its own configuration."
        )


def check_names_of_tensors(model: PreTrainedModel, report: Mapping[str, Any], checkpoint: str) -> None:
    """
    Checks that a checkpoint has all tensors of a model and no others. Transformers only warns, and initialises missing
    tensors at random. These differences are allowed:

    - a head that is missing or unexpected, and parts of a larger model, if the checkpoint is that of another class
    - router biases and learned priors, which can be switched on later, and whole encoders of further modalities

    Args:
        model (`PreTrainedModel`):
            The loaded model.
        report (`Mapping[str, Any]`):
            The `missing_keys` and `unexpected_keys` that Transformers found.
        checkpoint (`str`):
            Name of the checkpoint in the error message.

    Raises:
        ValueError: If a tensor is missing or unexpected. The message names it.
    """
    is_own = type(model).__name__ in (model.config.architectures or [])
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    state, lacking = model.state_dict(), set(report["missing_keys"])

    def is_new(name: str) -> bool:
        encoder = re.match(r".*?modality_encoders\.\w+\.", name)
        return name.endswith(_OF_SETTINGS) or (
            encoder is not None and lacking.issuperset(key for key in state if key.startswith(encoder[0]))
        )

    def is_inside(name: str) -> bool:
        """Returns whether a name belongs to a part that the model has, such as a layer that it does not have."""
        holder: nn.Module = model.base_model
        parts = name.removeprefix(prefix).split(".")
        while parts[0] in ("model", "language_model") and parts[0] not in holder._modules:
            del parts[0]  # a decoder can be loaded from the whole model
        for part in parts:
            child = holder._modules.get(part)
            if child is None:
                break
            holder = child
        return not isinstance(holder, PreTrainedModel)

    if lacking.issuperset(state) and not report["unexpected_keys"]:
        return  # an empty checkpoint asks for new weights
    missing = [name for name in lacking if (is_own or name.startswith(prefix)) and not is_new(name)]
    unexpected = [name for name in report["unexpected_keys"] if is_own or is_inside(name)]
    if getattr(model, "hf_quantizer", None) is not None:
        unexpected = []  # quantisers add tensors
    faults = [
        f"{fault} {', '.join(map(repr, sorted(names)[:3]))}" + f" and {len(names) - 3} more" * (len(names) > 3)
        for fault, names in (("lacks", missing), ("has no place for", unexpected))
        if names
    ]
    if faults:
        raise ValueError(
            f"the tensors of {checkpoint} are not those of {type(model).__name__}: the "
            + ", and the ".join(f"{'checkpoint' if fault.startswith('lacks') else 'model'} {fault}" for fault in faults)
            + ". Compare `config.json` with the files, or save the checkpoint again. With `output_loading_info=True`, "
            "the differences are returned instead, and missing tensors are initialised."
        )


def read_index(path: str | os.PathLike) -> dict[str, str]:
    """
    Reads the index of a sharded checkpoint.

    Args:
        path (`str` or `os.PathLike`):
            Path of the index, a JSON file.

    Returns:
        `dict[str, str]`: Name of the file for each tensor.

    Raises:
        OSError: If the file is missing or damaged. The message names the file and what to do.
    """
    try:
        weight_map = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("it does not have a file for every tensor")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{path} is damaged, it is not the index of a checkpoint ({error!r}): {ADVICE}") from error
    check_names_of_files(weight_map)
    return weight_map


def read_header(path: str | os.PathLike) -> tuple[dict[str, Any], int]:
    """
    Reads the header of a safetensors file. The file consists of 8 bytes with the length of the header, the header, and
    the data of the tensors.

    Args:
        path (`str` or `os.PathLike`):
            Path of the file.

    Returns:
        `tuple[dict[str, Any], int]`: The `dtype`, `shape` and `data_offsets` of each tensor by its name, and the
        position of the first byte of the data.

    Raises:
        FileNotFoundError: If the file is missing.
        OSError: If the header is incomplete or damaged. The message names the file and what to do. The data of the
            tensors is not checked.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:  # checked before reading, because a damaged length can be huge
            raise OSError(f"{path} is incomplete, it has {size} bytes and no complete header: {ADVICE}")
        content = file.read(length)
    try:
        header = json.loads(content)
        _check_header(header)
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is damaged, its header cannot be read ({error}): {ADVICE}") from error
    header.pop("__metadata__", None)
    return header, 8 + length


def _check_header(header: Any) -> None:
    """Raises `ValueError` unless a header describes tensors that are stored without gaps."""
    if not isinstance(header, dict):
        raise ValueError("it is not a table of tensors")
    metadata = header.get("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise ValueError("its metadata are not strings")
    places = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not (isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= entry.keys()):
            raise ValueError(f"it does not describe the tensor {name!r}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(dtype, str) and dtype in _DTYPE_BITS):
            raise ValueError(f"the tensor {name!r} has the unknown dtype {dtype!r}")
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            raise ValueError(f"the tensor {name!r} has the shape {shape!r} and the offsets {offsets!r}")
        if 8 * (offsets[1] - offsets[0]) != math.prod(shape) * _DTYPE_BITS[dtype]:
            raise ValueError(f"the tensor {name!r} of shape {shape} and dtype {dtype} does not fit in bytes {offsets}")
        places.append((*offsets, name))
    end = 0
    for begin, stop, name in sorted(places):
        if begin != end:
            raise ValueError(f"the tensor {name!r} begins at byte {begin} instead of {end}")
        end = stop


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
