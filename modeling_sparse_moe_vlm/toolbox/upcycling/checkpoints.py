"""Upcycling from checkpoint to checkpoint, for models of any size."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, is_gguf_available

from ...experts_config import experts_config_of
from ..hub import write_model_card
from ..meta_model import model_on_meta_device
from ..model_names import check_model_name
from .arrangement import Start
from .blocks import DenseBlocks, find_blocks
from .costs import costs_of
from .dense_checkpoint import DenseCheckpoint, LoadedModel, load_gguf
from .errors import UpcyclingError
from .native import native_on_meta, to_native
from .outcome import UpcycledCheckpoint, class_name
from .output_folder import check_files, whole_folder
from .processors import batches_of, load_processor, save_processor
from .receipt import check_receipt, default_bound
from .router_rows import BlockInputs, collect_block_inputs
from .shard_files import MAX_SHARD_SIZE
from .streaming import write_sparse_weights
from .upcycle import check_arguments, check_base, experts_config, upcycle, with_sparse_blocks
from .written_parity import written_parity


class _Plan(NamedTuple):
    """A dense model and the sparse one that it becomes, both on the meta device."""

    dense: PreTrainedModel
    found: DenseBlocks
    start: Start
    sparse: Any

    def outcome(
        self,
        source: Any,
        output: Path | None = None,
        processor: Any = None,
        twin: PreTrainedModel | None = None,
    ) -> UpcycledCheckpoint:
        made = self.sparse if twin is None else twin
        return UpcycledCheckpoint(
            source=str(source),
            output=None if output is None else str(output),
            model_class=type(made).__name__,
            start=experts_config_of(self.sparse.config).start,
            dense=costs_of(self.dense),
            sparse=costs_of(made),
            processor=class_name(processor),
        )


def plan_checkpoint(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    native: bool = False,
    rows: Sequence[Mapping[str, Any]] = (),
    router_init: str = "random",
    seed: int = 0,
    **request: Any,
) -> UpcycledCheckpoint:
    """
    Describes what [`upcycle_checkpoint`] would write, without reading weights.

    Args:
        source, revision, gguf_file, native, rows, router_init, seed, request:
            See [`upcycle_checkpoint`].

    Returns:
        [`UpcycledCheckpoint`]: The result, in figures.

    Raises:
        OSError, ValueError: Under the same conditions as [`upcycle_checkpoint`].
    """
    plan = _plan(_on_meta(source, revision, gguf_file), router_init, seed, request)
    _inputs(source, gguf_file, revision, rows, router_init)
    return plan.outcome(source, twin=native_on_meta(plan.sparse) if native else None)


def upcycle_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    native: bool = False,
    rows: Sequence[Mapping[str, Any]] = (),
    router_init: str = "random",
    seed: int = 0,
    compare: bool = True,
    parity_bound: float | None = None,
    **request: Any,
) -> UpcycledCheckpoint:
    """
    Turns the checkpoint of a dense model into that of a sparse model, block by block. The result is that of [`upcycle`]
    and `save_pretrained`, but needs no memory for the sparse model. At first, the memory contains at most one sparse
    block, or one of the tensors that both models have. Then, to compare the models, it contains the dense model and one
    sparse block.

    Args:
        source (`str` or `os.PathLike`):
            The dense model: a folder, or a name on the Hub.
        output (`str` or `os.PathLike`):
            Folder for the sparse model, its processor and its model card. All of them appear at once, at the end.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        gguf_file (`str`, *optional*):
            Name of a GGUF file in the source. The whole dense model is then loaded.
        dtype (`str`, defaults to `"auto"`):
            Type of the weights, by default the source's.
        max_shard_size (`int` or `str`, defaults to `"50GB"`):
            Largest size of a file of weights.
        overwrite (`bool`, defaults to `False`):
            Whether to replace a model that is in the output folder already.
        native (`bool`, defaults to `False`):
            Whether to save the result as a class of Transformers: see [`to_native`]. Both models are then in memory.
        rows (`Sequence[dict]`, *optional*):
            Conversations in the form that [`~toolbox.data.VisionLanguageCollator`] takes, which `router_init="data"`
            needs. The models are compared on the first one, or on random tokens if there are none.
        router_init (`str`, defaults to `"random"`):
            See [`upcycle`]. With `"data"`, the whole dense model is loaded.
        seed (`int`, defaults to 0):
            Seed of all random draws.
        compare (`bool`, defaults to `True`):
            Whether to compare the outputs of the models. If `False`, only the blocks are compared, and the dense model
            need not fit into memory.
        parity_bound (`float`, *optional*):
            See [`upcycle`]. It applies to the comparison of the blocks and to that of the models.
        request:
            Further arguments of [`upcycle`]: `expert_groups`, `num_experts`, `layers`, `start`, fields of the experts'
            configuration, ….

    Returns:
        [`UpcycledCheckpoint`]: The result, in figures.

    Raises:
        OSError: If the source cannot be read, or the output cannot be written.
        UpcyclingError: If the model cannot be upcycled, its checkpoint is incomplete, the output folder contains a
            model already, or the outputs differ. Nothing is written then.
        ValueError: If an argument has a wrong value.
    """
    output = Path(output)
    check_files(output, source, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    check_arguments(router_init, seed, parity_bound=parity_bound)
    on_meta, options = _on_meta(source, revision, gguf_file), _given(revision=revision)
    # What cannot be made is refused before any weights are read.
    planned = _plan(on_meta, router_init, seed, request)
    if native:
        native_on_meta(planned.sparse)
    processor, batches = _inputs(source, gguf_file, revision, rows, router_init)

    def load() -> PreTrainedModel:
        if gguf_file is not None:
            return load_gguf(source, gguf_file, type(on_meta), dtype=dtype, **options)
        return type(on_meta).from_pretrained(source, dtype=dtype, **options)

    loaded = load() if native or gguf_file is not None or router_init == "data" else None
    if native:
        request |= _given(router_init=router_init, seed=seed, parity_bound=parity_bound, batch=batches or None)
        return _upcycle_native(loaded, source, output, processor, max_shard_size, request)
    with _open(loaded, source, type(on_meta), dtype=dtype, **options) as checkpoint:
        plan = _plan(checkpoint.on_meta(), router_init, seed, request)
        own = experts_config_of(plan.sparse.config)
        inputs = _block_inputs(loaded, plan, batches, seed) if router_init == "data" else {}
        exact = default_bound(plan.sparse.dtype) if plan.start.is_exact else None
        bound = exact if parity_bound is None else parity_bound
        with whole_folder(output, _size(plan.sparse)) as stage:
            errors = write_sparse_weights(
                checkpoint,
                plan.sparse,
                plan.found,
                plan.start,
                stage,
                seed=seed,
                inputs=inputs,
                max_shard_size=max_shard_size,
            )
            _check_blocks(errors, bound)
            own.start["block_error"] = max(errors.values())
            if compare:
                batch = batches[0] if batches else None
                dense = load() if loaded is None else loaded
                receipt = written_parity(dense, plan.sparse, plan.found, stage, batch=batch, bound=bound, seed=seed)
                check_receipt(receipt)
                own.start["parity"] = receipt.to_dict()
            outcome = plan.outcome(source, output, processor)
            _save_rest(plan.sparse, outcome, processor, stage)
    return outcome


def _upcycle_native(
    dense: Any,
    source: Any,
    output: Path,
    processor: Any,
    max_shard_size: int | str,
    request: Mapping[str, Any],
) -> UpcycledCheckpoint:
    """Does the work of [`upcycle_checkpoint`] with `native=True`: both models are in memory."""
    costs = costs_of(dense)
    sparse = upcycle(dense, **request)
    start = experts_config_of(sparse.config).start
    twin = to_native(sparse)
    with whole_folder(output, _size(twin)) as stage:
        twin.save_pretrained(stage, max_shard_size=max_shard_size)
        save_processor(processor, stage)
        write_model_card(
            stage, config=twin.config, base_model=str(source), start=start, model_name=output.resolve().name
        )
    return UpcycledCheckpoint(
        source=str(source),
        output=str(output),
        model_class=type(twin).__name__,
        start=start,
        dense=costs,
        sparse=costs_of(twin),
        processor=class_name(processor),
    )


def _on_meta(source: str | os.PathLike, revision: str | None, gguf_file: str | None) -> PreTrainedModel:
    """Builds the dense model without weights."""
    options = _given(revision=revision, gguf_file=gguf_file)
    if gguf_file is not None and not is_gguf_available():
        raise UpcyclingError("GGUF files need the package `gguf`: pip install gguf.")
    check_model_name(source, revision, gguf_file or CONFIG_NAME)
    if gguf_file is None and PreTrainedConfig.get_config_dict(source, **options)[0].get("auto_map"):
        raise UpcyclingError(
            f"{source} has custom code, as models that are upcycled already do: only models whose classes are part of "
            "Transformers can be upcycled."
        )
    return model_on_meta_device(AutoConfig.from_pretrained(source, **options))


def _inputs(
    source: str | os.PathLike,
    gguf_file: str | None,
    revision: str | None,
    rows: Sequence[Mapping[str, Any]],
    router_init: str,
) -> tuple[Any, list[Mapping[str, Any]]]:
    """Loads the source's processor, and turns the rows into inputs of the model."""
    processor = load_processor(source, gguf_file, **_given(revision=revision))
    batches = batches_of(processor, rows)
    if router_init == "data" and not batches:
        raise UpcyclingError('`router_init="data"` needs examples: give some as `rows`.')
    return processor, batches


