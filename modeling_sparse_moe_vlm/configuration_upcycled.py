"""Configurations of upcycled models: configurations of Transformers models with a sub-configuration for the experts.

The class for a base configuration is created when it is first accessed, by its name: `UpcycledLlavaConfig` for
`LlavaConfig`. Therefore `auto_map` can name the class, and pickled configurations can be loaded in a new process.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import modeling_auto

from .checks import build_config, check, check_distinct, check_library_fields, check_sequence, shown
from .expert_groups import served_as
from .experts_config import Given, PushedWithoutPaths, SparseMoeVlmExpertsConfig

if TYPE_CHECKING:
    # Never executed. It makes Transformers copy and check these files when it loads the configuration.
    from .modeling_upcycled_classification import UpcycledClassificationMixin  # noqa: F401

PREFIX = "Upcycled"
OTHER_CONFIG = "_of_"  # precedes the configuration in the name of a model class with another class's configuration
CLASSIFIER = "ForSequenceClassification"  # ends the names of classes with a layer of scores instead of a language head
_MODELING = "modeling_upcycled"
# Name of the table of models by model type in Transformers, for each auto class.
_TABLES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}
_SERVED = ("AutoModelForMultimodalLM", "AutoModelForImageTextToText")
# Fields that trainers read from the decoder's configuration. In upcycled models, the experts' configuration has them.
_OF_EXPERTS = ("output_router_logits", "router_aux_loss_coef")


class UpcycledExpertsConfig(SparseMoeVlmExpertsConfig):
    r"""
    Configuration of the experts of an upcycled model.

    Args:
        blocks (`list[str]`, *optional*):
            Path of each sparse layer's feed-forward block in the base model, such as `"language_model.layers.0.mlp"`.
        placeholder_ids (`dict[str, list[int]]`, *optional*):
            Ids of the placeholder tokens of each modality, as declared by the configuration of the base model.
        start (`dict`, *optional*):
            A record of how the experts were initialised (see [`~toolbox.upcycling.upcycle`]). The model does not use
            it.

    The other arguments are those of [`SparseMoeVlmExpertsConfig`].

    Raises:
        ValueError: If a field is invalid or fields contradict each other. The message names the field and the fix.
    """

    model_type = "upcycled_experts"

    blocks: list[str] | Given = None
    placeholder_ids: dict[str, list[int]] | Given = None
    start: dict[str, Any] | Given = None

    def _complete(self) -> None:
        super()._complete()
        self.blocks = [] if self.blocks is None else self.blocks
        check_sequence("blocks", self.blocks, str)
        self.blocks = list(self.blocks)
        check_distinct("blocks", self.blocks)
        check(
            len(self.blocks) in (0, len(self.sparse_layers)),
            f"`blocks` names {len(self.blocks)} blocks, but the sparse layers are {self.sparse_layers}: list the "
            "other layers in `mlp_only_layers`, or change `decoder_sparse_step`.",
        )
        self.placeholder_ids = {name: list(ids) for name, ids in (self.placeholder_ids or {}).items()}
        self.start = dict(self.start or {})

    @property
    def placeholders(self) -> dict[int, list[int]]:
        """Ids of the placeholder tokens by modality id: see [`~expert_groups.served_as`]."""
        placeholders: dict[int, list[int]] = {}
        for modality, ids in self.placeholder_ids.items():
            placeholders.setdefault(served_as(modality, self.modalities), []).extend(ids)
        return {modality_id: ids for modality_id, ids in placeholders.items() if modality_id and ids}


# Fields of the experts' configuration that `from_pretrained` accepts: all except those that describe the base model.
EXPERT_FIELDS = frozenset(
    {field.name for field in fields(SparseMoeVlmExpertsConfig)}
    - {field.name for field in fields(PreTrainedConfig)}
    - {"hidden_size", "num_hidden_layers", "hidden_act", "initializer_range"}
)


class UpcycledConfigMixin(PushedWithoutPaths):
    """
    Base class of the configurations of upcycled models, which adds the configuration of the experts to the
    configuration of the base model.

    Args:
        experts_config ([`UpcycledExpertsConfig`] or `dict`):
            Configuration of the experts.
        kwargs (`Any`):
            Arguments of the configuration of the base model.
    """

    fields_of_loading: ClassVar[frozenset[str]] = EXPERT_FIELDS
    experts_config: Any

    def __post_init__(self, **kwargs):
        check(
            self.experts_config is None or isinstance(self.experts_config, dict | PreTrainedConfig),
            f"`experts_config` must be a configuration or a dict, got {shown(self.experts_config)}.",
        )
        # Not in `sub_configs`, because Transformers expects that each of them belongs to a submodel.
        if isinstance(self.experts_config, dict):
            self.experts_config = UpcycledExpertsConfig(**self.experts_config)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        of_base = {name: value for name, value in vars(self).items() if name != "experts_config"}
        for name, value in of_base.items():
            if isinstance(value, PreTrainedConfig):
                of_base[name] = value.to_dict()
        check_library_fields("", of_base)
        self.link_experts()

    def link_experts(self) -> None:
        """Links the decoder's configuration to the experts' configuration, and updates `auto_map`."""
        self.auto_map = auto_map_of(type(self))
        text_config = self.get_text_config()  # type: ignore[attr-defined]
        if text_config is not self:
            text_config.__class__ = _text_config_class(type(text_config))
            text_config.__dict__["_experts_config"] = self.experts_config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        Creates a configuration from a dict: see [`~transformers.PreTrainedConfig.from_dict`].

        Args:
            config_dict (`dict[str, Any]`):
                The fields of the configuration.
            kwargs (`Any`):
                Fields that override those of the dict. Fields of the experts override those of `experts_config`.

        Returns:
            `PreTrainedConfig`: The configuration.
        """
        given = {name: kwargs.pop(name) for name in EXPERT_FIELDS & kwargs.keys()}
        if given:
            experts = config_dict.get("experts_config") or {}
            if isinstance(experts, PreTrainedConfig):
                experts = experts.to_dict()
            config_dict = config_dict | {"experts_config": experts | given}
        return build_config(partial(super().from_dict, **kwargs), config_dict)  # type: ignore[misc]

    @property
    def num_expert_shards(self) -> int:
        """Number of shards per expert group: see [`SparseMoeVlmExpertsConfig.num_expert_shards`]."""
        return self.experts_config.num_expert_shards

    @num_expert_shards.setter
    def num_expert_shards(self, value: int) -> None:
        self.experts_config.num_expert_shards = value

    # The experts only read their own configuration, so the implementation set for the model is stored there.
    @property
    def _experts_implementation_internal(self):
        experts_config = self.__dict__.get("experts_config")
        return getattr(experts_config, "_experts_implementation_internal", None)

    @_experts_implementation_internal.setter
    def _experts_implementation_internal(self, value: str | None):
        experts_config = self.__dict__.get("experts_config")
        if isinstance(experts_config, PreTrainedConfig):
            experts_config._experts_implementation_internal = value

    @property
    def _experts_implementation(self):
        return self._experts_implementation_internal

    @_experts_implementation.setter
    def _experts_implementation(self, value: str | dict | None):
        """Same as in Transformers, but skips the modules of the base model, which have no experts."""
        current = self._experts_implementation_internal
        of_experts = value.get("experts_config", value.get("", current)) if isinstance(value, dict) else value
        self._experts_implementation_internal = of_experts


