"""Upcycling block by block, from the files of the dense model to those of the sparse one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging

from ...checkpoint_conversion import saving_conversions
from ...experts import make_experts
from ...experts_config import experts_config_of
from ...kept_names import check_names_on_disk
from .arrangement import Start
from .block_parity import block_error
from .blocks import DenseBlocks
from .dense_checkpoint import DenseCheckpoint, LoadedModel
from .dense_weights import check_finite
from .errors import UpcyclingError
from .router_rows import BlockInputs
from .shard_files import MAX_SHARD_SIZE, ShardFiles
from .starts import GatedWeights, empty_block, start_block, start_pool


def write_sparse_weights(
    checkpoint: DenseCheckpoint | LoadedModel,
    sparse: PreTrainedModel,
    dense_blocks: DenseBlocks,
    start: Start,
    folder: Path,
    *,
    seed: int = 0,
    inputs: Mapping[int, BlockInputs] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> dict[int, float]:
    """
    Writes the weights of an upcycled model. The files are those that `save_pretrained` writes for a model from
    [`upcycle`]. At any time, the memory contains at most one sparse block, or one of the tensors that are kept. For an
    expert pool, it contains all experts of the pool and one block.

    Args:
        checkpoint ([`DenseCheckpoint`] or [`LoadedModel`]):
            The dense model.
        sparse (`PreTrainedModel`):
            The upcycled model, on the meta device.
        dense_blocks ([`DenseBlocks`]):
            The blocks of the dense model that become sparse.
        start ([`~arrangement.Start`]):
            How the experts start.
        folder (`Path`):
            Folder for the files.
        seed (`int`, defaults to 0):
            Seed of all random draws.
        inputs (`Mapping[int, BlockInputs]`, *optional*):
            Inputs of the dense blocks by layer, from which the router rows are computed. Without them, the rows are
            random.
        max_shard_size (`int` or `str`, defaults to `"50GB"`):
            Largest size of one file.

    Returns:
        `dict[int, float]`: Difference between the outputs of the sparse and the dense block, by layer: see
        [`~block_parity.block_error`].

    Raises:
        UpcyclingError: If a weight of the dense model is NaN or infinite, or if the dense checkpoint lacks tensors of
            the sparse model.
        ValueError: If two tensors of the sparse model would be written under the same name.
    """
    return _Run(checkpoint, sparse, dense_blocks, start, folder, seed, inputs or {}, max_shard_size).write()


class _Run:
    """One call of [`write_sparse_weights`]."""

    def __init__(
        self,
        checkpoint: DenseCheckpoint | LoadedModel,
        sparse: PreTrainedModel,
        dense_blocks: DenseBlocks,
        start: Start,
        folder: Path,
        seed: int,
        inputs: Mapping[int, BlockInputs],
        max_shard_size: int | str,
    ) -> None:
        self.checkpoint, self.sparse, self.start, self.seed, self.inputs = checkpoint, sparse, start, seed, inputs
        self.config = experts_config_of(sparse.config)
        self.blocks = {block.layer: block for block in dense_blocks.blocks}
        self.pools = f"{dense_blocks.decoder}.expert_pools".removeprefix(".")
        self.parameters = {name for name, _ in checkpoint.model.named_parameters()}
        self.errors: dict[int, float] = {}
        # Looked up once for all tensors, because each look-up builds the base model.
        sparse._weight_conversions = saving_conversions(sparse)
        sparse.tie_weights()
        self.state = remove_tied_weights_from_state_dict(self._planned_state(), sparse)
        check_names_on_disk(sparse, self.state)
        on_disk = revert_weight_conversion(sparse, dict(self.state))
        self.files = ShardFiles(folder, on_disk, sparse.num_parameters(), max_shard_size)

    def write(self) -> dict[int, float]:
        with logging.tqdm(total=len(self.files.missing), desc="Upcycling", unit=" tensors") as self.progress:
            for pool, layers in self.config.pools.items():
                experts = self._write_pool(pool)
                for layer in layers:
                    self._write_block(layer, experts)
            for layer in self.blocks:
                if self.config.layer_pool(layer) is None:
                    self._write_block(layer)
            self._write_rest()
        if self.files.missing:
            raise UpcyclingError(f"the dense checkpoint lacks {', '.join(list(self.files.missing)[:6])}.")
        return dict(sorted(self.errors.items()))

    def _planned_state(self) -> dict[str, torch.Tensor]:
        """Returns the tensors of the sparse model on the meta device, with the types that will be written."""
        state, dense = self.sparse.state_dict(), self.checkpoint.model.state_dict()
        for name in state.keys() & dense.keys():
            state[name] = state[name].to(self.checkpoint.dtype_of(name))
        for layer, block in self.blocks.items():
            planned = empty_block(self.config, layer, self._dtype(layer), "meta").state_dict()
            state |= {f"{block.name}.{name}": tensor for name, tensor in planned.items()}
        for pool in self.config.pools:
            planned = self._empty_pool(pool, "meta").state_dict()
            state |= {f"{self.pools}.{pool}.{name}": tensor for name, tensor in planned.items()}
        return {
            name: tensor for name, tensor in state.items() if name not in (self.sparse._keys_to_ignore_on_save or ())
        }

    def _write_block(self, layer: int, pooled_experts: nn.Module | None = None) -> None:
        name = self.blocks[layer].name
        weights = self._weights(layer)
        block = empty_block(self.config, layer, self._dtype(layer))
        start_block(block, self.config, weights, self.start, seed=self.seed, inputs=self.inputs.get(layer))
        self._write({f"{name}.{key}": tensor for key, tensor in block.state_dict().items()})
        self.errors[layer] = block_error(block.float(), self.config, weights, pooled_experts)

    def _write_pool(self, pool: int) -> nn.Module:
        """Writes the experts of a pool and returns them in float32."""
        experts = self._empty_pool(pool, "cpu")
        weights = (self._weights(layer) for layer in self.config.pools[pool])
        start_pool(experts, self.config, pool, weights, self.start, seed=self.seed)
        self._write({f"{self.pools}.{pool}.{key}": tensor for key, tensor in experts.state_dict().items()})
        return experts.float()

    def _write_rest(self) -> None:
        """Writes the tensors that the sparse model has in common with the dense model."""
        replaced = tuple(f"{block.name}." for block in self.blocks.values())
        left = [name for name in self.checkpoint.names if not name.startswith(replaced)]
        while left:
            loaded = self._read(left[:1])
            left = [name for name in left if name not in loaded]
            tied = {name for name in loaded if name not in self.state}
            self._write({name: tensor for name, tensor in loaded.items() if name not in tied})
            for name in tied:
                self._write_tied(name, loaded[name])

    def _write_tied(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor that the sparse model saves under the name of another tensor, to which it is tied."""
        pairs = self.sparse.all_tied_weights_keys.items()
        kept = next(other for pair in pairs if name in pair for other in pair if other in self.state)
        if kept not in self.checkpoint.names:
            self._write({kept: tensor})
        elif not torch.equal(self.checkpoint.read([kept])[kept], tensor):
            raise UpcyclingError(
                f"{name} and {kept} differ in the checkpoint, but its configuration ties them: set "
                "`tie_word_embeddings` to false there."
            )

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        on_disk = revert_weight_conversion(self.sparse, tensors)
        self.files.write(on_disk)
        self.progress.update(len(on_disk))

    def _weights(self, layer: int) -> GatedWeights:
        block = self.blocks[layer]
        places = {part: (f"{block.name}.{name}", rows) for part, (name, rows) in block.parameters.items()}
        loaded = self._read(name for name, _ in places.values())
        parts = {part: loaded[name] if rows is None else loaded[name][rows] for part, (name, rows) in places.items()}
        return GatedWeights(**parts)

    def _read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Reads tensors of the dense model. Parameters must be finite, but not buffers, because some are masks."""
        loaded = self.checkpoint.read(names)
        check_finite((name, tensor) for name, tensor in loaded.items() if name in self.parameters)
        return loaded

    def _dtype(self, layer: int) -> torch.dtype:
        block = self.blocks[layer]
        return self.checkpoint.dtype_of(f"{block.name}.{block.parameters['gate'][0]}")

    def _empty_pool(self, pool: int, device: str) -> nn.Module:
        first = self.config.pools[pool][0]
        with torch.device("meta"):
            experts = make_experts(self.config, self.config.layer_expert_groups(first, always_on=False))
        return experts.to(self._dtype(first)).to_empty(device=device)