def _plan(dense: PreTrainedModel, router_init: str, seed: int, request: Mapping[str, Any]) -> _Plan:
    """Upcycles a dense model on the meta device."""
    check_base(dense)
    check_arguments(router_init, seed, layers=request.get("layers"), modalities=request.get("modalities"))
    request = {"modalities": None, "placeholders": None, **request}
    found = find_blocks(dense, request.pop("layers", None), request.pop("include_dense_layers_of_moe", False))
    start, config = experts_config(dense, found, seed=seed, router_init=router_init, **request)
    return _Plan(dense, found, start, with_sparse_blocks(dense, found, config))


def _open(
    loaded: PreTrainedModel | None, source: str | os.PathLike, model_class: type[PreTrainedModel], **options: Any
) -> AbstractContextManager[DenseCheckpoint | LoadedModel]:
    if loaded is None:
        return DenseCheckpoint.open(source, model_class, **options)
    return nullcontext(LoadedModel(loaded))


def _block_inputs(
    dense: Any, plan: _Plan, batches: Sequence[Mapping[str, Any]], seed: int
) -> Mapping[int, BlockInputs]:
    own = experts_config_of(plan.sparse.config)
    return collect_block_inputs(
        dense,
        batches,
        plan.found.blocks,
        modalities=own.modalities,
        placeholder_ids=own.placeholder_ids,
        seed=seed,
    )


def _check_blocks(errors: Mapping[int, float], bound: float | None) -> None:
    layer = max(errors, key=lambda layer: errors[layer])
    if bound is not None and errors[layer] > bound:
        raise UpcyclingError(
            f"the sparse block of layer {layer} does not compute what the dense block computes: its outputs differ by "
            f"{errors[layer]:.1e} of the largest, more than {bound:.1e}. Pass `parity_bound=float('inf')` to accept it."
        )


def _save_rest(sparse: Any, outcome: UpcycledCheckpoint, processor: Any, folder: Path) -> None:
    """Saves all but the weights. The configuration is last, because the folder counts as a model only with it."""
    save_processor(processor, folder)
    name = Path(outcome.output or "").resolve().name
    write_model_card(folder, config=sparse.config, base_model=outcome.source, model_name=name)
    sparse.save_pretrained(folder, state_dict={})


def _size(model: PreTrainedModel) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