def _delegate(name: str) -> property:
    """Returns a property that reads and writes a field of the experts' configuration."""

    def get(config):
        experts = config.__dict__.get("experts_config", config.__dict__.get("_experts_config"))
        if experts is None:
            raise AttributeError(f"{type(config).__name__!r} object has no attribute {name!r}")
        return getattr(experts, name)

    def put(config, value):
        experts = config.__dict__.get("experts_config", config.__dict__.get("_experts_config"))
        setattr(experts, name, value)

    return property(get, put)


def _delegates_of(base: type) -> dict[str, property]:
    """Returns the delegating properties for a configuration class, except for fields that the class has itself."""
    return {name: _delegate(name) for name in _OF_EXPERTS if not hasattr(base, name)}


class _TextConfigMixin:
    """Adds a link to the experts' configuration to the decoder's configuration. The link is not saved."""

    @property
    def experts_config(self):
        return self.__dict__.get("_experts_config")

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        d.pop("_experts_config", None)
        super()._remove_keys_not_serialized(d)  # type: ignore[misc]

    def __reduce_ex__(self, protocol):
        base = next(base for base in type(self).__mro__[1:] if base is not _TextConfigMixin)
        return _rebuild_text_config, (base,), self.__dict__.copy()


_text_config_classes: dict[type, type] = {}


