"""Writing a checkpoint tensor by tensor, in any order. The files are those that `save_pretrained` writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .errors import UpcyclingError

MAX_SHARD_SIZE = "50GB"  # the default of `save_pretrained`

# Names of types in the file format. The library sorts tensors by type, in the reverse order.
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES)}


class ShardFiles:
    """
    The files of a checkpoint, to which tensors of known names, shapes and types are written one at a time. Nothing is
    kept in memory.

    Args:
        folder (`Path`):
            Folder for the files.
        tensors (`Mapping[str, torch.Tensor]`):
            All tensors of the checkpoint in their order, on the meta device.
        num_parameters (`int`):
            Number of parameters of the model, for the index.
        max_shard_size (`int` or `str`, defaults to `"50GB"`):
            Largest size of one file, in the form that `save_pretrained` takes.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, torch.Tensor],
        num_parameters: int,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> None:
        self.missing = dict(tensors)
        self._places: dict[str, tuple[Path, int]] = {}
        # Views of one tensor are stored in one file, like tensors that share memory.
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
            get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
            filename_pattern=SAFE_WEIGHTS_NAME.replace(".", "{suffix}."),
            max_shard_size=max_shard_size,
        )
        for file, names in split.filename_to_tensors.items():
            self._begin(folder / file, {name: tensors[name] for name in names})
        if split.is_sharded:
            metadata = {"total_parameters": num_parameters, **split.metadata}
            index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
            content = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(content, encoding="utf-8")

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """
        Writes some of the tensors.

        Args:
            tensors (`Mapping[str, torch.Tensor]`):
                Tensors by name.

        Raises:
            ValueError: If the checkpoint has no such tensor, or has it already, or if its shape or type differs.
        """
        for name, tensor in tensors.items():
            planned = self.missing.pop(name, None)
            if planned is None or (planned.shape, planned.dtype) != (tensor.shape, tensor.dtype):
                found = f"{list(tensor.shape)} of {tensor.dtype}"
                expected = "nothing more" if planned is None else f"{list(planned.shape)} of {planned.dtype}"
                raise ValueError(f"the checkpoint expects {expected} under the name {name!r}, got {found}.")
            path, offset = self._places[name]
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _begin(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Creates a file with its header and space for its tensors: see [`~checkpoint_integrity.read_header`]."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin, offsets = 0, {}
        for name in _sorted(tensors):
            tensor = tensors[name]
            offsets[name], end = begin, begin + tensor.element_size() * math.prod(tensor.shape)
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            begin = end
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        content += b" " * (-len(content) % 8)
        data = 8 + len(content)
        with path.open("wb") as file:
            file.write(len(content).to_bytes(8, "little") + content)
            file.truncate(data + begin)
        self._places |= {name: (path, data + offset) for name, offset in offsets.items()}


def check_shard_size(max_shard_size: int | str) -> None:
    """Raises `UpcyclingError` unless a size is a number of bytes or a text such as `"5GB"`."""
    try:
        split_state_dict_into_shards_factory(
            {"": 0}, get_storage_size=int, filename_pattern="{suffix}", max_shard_size=max_shard_size
        )
    except (TypeError, ValueError) as error:
        raise UpcyclingError(
            f'`max_shard_size` must be a number of bytes, or a text such as "5GB", got {max_shard_size!r}.'
        ) from error


def _sorted(tensors: Mapping[str, torch.Tensor]) -> Iterable[str]:
    return sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
