"""What every model with experts of this package does with checkpoints, adapters and processes, of any architecture."""

import copy
import difflib
import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform, revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .checkpoint_conversion import (
    check_device_map,
    check_experts,
    convert_from_disk,
    loading_conversions,
    saving_conversions,
)
from .checkpoint_integrity import check_names, check_weights, named_damage
from .checks import check
from .code_revisions import warn_of_other_code
from .experts import init_expert_weights
from .experts_config import SparseMoeVlmExpertsConfig, experts_config_of
from .lora_targets import AdapterConfigs
from .parallel_plans import is_one_of_several_processes, mend_parallelism, prepare_plans
from .quantization import warn_of_unquantised_experts
from .staged_saves import staged_folder

logger = logging.get_logger(__name__)


class ExpertsHost(PreTrainedModel):
    """
    Base class of models with experts of this package. The configuration's `fields_of_loading` names the fields of the
    experts' configuration that `from_pretrained` takes as keyword arguments.
    """

    # The library looks for the decorator in the file of this class, but the experts have their own.
    _can_set_experts_implementation_cached_value = True
    peft_config = AdapterConfigs()

    @classmethod
    def from_pretrained(cls, *args, config=None, num_expert_shards: int | None = None, **kwargs):
        r"""
        See [`~transformers.PreTrainedModel.from_pretrained`].

        Args:
            num_expert_shards (`int`, *optional*):
                Number of modules that the experts of every group are cut into, so that a device map can spread them
                (`mlp.experts.shards.0`, …). Whatever it is, the same checkpoint is read and written.
            kwargs:
                Options of the library, or fields of the configuration or of its experts' configuration (in this
                package's architecture its `text_config`), such as `output_router_logits` and `num_experts_per_tok`.

        Raises:
            TypeError: If a keyword argument is neither.
        """
        if num_expert_shards is not None:
            kwargs["num_expert_shards"] = num_expert_shards
        if isinstance(config, PreTrainedConfig):
            config, kwargs = _with_fields(config, kwargs)
        # Otherwise the configuration takes its fields when it is read.
        checkpoint = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if kwargs.get("trust_remote_code") and checkpoint is not None:
            warn_of_other_code(cls, checkpoint, kwargs.get("revision"))
        with named_damage(checkpoint, kwargs.get("subfolder") or ""), _named_argument(cls.config_class):
            return super().from_pretrained(*args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        config, kwargs = _with_fields(config, kwargs)
        with _named_argument(cls.config_class):
            return super()._from_config(config, **kwargs)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> Any:
        """As the library's, but by default experts run by what takes their widths in any type they may get."""
        if requested_experts is None and self._widths_other_than(16 // torch.float16.itemsize):
            return "eager"
        return super().get_correct_experts_implementation(requested_experts)

    def _grouped_mm_can_dispatch(self) -> bool:
        """As the library's, and raises `ValueError` for widths that torch's kernels do not take."""
        dtypes = (parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        multiple = 16 // next(dtypes, torch.get_default_dtype()).itemsize
        odd = self._widths_other_than(multiple)
        check(
            not odd,
            f'`experts_implementation="grouped_mm"` needs widths that are multiples of {multiple}, which {odd} are '
            'not: use "eager" (the default then) or "batched_mm".',
        )
        return super()._grouped_mm_can_dispatch()

    def _widths_other_than(self, multiple: int) -> dict[str, int]:
        """The widths that are no such multiples: grouped products want rows of whole 16 bytes."""
        config = experts_config_of(self.config)
        widths = {"hidden_size": config.hidden_size} | {
            f"expert_groups[{group['name']!r}].intermediate_size": group["intermediate_size"]
            for group in config.expert_groups
            if not group["always_on"]
        }
        return {name: width for name, width in widths.items() if width % multiple}

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        """
        As the library's, which notices late, or not at all, that files are damaged, or that a device map or the experts
        of a checkpoint do not fit the model. The model brings its own conversions: the library keeps one table of them
        per model type.
        """
        if load_config.device_map is not None:
            check_device_map(model, load_config.device_map)
        files = [file for file in checkpoint_files or () if file.endswith(".safetensors")]
        check_weights(files, (load_config.sharded_metadata or {}).get("weight_map"))
        if expected_keys is None:  # not the keys of an adapter
            of_library = model.library_conversions(load_config.weight_mapping or [])
            steps = loading_conversions(model, of_library, load_config.hf_quantizer)
            renamings = [step for step in steps if isinstance(step, WeightRenaming)]
            try:
                check_experts(model, state_dict, checkpoint_files, renamings, load_config.ignore_mismatched_sizes)
            except ValueError:
                _check_names(model, files)
                raise
            load_config = replace(load_config, weight_mapping=steps)
        loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)
        info = loaded[0]
        if info.unexpected_keys and info.missing_keys and load_config.device_mesh is None:
            _check_names(model, files)
        if info.mismatched_keys and not load_config.ignore_mismatched_sizes:
            name, found, needed = min(info.mismatched_keys)
            raise RuntimeError(
                f"Size mismatch: {name!r} has the shape {list(found)} in the checkpoint, but {list(needed)} in a model "
                f"of this configuration ({len(info.mismatched_keys) - 1} more tensors differ). Load it with its own "
                "configuration, or pass `ignore_mismatched_sizes=True` to initialise what differs."
            )
        if expected_keys is None:
            warn_of_unquantised_experts(model, load_config.hf_quantizer)
        return loaded

    def library_conversions(self, found: list[WeightTransform] | None = None) -> list[WeightTransform]:
        """
        The conversions that the library knows for this model's checkpoints.

        Args:
            found (`list[WeightTransform]`, *optional*):
                Those that the library has found while loading; looked up when `None`.
        """
        return get_model_conversion_mapping(self, add_legacy=False) if found is None else found

    @property
    def _weight_conversions(self):
        """What the library reverts in saving: the conversions that the model was loaded with, or else its own."""
        loaded_with = self.__dict__.get("_conversions_at_loading")
        return saving_conversions(self) if loaded_with is None else loaded_with

    @_weight_conversions.setter
    def _weight_conversions(self, conversions):
        self.__dict__["_conversions_at_loading"] = conversions

    @_weight_conversions.deleter
    def _weight_conversions(self):
        self.__dict__.pop("_conversions_at_loading", None)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_expert_weights(module, std=experts_config_of(self.config).initializer_range)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        """As the library's, but never reentrant, which runs layers without autograd: router losses would not train."""
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            logger.warning_once(
                "Reentrant checkpointing loses the router losses' gradient; `use_reentrant=False` is used."
            )
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """As the library's, but first checks that the sizes fit the model, and lets experts be sent sentinel ids."""
        if mesh_manager is None:
            return super().maybe_distribute_model(model, distributed_config, mesh_manager)
        check(
            model.config.num_expert_shards == 1 or max(distributed_config.tp_size, distributed_config.ep_size) == 1,
            "`num_expert_shards` is for device maps in one process: leave it out with tensor and expert parallelism.",
        )
        prepare_plans(model, distributed_config)
        receivers = [module for module in model.modules() if getattr(module, "_is_expert_parallel", False)]
        num_experts = {module: module.num_experts for module in receivers}
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        mend_parallelism(model, distributed_config, num_experts)
        return model

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As torch's, but takes states as they lie on disk, too, which `Trainer` passes on as it reads them."""
        return super().load_state_dict(convert_from_disk(self, state_dict), *args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        See [`~transformers.PreTrainedModel.save_pretrained`]. Also under FSDP2, the code that is saved is the model's.
        An older model in the folder stays whole until the new one is: see [`~staged_saves.put_in_place`]. With
        `push_to_hub` and `distributed_checkpoint`, files are written into the folder itself.
        """
        # FSDP2 puts a class of torch over the model's, and the library takes the code from the file of the class.
        cls = type(self)
        own = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
        names = cls.__module__, cls.__name__
        cls.__module__, cls.__name__ = own.__module__, own.__name__
        try:
            given = inspect.signature(super().save_pretrained).bind(save_directory, *args, **kwargs).arguments
            if given.get("push_to_hub") or given.get("distributed_checkpoint") or os.path.isfile(save_directory):
                super().save_pretrained(save_directory, *args, **kwargs)
                return
            with staged_folder(save_directory, exchange=not is_one_of_several_processes()) as stage:
                super().save_pretrained(stage, *args, **kwargs)
                if list(stage.glob("*.py")):
                    custom_object_save(self, stage)  # again, as the configuration may have come with other code
        finally:
            cls.__module__, cls.__name__ = names


def _with_fields(config: PreTrainedConfig, arguments: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The configuration with the experts' fields that the arguments change, and the other arguments."""
    names = {*config.fields_of_loading, "num_expert_shards"}
    changes = {name: value for name, value in arguments.items() if name in names}
    if changes:
        config = copy.deepcopy(config)
        for name, value in changes.items():
            setattr(experts_config_of(config), name, value)
    return config, {name: value for name, value in arguments.items() if name not in changes}


@contextmanager
def _named_argument(config_class: Any) -> Iterator[None]:
    """Names the argument of loading that the library does not know, and so passes to the model's `__init__`."""
    try:
        yield
    except TypeError as error:
        unexpected = re.search(r"__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unexpected is None:
            raise
        close = difflib.get_close_matches(unexpected[1], {*config_class.fields_of_loading, "num_expert_shards"}, n=1)
        experts = SparseMoeVlmExpertsConfig.base_config_key
        holder = experts if hasattr(config_class, experts) else "text_config"
        raise TypeError(
            f"`{unexpected[1]}` is neither an option of loading nor a field of the configuration or its `{holder}`"
            + (f": did you mean `{close[0]}`?" if close else ".")
        ) from error


def _check_names(model: PreTrainedModel, files: list[str]) -> None:
    """Raises `OSError` if the names in a checkpoint's files do not fit a model because of a flipped bit."""
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    names, prefix = [*revert_weight_conversion(model, state)], f"{model.base_model_prefix}."
    # A base model may be read from the checkpoint of one with a head, and the other way round.
    of_others = [name.removeprefix(prefix) if name.startswith(prefix) else prefix + name for name in names]
    check_names(files, {*names, *of_others})