def _text_config_class(base: type) -> type:
    """Returns a subclass with the same name as the base class, by which the auto classes find the base model."""
    if issubclass(base, _TextConfigMixin):
        return base
    if base not in _text_config_classes:
        namespace = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__init__": base.__init__}
        made = type(base.__name__, (_TextConfigMixin, base), namespace | _delegates_of(base))
        _text_config_classes.setdefault(base, made)  # another thread may have been faster
    return _text_config_classes[base]


def _rebuild_text_config(base: type) -> Any:
    return object.__new__(_text_config_class(base))


def upcycled_config_class(base: type[PreTrainedConfig]) -> Any:
    """
    Returns the configuration class of the upcycled models of a base model.

    Args:
        base (`type[PreTrainedConfig]`):
            Configuration class of the base model. It must be exported by Transformers.

    Returns:
        `type`: A subclass of [`UpcycledConfigMixin`] and of the base class, the same for every call.

    Raises:
        AttributeError: If Transformers does not export a configuration class with this name.
    """
    return getattr(sys.modules[__name__], PREFIX + base.__name__)


def auto_map_of(config_class: Any) -> dict[str, str]:
    """Returns the `auto_map` of an upcycled configuration: the path of the class for each auto class."""
    base_type = config_class.base_model_type
    names = {"AutoConfig": f"{__name__.rpartition('.')[2]}.{config_class.__name__}"}
    for auto_class, name in models_of_type(base_type).items():
        names[auto_class] = f"{_MODELING}.{upcycled_name(getattr(transformers, name), config_class)}"
    if "AutoModelForCausalLM" in names:
        # `transformers serve` loads all models of remote code with this class, also those of text.
        names.setdefault("AutoModelForMultimodalLM", names["AutoModelForCausalLM"])
    if "AutoModel" in names:
        kind = config_class.__name__.removesuffix("Config")
        names["AutoModelForSequenceClassification"] = f"{_MODELING}_classification.{kind}{CLASSIFIER}"
    return names


def models_of_type(model_type: str) -> dict[str, str]:
    """Returns the name of the Transformers model class with this model type for each auto class that has one."""
    names = {auto_class: getattr(modeling_auto, table).get(model_type) for auto_class, table in _TABLES.items()}
    return {auto_class: name for auto_class, name in names.items() if isinstance(name, str)}


def upcycled_name(base: Any, config_class: Any) -> str:
    """
    Returns the name of the upcycled class of a base model.

    Args:
        base (`type[PreTrainedModel]`):
            Model class of the base model.
        config_class (`type[UpcycledConfigMixin]`):
            Configuration class of the upcycled model.

    Returns:
        `str`: The name. It contains the name of the configuration if that is not the configuration of the base class.
    """
    config_name = config_class.__name__.removeprefix(PREFIX)
    is_own = base.config_class.__name__ == config_name
    return f"{PREFIX}{base.__name__}" + ("" if is_own else f"{OTHER_CONFIG}{config_name}")


def _make_config_class(name: str, base: Any) -> type:
    """Creates the configuration class of the upcycled models of a base model."""
    namespace = {
        "__module__": __name__,
        "__doc__": f"Configuration of upcycled [`~transformers.{base.__name__}`] models.",
        "__annotations__": {"experts_config": Any},
        "model_type": f"upcycled_{base.model_type}",
        "base_model_type": base.model_type,
        "experts_config": None,
    }
    if "__init__" in base.__dict__ and not hasattr(base.__init__, "__wrapped__"):
        namespace["__init__"] = base.__init__  # otherwise, a generated `__init__` would hide the base's own
    made: Any = type(name, (UpcycledConfigMixin, base), namespace | _delegates_of(base))
    made.register_for_auto_class()
    _let_serve_load(made)
    return made


def _let_serve_load(config_class: Any) -> None:
    """Adds a model type to the tables in which `transformers serve` looks it up. They contain only names."""
    paths = auto_map_of(config_class)
    names = {auto_class: paths[auto_class].rpartition(".")[2] for auto_class in _SERVED if auto_class in paths}
    for auto_class, name in names.items():
        getattr(modeling_auto, _TABLES[auto_class])[config_class.model_type] = name


def __getattr__(name: str) -> Any:
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not (isinstance(base, type) and issubclass(base, PreTrainedConfig)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _make_config_class(name, base))  # another thread may have been faster


__all__ = ["UpcycledConfigMixin", "UpcycledExpertsConfig", "upcycled_config_class"]
