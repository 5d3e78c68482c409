"""Reading the checkpoint of a dense model a few tensors at a time, as the library would load them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from transformers import GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, load_state_dict
from transformers.utils import logging

from ...checkpoint_integrity import check_weights
from ..meta_model import model_on_meta_device
from .errors import UpcyclingError


class DenseCheckpoint:
    """
    A model on the meta device, and the files with its weights. The library converts and loads the tensors, so their
    names and types are those of a loaded model. Nothing that was read is kept in memory.

    Args:
        model (`PreTrainedModel`):
            The model, on the meta device.
        files (`list[str]`):
            Files with its weights, in the format of safetensors or PyTorch.
        load_config (`LoadStateDictConfig`):
            Settings with which the library would load them.

    Attributes:
        model (`PreTrainedModel`): The model; its `_weight_conversions` are those that the files need.
        names (`list[str]`): Names of the model's tensors that are in the files, in their natural order.

    Raises:
        OSError: If a file is damaged or missing.
        UpcyclingError: If the model is quantised, or if its tensors are not those in the files. The message names them.
    """

    def __init__(self, model: PreTrainedModel, files: list[str], load_config: LoadStateDictConfig) -> None:
        if load_config.hf_quantizer is not None:
            raise UpcyclingError("the model is quantised: upcycle its checkpoint in full precision.")
        self.model = model
        self._load_config = replace(load_config, sharded_metadata=None)
        check_weights(files, (load_config.sharded_metadata or {}).get("weight_map"))
        tensors: dict[str, Any] = {}
        with ExitStack() as opened:
            for file in files:
                if file.endswith(".safetensors"):
                    # Mapped into memory, the pages that were read would stay there.
                    pointer = opened.enter_context(safe_open(file, framework="pt", backend="pread"))
                    tensors |= {name: pointer.get_slice(name) for name in pointer.keys()}  # noqa: SIM118
                else:
                    tensors |= load_state_dict(file)
            unknown = self._find_units(tensors)
            self._check_names(unknown)
            self._files = opened.pop_all()

    @classmethod
    def open(cls, source: str | os.PathLike, model_class: type[PreTrainedModel], **options: Any) -> DenseCheckpoint:
        """
        Opens a checkpoint.

        Args:
            source (`str` or `os.PathLike`):
                Folder, or name on the Hub.
            model_class (`type[PreTrainedModel]`):
                Class of the model.
            options:
                Further arguments of `from_pretrained`, such as `dtype` and `revision`.

        Returns:
            [`DenseCheckpoint`]: a context manager, which closes the files.
        """
        found: dict[str, Any] = {}

        class WithoutWeights(model_class):
            @staticmethod
            def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
                found.update(files=checkpoint_files, load_config=load_config)
                return None, None

            @staticmethod
            def _finalize_model_loading(model, load_config, loading_info):
                return loading_info

        # The library looks up conversions and options by the name and the module of a class.
        WithoutWeights.__name__, WithoutWeights.__module__ = model_class.__name__, model_class.__module__
        model = WithoutWeights.from_pretrained(source, **options)
        model.__class__ = model_class
        return cls(model, **found)

    def __enter__(self) -> DenseCheckpoint:
        return self

    def __exit__(self, *_: Any) -> None:
        self._files.close()

    def on_meta(self) -> PreTrainedModel:
        """Returns the model on the meta device."""
        return self.model

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the type that a tensor of the model has after loading."""
        plan = self._load_config.dtype_plan or {}
        if plan:
            pattern, by_group, _ = build_glob_alternation(list(plan))
            found = pattern.search(name)
            if found is not None and found.lastgroup is not None:
                return plan[by_group[found.lastgroup]]
        return self.model.get_parameter_or_buffer(name).dtype

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """
        Loads some tensors.

        Args:
            names (`Iterable[str]`):
                Names of tensors, out of [`names`].

        Returns:
            `dict[str, torch.Tensor]`: These tensors by their names in the model, and others that the files store in one
            tensor with them.

        Raises:
            UpcyclingError: If the shape of a tensor in the files differs from its shape in the model.
        """
        units = list(dict.fromkeys(self._unit_of[name] for name in names))
        on_meta = self.model.state_dict(keep_vars=True)
        state = {key: tensor for unit in units for key, tensor in self._units[unit].items()}
        with _no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(self.model, state, self._load_config)
        self.model._weight_conversions = self._conversions
        for name, found, expected in info.mismatched_keys:
            raise UpcyclingError(
                f"{name} has the shape {list(found)} in the checkpoint, but {list(expected)} according to its "
                "configuration."
            )
        loaded = {}
        for name in sorted(set(on_meta) - info.missing_keys, key=dot_natural_key):
            loaded[name] = self.model.get_parameter_or_buffer(name).detach()
            module, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(module), leaf, on_meta[name])
        return loaded

    def pieces(self, name: str) -> dict[str, Any]:
        """Returns the tensors in the files that a tensor of the model is made of, by name. `[...]` reads them."""
        return self._units[self._unit_of[name]]

    def _find_units(self, tensors: dict[str, Any]) -> set[str]:
        """
        Finds the tensors in the files that each tensor of the model is made of, as the library does in loading. Returns
        the names that the model does not know.
        """
        own = self.model.state_dict()
        steps = self._load_config.weight_mapping or []
        renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        targets = {pattern: step.target_patterns for step in converters for pattern in step.source_patterns}
        prefix = self.model.base_model_prefix
        self._units: dict[str, dict[str, Any]] = {}  # by the first name in the model
        self._unit_of: dict[str, str] = {}
        unknown = set()
        for key in sorted(tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, own)
            if name not in own and key in own:
                name, pattern = rename_source_key(key, [], [], prefix, own)
            if name not in own:
                unknown.add(name)
                continue
            # Tensors that are only renamed get their new names here, because some renamings depend on earlier keys.
            self._units.setdefault(name, {})[name if pattern is None else key] = tensors[key]
            made = targets[pattern] if pattern is not None else [""]
            self._unit_of |= {name.replace(made[0], target): name for target in made}
        self.names = [name for name in sorted(own, key=dot_natural_key) if name in self._unit_of]
        self._conversions = [step for step in steps if step.was_used()]
        self.model._weight_conversions = self._conversions
        return unknown

    def _check_names(self, unknown: set[str]) -> None:
        """Raises `UpcyclingError` if the files lack a tensor of the model, or have one that it does not know."""
        with _no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(self.model, {}, self._load_config)
        self.model._weight_conversions = self._conversions
        present = set(self.names)
        info.missing_keys, info.unexpected_keys = set(self.model.state_dict()) - present, unknown
        self.model._adjust_missing_and_unexpected_keys(info)
        for names in self.model.all_tied_weights_keys.items():
            if present.intersection(names):
                info.missing_keys -= set(names)
        for fault, names in (("lacks", info.missing_keys), ("has no place for", info.unexpected_keys)):
            if names:
                listed = ", ".join(sorted(names, key=dot_natural_key)[:6])
                more = f" and {len(names) - 6} more" if len(names) > 6 else ""
                raise UpcyclingError(
                    f"{'the checkpoint' if fault == 'lacks' else type(self.model).__name__} {fault} {listed}{more}. "
                    "Load it with `from_pretrained`, and read its report. If the loaded model is right, "
                    "upcycle that model."
                )


