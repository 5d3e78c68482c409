"""The parity receipt of a model in files, which are read with one sparse block in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from ...checkpoint_conversion import MATRICES, loading_conversions
from ...experts_config import experts_config_of
from .blocks import DenseBlocks
from .dense_checkpoint import DenseCheckpoint
from .errors import UpcyclingError
from .receipt import ParityReceipt, dense_outputs, made_batch, parity
from .upcycle import make_sparse


def written_parity(
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    found: DenseBlocks,
    folder: Path,
    *,
    batch: Mapping[str, Any] | None = None,
    bound: float | None = None,
    seed: int = 0,
) -> ParityReceipt:
    """
    Compares the files of an upcycled model with the dense model. The memory contains what both models have in common,
    and either the dense blocks or one sparse block.

    Args:
        dense (`PreTrainedModel`):
            The dense model, loaded. It is turned into the sparse model, without the weights of its blocks.
        sparse (`PreTrainedModel`):
            The upcycled model, on the meta device.
        found ([`DenseBlocks`]):
            The blocks that became sparse.
        folder (`Path`):
            Folder with the weights of the upcycled model.
        batch (`Mapping[str, Any]`, *optional*):
            Inputs of both models; random tokens by default.
        bound (`float`, *optional*):
            See [`ParityReceipt`].
        seed (`int`, defaults to 0):
            Seed of the random tokens.

    Raises:
        UpcyclingError: If tensors that both models have differ, or if the dense model does not run on text only and
            there is no `batch`.
    """
    config = experts_config_of(sparse.config)
    placeholders = {token for ids in config.placeholder_ids.values() for token in ids}
    inputs = made_batch(dense, placeholders, seed) if batch is None else batch
    try:
        outputs = dense_outputs(dense, inputs)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        if batch is not None:
            raise
        raise UpcyclingError(
            f"{type(dense).__name__} does not run on text only ({error}), so its outputs cannot be compared: give "
            "examples, or leave the comparison out."
        ) from error
    with _open_written(sparse, folder) as written:
        _check_rest(dense, written, found)
        for block in found.blocks:
            dense.get_submodule(block.name).to("meta")
        make_sparse(dense, config)
        stacks: dict[Any, torch.Tensor] = {}
        for name, module in _sparse_modules(dense, found).items():
            _read_when_called(name, module, written, stacks)
        return parity(outputs, dense, inputs, is_given=batch is not None, bound=bound)


def _check_rest(dense: PreTrainedModel, written: DenseCheckpoint, found: DenseBlocks) -> None:
    """Raises `UpcyclingError` unless the tensors that both models have are equal in the files."""
    state = dense.state_dict()
    shared = [name for name in written.names if name in state]
    while shared:
        for name, tensor in written.read(shared[:1]).items():
            shared.remove(name)
            if not torch.equal(tensor, state[name].cpu()):
                raise UpcyclingError(f"the tensor {name} in the files differs from that of the dense model.")


def _sparse_modules(model: Any, found: DenseBlocks) -> dict[str, nn.Module]:
    """Returns the sparse blocks and the experts of pools, by name."""
    blocks = {block.name: model.get_submodule(block.name) for block in found.blocks}
    pools = f"{found.decoder}.expert_pools".removeprefix(".")
    numbers = experts_config_of(model.config).pools
    return blocks | {f"{pools}.{number}": model.get_submodule(f"{pools}.{number}") for number in numbers}


def _open_written(sparse: PreTrainedModel, folder: Path) -> DenseCheckpoint:
    model = copy.deepcopy(sparse)
    of_library = model.library_conversions(get_model_conversion_mapping(model))
    load_config = LoadStateDictConfig(
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        weight_mapping=loading_conversions(model, of_library),
    )
    return DenseCheckpoint(model, [str(path) for path in sorted(folder.glob("*.safetensors"))], load_config)


def _read_when_called(name: str, module: nn.Module, written: DenseCheckpoint, stacks: dict[Any, torch.Tensor]) -> None:
    """
    Makes a module on the meta device read its weights when it is called, and release them afterwards. The memory of
    stacks is reused by the next module, because releasing it each time would fragment the memory.
    """
    on_meta = {key: tensor.to("meta") for key, tensor in module.state_dict().items()}

    def read(*_: Any) -> None:
        for key, tensor in on_meta.items():
            full = f"{name}.{key}"
            if tensor.dim() == 3:
                place = (key, tensor.shape, tensor.dtype)
                if place not in stacks:
                    stacks[place] = torch.empty_like(tensor, device="cpu")
                _read_stack(full, stacks[place], written)
                value = stacks[place]
            else:
                value = written.read([full])[full]
            module.load_state_dict({key: value}, strict=False, assign=True)

    def forget(*_: Any) -> None:
        module.to("meta")

    module.register_forward_pre_hook(read)
    module.register_forward_hook(forget)


def _read_stack(name: str, stack: torch.Tensor, written: DenseCheckpoint) -> None:
    """Reads experts one by one. Loading a stack with the library would need three times its memory."""
    matrices, pieces = MATRICES[name.rpartition(".")[2]], written.pieces(name)
    for expert, of_expert in enumerate(stack):
        for matrix, place in zip(matrices, of_expert.chunk(len(matrices)), strict=True):
            ending = f".{expert}.{matrix}.weight"
            place.copy_(next(piece for key, piece in pieces.items() if key.endswith(ending))[...])
