"""Loading, saving, adapters and parallelism of models that contain the experts of this package."""

import copy
import difflib
import inspect
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

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
    check_unfused_experts,
    convert_from_disk,
    loading_conversions,
    own_names,
    saving_conversions,
)
from .checkpoint_integrity import (
    check_names,
    check_names_of_tensors,
    check_number_of_weights,
    check_weights,
    named_damage,
)
from .checks import OBSCURE_ERRORS, check, errors_of_config
from .experts import init_expert_weights
from .experts_config import SparseMoeVlmExpertsConfig, experts_config_of, without_local_parents
from .kept_names import check_names_on_disk, keep_names, signature
from .lora_targets import AdapterConfigs
from .parallel_plans import is_one_of_several_processes, mend_parallelism, prepare_plans
from .quantization import run_quantised_experts_eagerly, warn_of_unquantised_experts

logger = logging.get_logger(__name__)


class ExpertsHost(PreTrainedModel):
    """
    Base class of models, of any architecture, that contain the experts of this package. The configuration class must
    list in `fields_of_loading` the fields of the experts' configuration that `from_pretrained` accepts as keyword
    arguments.
    """

    # Transformers looks for the decorator of the experts in the file of this class, but they are in another file.
    _can_set_experts_implementation_cached_value = True
    peft_config = AdapterConfigs()
    # The installed package sets these two: it warns about checkpoints with other code, and makes saves atomic. The code
    # in checkpoints leaves loading and saving files to Transformers.
    _warn_of_other_code: ClassVar[Any] = None
    _staged_folder: ClassVar[Any] = None

    @classmethod
    def from_pretrained(cls, *args, config=None, num_expert_shards: int | None = None, **kwargs):
        r"""
        Loads a model from a checkpoint: see [`~transformers.PreTrainedModel.from_pretrained`].

        Args:
            args (`Any`):
                Arguments of [`~transformers.PreTrainedModel.from_pretrained`]: the name or path of the checkpoint.
            config (`PreTrainedConfig`, *optional*):
                Configuration of the model. By default, it is read from the checkpoint.
            num_expert_shards (`int`, *optional*):
                Number of modules that the experts of each group are split into (`mlp.experts.shards.0`, …), so that a
                device map can place them on several devices. It does not affect the format of checkpoints.
            kwargs (`Any`):
                Arguments of [`~transformers.PreTrainedModel.from_pretrained`], or fields of the configuration or of the
                experts' configuration (`text_config` in the models of this package), such as `output_router_logits` and
                `num_experts_per_tok`.

        Returns:
            `PreTrainedModel`: The model, in evaluation mode. With `output_loading_info=True`, also the report of
            Transformers about missing and unexpected tensors, which are not an error then.

        Raises:
            TypeError: If a keyword argument is neither an argument of Transformers nor a field of a configuration.
            OSError: If a file of the checkpoint is damaged or a pickle. The message names the file.
            RuntimeError: If the size of a tensor differs from the configuration.
            ValueError: If a field of the configuration is invalid, if the experts of the checkpoint or the device
                map do not fit the model, or if tensors are missing or unexpected (see
                [`~checkpoint_integrity.check_names_of_tensors`]).
        """
        if num_expert_shards is not None:
            kwargs["num_expert_shards"] = num_expert_shards
        if isinstance(config, PreTrainedConfig):
            config, kwargs = _with_fields(config, kwargs)
        # Without `config`, the configuration takes its fields from `kwargs` when it is read.
        checkpoint = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if kwargs.get("trust_remote_code") and checkpoint is not None and cls._warn_of_other_code is not None:
            cls._warn_of_other_code(cls, checkpoint, kwargs.get("revision"))
        if kwargs.setdefault("use_safetensors", None if "gguf_file" in kwargs else True) is False:
            raise ValueError(
                "`use_safetensors=False` asks for weights in a pickle, which can run code when it is read: leave it "
                "out, and convert the weights to safetensors."
            )
        wants_report = kwargs.pop("output_loading_info", False)
        with (
            named_damage(checkpoint, kwargs.get("subfolder") or ""),
            _named_argument(cls.config_class),
            errors_of_config(cls.__name__, OBSCURE_ERRORS),
        ):
            model, report = super().from_pretrained(*args, config=config, output_loading_info=True, **kwargs)
        if not (wants_report or kwargs.get("ignore_mismatched_sizes")):
            check_names_of_tensors(model, report, str(checkpoint or "the state dict"))
        return (model, report) if wants_report else model

    @classmethod
    def _from_config(cls, config, **kwargs):
        config, kwargs = _with_fields(config, kwargs)
        with _named_argument(cls.config_class):
            return super()._from_config(config, **kwargs)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> Any:
        """
        Returns the experts implementation to use. Same as in Transformers, but the default is `"eager"` if
        `"grouped_mm"` would not support the widths of the experts in half precision.
        """
        if requested_experts is None and self._widths_other_than(16 // torch.float16.itemsize):
            return "eager"
        return super().get_correct_experts_implementation(requested_experts)

    def _grouped_mm_can_dispatch(self) -> bool:
        """Same as in Transformers, but raises `ValueError` for widths that the kernels of torch do not support."""
        dtypes = (parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        multiple = 16 // next(dtypes, torch.get_default_dtype()).itemsize
        odd = self._widths_other_than(multiple)
        check(
            not odd,
            f'`experts_implementation="grouped_mm"` needs widths that are multiples of {multiple}, which {odd} are '
            'not: use "eager" (the default for these widths) or "batched_mm".',
        )
        return super()._grouped_mm_can_dispatch()

    def _widths_other_than(self, multiple: int) -> dict[str, int]:
        """
        Returns the widths that are not multiples of this number. The kernels of grouped matrix products need rows whose
        size is a multiple of 16 bytes.
        """
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
        Loads the weights as Transformers does, but first checks that the files are not damaged and that the device map
        and the experts of the checkpoint fit the model, which Transformers detects late or not at all. The model passes
        its own weight conversions, because Transformers has only one table of conversions per model type.
        """
        if load_config.device_map is not None:
            check_device_map(model, load_config.device_map)
        files = [file for file in checkpoint_files or () if file.endswith(".safetensors")]
        check_weights(files, (load_config.sharded_metadata or {}).get("weight_map"))
        if expected_keys is None:  # the weights of the model, not of an adapter
            if not (load_config.ignore_mismatched_sizes or load_config.is_quantized):
                check_number_of_weights(files, sum(weight.numel() for weight in model.parameters()))
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
                "configuration, or pass `ignore_mismatched_sizes=True` to initialise the tensors that differ."
            )
        if expected_keys is None:
            check_unfused_experts(model, info.missing_keys, info.unexpected_keys)
            warn_of_unquantised_experts(model, load_config.hf_quantizer)
            run_quantised_experts_eagerly(model, load_config.hf_quantizer)
        return loaded

    def library_conversions(self, found: list[WeightTransform] | None = None) -> list[WeightTransform]:
        """
        Returns the weight conversions that Transformers has for checkpoints of this model. They do not change the
        names of experts and routers within a layer, which Transformers does not know. Renamings that the user passes to
        `from_pretrained` apply to all names.

        Args:
            found (`list[WeightTransform]`, *optional*):
                The conversions that Transformers found while loading. By default, they are looked up.

        Returns:
            `list[WeightTransform]`: The conversions.
        """
        known = get_model_conversion_mapping(self, add_legacy=found is not None)
        of_library = {signature(step) for step in known}
        steps = known if found is None else [step for step in found if signature(step) in of_library]
        asked_for = [step for step in found or [] if signature(step) not in of_library]
        return [*asked_for, *keep_names(steps, own_names(self), self.base_model_prefix)]

    @property
    def _weight_conversions(self):
        """Conversions that Transformers reverts when saving: those used to load the model; otherwise, its own."""
        loaded_with = self.__dict__.get("_conversions_at_loading")
        return saving_conversions(self) if loaded_with is None else loaded_with

    @_weight_conversions.setter
    def _weight_conversions(self, conversions):
        self.__dict__["_conversions_at_loading"] = conversions

    @_weight_conversions.deleter
    def _weight_conversions(self):
        self.__dict__.pop("_conversions_at_loading", None)

    @contextmanager
    def _conversions_looked_up_once(self) -> Iterator[None]:
        """
        Context manager that keeps the weight conversions of a model that was not loaded from a checkpoint. They are
        needed for every stack of experts, and looking them up builds the base model on the meta device.
        """
        if "_conversions_at_loading" in self.__dict__:
            yield
            return
        self._weight_conversions = saving_conversions(self)
        try:
            yield
        finally:
            del self._weight_conversions

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_expert_weights(module, std=experts_config_of(self.config).initializer_range)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        """
        Same as in Transformers, but never reentrant. Reentrant checkpointing runs the layers without autograd, so the
        router losses would have no gradient.
        """
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            logger.warning_once(
                "Reentrant gradient checkpointing loses the gradient of the router losses: `use_reentrant=False` is "
                "used instead."
            )
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """
        Distributes the model as Transformers does, but first checks that its sizes can be divided, and adapts the
        experts to the sentinel ids of expert parallelism.
        """
        if mesh_manager is None:
            return super().maybe_distribute_model(model, distributed_config, mesh_manager)
        check(
            model.config.num_expert_shards == 1 or max(distributed_config.tp_size, distributed_config.ep_size) == 1,
            "`num_expert_shards` is for device maps in one process: leave it out with tensor and expert parallelism.",
        )
        check(
            not experts_config_of(model.config).unfused_experts
            or max(distributed_config.tp_size, distributed_config.ep_size) == 1,
            "`unfused_experts` cannot be combined with tensor and expert parallelism, which distribute stacks of "
            "experts: load the model with `unfused_experts=False`.",
        )
        prepare_plans(model, distributed_config)
        receivers = [module for module in model.modules() if getattr(module, "_is_expert_parallel", False)]
        num_experts = {module: module.num_experts for module in receivers}
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        mend_parallelism(model, distributed_config, num_experts)
        return model

    def load_state_dict(self, state_dict, *args, **kwargs):
        """
        Loads a state dict: see `torch.nn.Module.load_state_dict`. The state dict can also have the format of
        checkpoints, because `Trainer` passes the contents of a checkpoint directly.
        """
        return super().load_state_dict(convert_from_disk(self, state_dict), *args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        Saves the model: see [`~transformers.PreTrainedModel.save_pretrained`].

        If the package is installed, the files are written to a temporary folder first, so a model that is already in
        `save_directory` stays complete until the new one is complete (see [`~registered.staged_saves.put_in_place`]).
        With `push_to_hub` or `distributed_checkpoint`, or if a checkpoint brings the code, the files are written
        directly to `save_directory`.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to save the model to.
            args (`Any`):
                Other arguments of [`~transformers.PreTrainedModel.save_pretrained`].
            kwargs (`Any`):
                Other keyword arguments of [`~transformers.PreTrainedModel.save_pretrained`].

        Raises:
            ValueError: If two tensors would be saved under the same name. The message names them.
        """
        # Transformers copies the code from the file of the class. FSDP2 replaces the class with a subclass from torch.
        cls = type(self)
        own = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
        names = cls.__module__, cls.__name__
        cls.__module__, cls.__name__ = own.__module__, own.__name__
        try:
            given = inspect.signature(super().save_pretrained).bind(save_directory, *args, **kwargs).arguments
            with self._conversions_looked_up_once():
                self._check_names_on_disk(given)
                if given.get("push_to_hub"):
                    with without_local_parents(self.config):
                        super().save_pretrained(save_directory, *args, **kwargs)
                    return
                if given.get("distributed_checkpoint") or os.path.isfile(save_directory):
                    super().save_pretrained(save_directory, *args, **kwargs)
                    return
                with self._folder_to_write(save_directory) as folder:
                    super().save_pretrained(folder, *args, **kwargs)
                    if list(folder.glob("*.py")):
                        custom_object_save(self, folder)  # again, because the configuration may have copied its code
        finally:
            cls.__module__, cls.__name__ = names

    def push_to_hub(self, *args, **kwargs):
        """
        Uploads the model: see [`~transformers.PreTrainedModel.push_to_hub`]. Paths of this machine are left out of
        `config.json` (see [`~experts_config.without_local_parents`]).
        """
        with without_local_parents(self.config):
            return super().push_to_hub(*args, **kwargs)

    def _folder_to_write(self, save_directory: str | os.PathLike) -> AbstractContextManager[Path]:
        """Returns a context manager that provides the folder to write the files of `save_directory` to."""
        if self._staged_folder is None:
            return nullcontext(Path(save_directory))
        return self._staged_folder(save_directory, exchange=not is_one_of_several_processes())

    def _check_names_on_disk(self, arguments: dict[str, Any]) -> None:
        """Checks the names of the tensors that `save_pretrained` with these arguments would write."""
        if not arguments.get("save_original_format", True) or getattr(self, "_hf_peft_config_loaded", False):
            return  # these names are those in memory
        if getattr(self, "hf_quantizer", None) is not None:
            return  # the quantiser chooses the names
        state_dict = arguments.get("state_dict")
        state_dict = self.state_dict() if state_dict is None else state_dict
        ignored = {*(self._keys_to_ignore_on_save or ()), *self.all_tied_weights_keys}
        check_names_on_disk(self, {name: tensor for name, tensor in state_dict.items() if name not in ignored})


def _with_fields(config: PreTrainedConfig, arguments: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Returns the configuration, changed by the arguments that are fields of the experts, and the other arguments."""
    names = {*config.fields_of_loading, "num_expert_shards"}
    changes = {name: value for name, value in arguments.items() if name in names}
    if changes:
        config = copy.deepcopy(config)
        for name, value in changes.items():
            setattr(experts_config_of(config), name, value)
    return config, {name: value for name, value in arguments.items() if name not in changes}


@contextmanager
def _named_argument(config_class: Any) -> Iterator[None]:
    """Raises `TypeError` with a clear message for unknown arguments, which Transformers passes to `__init__`."""
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
            f"`{unexpected[1]}` is neither an option of `from_pretrained` nor a field of the configuration or its "
            f"`{holder}`" + (f": did you mean `{close[0]}`?" if close else ".")
        ) from error


def _check_names(model: PreTrainedModel, files: list[str]) -> None:
    """Raises `OSError` if a tensor name in the files does not match the model because of a flipped bit."""
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    names, prefix = [*revert_weight_conversion(model, state)], f"{model.base_model_prefix}."
    # A base model can be loaded from the checkpoint of a model with a head, and vice versa.
    of_others = [name.removeprefix(prefix) if name.startswith(prefix) else prefix + name for name in names]
    check_names(files, {*names, *of_others})