class LoadedModel:
    """
    A model in memory, with the interface of [`DenseCheckpoint`].

    Args:
        model (`PreTrainedModel`):
            The dense model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._state = model.state_dict()
        self.names = sorted(self._state, key=dot_natural_key)

    def on_meta(self) -> PreTrainedModel:
        """Returns a model of the same class and configuration on the meta device."""
        model = model_on_meta_device(self.model, self.model.dtype)
        model.generation_config = copy.deepcopy(self.model.generation_config)
        return model

    def dtype_of(self, name: str) -> torch.dtype:
        """See [`DenseCheckpoint.dtype_of`]."""
        return self._state[name].dtype

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """See [`DenseCheckpoint.read`]."""
        return {name: self._state[name] for name in names}


def load_gguf(
    source: str | os.PathLike, gguf_file: str, model_class: type[PreTrainedModel], **options: Any
) -> PreTrainedModel:
    """
    Loads a model from a GGUF file in full precision.

    Args:
        source (`str` or `os.PathLike`):
            Folder, or name on the Hub.
        gguf_file (`str`):
            Name of the file in the source.
        model_class (`type[PreTrainedModel]`):
            Class of the model.
        options:
            Further arguments of `from_pretrained`, such as `dtype` and `revision`.

    Returns:
        `PreTrainedModel`: The model, with dequantised weights.
    """
    in_full = GgufConfig(dequantize=True)
    return model_class.from_pretrained(source, gguf_file=gguf_file, quantization_config=in_full, **options)


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Returns the class that a configuration names, or else the class for images and text if there is one."""
    return type(model_on_meta_device(config))


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Disables the progress bar that the library shows whenever it loads tensors."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
