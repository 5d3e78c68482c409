"""Upcycled models: Transformers models whose dense feed-forward blocks are replaced with sparse mixtures of experts.

The class for a base model is created when it is first accessed, by its name: `UpcycledLlavaForConditionalGeneration`
for `LlavaForConditionalGeneration`. Therefore `auto_map` can name the class, and pickled models can be loaded in a new
process. Apart from the sparse blocks, everything is inherited from the base model: modules, names, generation, image
processing and the processor.
"""

import functools
import inspect
import sys
from collections.abc import Iterable
from dataclasses import field, make_dataclass
from typing import Any, get_args, get_type_hints

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.initialization import no_init_weights
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .cache_name import is_paged
from .checkpoint_conversion import own_names
from .checks import errors_of_config
from .configuration_upcycled import (
    OTHER_CONFIG,
    PREFIX,
    UpcycledConfigMixin,
    models_of_type,
    upcycled_config_class,
    upcycled_name,
)
from .continuous_batching import ContinuousTextBatching
from .experts import make_experts
from .experts_config import SparseMoeVlmExpertsConfig
from .experts_host import ExpertsHost
from .fused_head import takes_fused_head, with_own_router_losses
from .kept_names import keep_names, signature
from .losses import add_router_losses
from .routing import RoutingPlanner, RoutingRecord, warn_of_resting_biases
from .token_modalities import TokenModalities, find_modalities, ids_of_step, listed_ids
from .upcycled_layers import ExpertPools, TokenPlan, UpcycledBlock, current_plan, token_plan, upcycled_layer_class
from .upcycled_plans import experts_plans

# In remote code, what an import of this file by another file of the checkpoint defined, such as by the one for sequence
# classification: Transformers executes this file again when it loads a class from it. The definitions are restored at
# the end, since models of these classes may exist.
_DEFINED = (
    dict(globals())
    if __name__.startswith("transformers_modules.") and "__transformers_module_hash__" not in globals()
    else {}
)

logger = logging.get_logger(__name__)

# Prefixes of the names of arguments that contain images and similar inputs, or their encoded features.
_FEATURES = ("pixel_", "image", "video", "audio", "input_features", "mm_encoder_outputs")
_ROUTING_FIELDS = ("router_logits", "router_indices", "router_dropped")
_LOSS_FIELDS = ("aux_loss", "z_loss", "aux_loss_by_modality", "router_loss")

# ------------------------------------------------------------------------------------------------ models


class UpcycledMixin(ExpertsHost):
    """
    Base class of the upcycled models. All submodels that contain all sparse layers (the model with a head, the model
    without a head, the decoder) have such a class. The outermost submodel of a call determines the modalities of the
    tokens.

    In addition to the arguments of the base model, `forward` accepts these arguments:

    - `mm_token_type_ids` (`torch.LongTensor` of shape `(B, T)`, *optional*): modality id of every token, as returned by
      Transformers processors (0 text, 1 image, 2 video, 3 audio). By default, it is derived from the placeholder tokens
      in `config.experts_config.placeholder_ids`. With a filled cache, all tokens of a call without images are text.
    - `output_router_logits` (`bool`, *optional*, defaults to `config.experts_config.output_router_logits`): whether to
      return `router_logits` and `router_indices` (and `router_dropped`) and, for models with a head, the router losses,
      which are added to `loss` if there are `labels`: see [`~outputs.SparseMoeVlmCausalLMOutputWithPast`].

    Args:
        config ([`~configuration_upcycled.UpcycledConfigMixin`]):
            Configuration of the upcycled model.
        args (`Any`):
            Other arguments of the base model.
        kwargs (`Any`):
            Other keyword arguments of the base model.

    Raises:
        ValueError: If the configuration does not contain the configuration of the experts.
    """

    experts_config: SparseMoeVlmExpertsConfig
    routing_planner: RoutingPlanner
    # Whether this is the innermost submodel that contains all sparse layers. It contains the expert pools.
    holds_pools: bool = False
    # Whether the model may still have to warn that nothing updates the router biases.
    may_warn: bool = False

    def __init__(self, config, *args, **kwargs):
        experts_config = config.experts_config
        if experts_config is None or not experts_config.blocks:
            raise ValueError(
                f"`experts_config` of {type(config).__name__} must say which blocks are sparse: make an upcycled model "
                "from a dense model with `upcycle(model)` from `modeling_sparse_moe_vlm.toolbox.upcycling`."
            )
        experts_config.validate_architecture()
        # The base model first creates modules without experts, which would refuse an experts implementation.
        implementation, config._experts_implementation_internal = config._experts_implementation_internal, None
        with errors_of_config(self.dense_class().__name__):
            super().__init__(config, *args, **kwargs)
        config._experts_implementation_internal = implementation
        put_experts_in(self)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> Any:
        """Same as in [`ExpertsHost`], but does not choose an implementation before the model has experts."""
        if "experts_config" not in self.__dict__ and requested_experts is None:
            return None
        return super().get_correct_experts_implementation(requested_experts)

    def __setattr__(self, name: str, value: Any) -> None:
        """Same as in torch, but adds the router losses to the `forward` that TRL trainers assign to a model."""
        if name == "forward" and takes_fused_head(value):
            value = with_own_router_losses(self, value)
        super().__setattr__(name, value)

    def smart_apply(self, fn: Any, is_custom_code: bool) -> Any:
        """Initialises weights as in Transformers models. For remote code, some tensors of the base would be skipped."""
        return super().smart_apply(fn, False)  # type: ignore[misc]

    def library_conversions(self, found=None):
        """
        Returns the weight conversions that Transformers has for the base model, which has the same names except for
        the sparse blocks. They do not apply to the sparse blocks: see [`ExpertsHost.library_conversions`].
        """
        with torch.device("meta"), no_init_weights():
            base = self.dense_class()(_dense_config(self.config))
        of_base = get_model_conversion_mapping(base, add_legacy=False)
        own = {signature(step) for step in get_model_conversion_mapping(self, add_legacy=False)}
        legacy = {signature(step) for step in get_model_conversion_mapping(base, add_legacy=True)[len(of_base) :]}
        others = [step for step in found or [] if signature(step) not in own]
        asked_for = [step for step in others if signature(step) not in legacy]
        of_library = [*of_base, *(step for step in others if signature(step) in legacy)]
        return [*asked_for, *keep_names(of_library, own_names(self), self.base_model_prefix)]

    def dense_class(self) -> Any:
        """Returns the class of the base model, whose tensors have the same names except for the sparse blocks."""
        return _base_of(type(self))

    def init_parallel_plans(self) -> None:
        """Same as in Transformers, but adds plans for the experts."""
        super().init_parallel_plans()
        experts_config = self.__dict__.get("experts_config")
        if experts_config is not None and self.holds_pools:
            for name, plan in experts_plans(self).items():
                getattr(self, name).update(plan)

    # -------------------------------------------------------------------------------------------- forward

    def _run(self, base_forward: Any, takes: frozenset[str], arguments: dict[str, Any]) -> Any:
        """Runs `forward` of the base with a plan for the sparse layers, and adds the routing to its output."""
        config = self.experts_config
        wants_routing = arguments.pop("output_router_logits", None)
        record = arguments.pop("routing_record", None)  # passed by tools that observe the routing
        plan = current_plan()
        if plan is not None and plan.owner is config:  # made by the enclosing model
            with token_plan(self._with_pools(plan)):
                return base_forward(self, **arguments)
        returns_routing = config.output_router_logits if wants_routing is None else bool(wants_routing)
        if record is None:
            record = RoutingRecord() if returns_routing else None
        plan = self._with_pools(self._plan(arguments, record))
        if "mm_token_type_ids" in arguments and "mm_token_type_ids" not in takes:
            arguments.pop("mm_token_type_ids")
        if not returns_routing:
            with token_plan(plan):
                return base_forward(self, **arguments)

        return_dict = arguments.get("return_dict")
        returns_dict = self.config.return_dict if return_dict is None else return_dict
        with token_plan(plan):
            outputs = base_forward(self, **arguments | ({} if returns_dict else {"return_dict": True}))
        outputs = self._with_routing(outputs, record, arguments, bool(wants_routing))
        return outputs if returns_dict else outputs.to_tuple()

    def _plan(self, arguments: dict[str, Any], record: RoutingRecord | None) -> TokenPlan:
        planner = self.routing_planner
        is_unwatched = record is None and self.training and torch.is_grad_enabled()
        if is_unwatched and self.may_warn and not torch.compiler.is_compiling():
            self.may_warn = False
            warn_of_resting_biases(self)
        tokens = self._tokens(arguments, planner, record)
        device = self.device if tokens.ids is None else tokens.ids.device
        return TokenPlan.of(self.experts_config, planner, tokens, device, record)

    def _with_pools(self, plan: TokenPlan) -> TokenPlan:
        pools = getattr(self, "expert_pools", None) if self.holds_pools else None
        return plan if pools is None else plan._replace(pools=ExpertPools(pools))

    def _tokens(
        self, arguments: dict[str, Any], planner: RoutingPlanner, record: RoutingRecord | None
    ) -> TokenModalities:
        """Returns the tokens of a call. Their modalities are only determined if they are needed."""
        input_ids, inputs_embeds, ids = (
            arguments.get(name) for name in ("input_ids", "inputs_embeds", "mm_token_type_ids")
        )
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None or tokens.dim() < 2:
            return TokenModalities(None, None)
        shape = tokens.shape[:2]
        modalities = self.experts_config.modalities
        if not planner.depends_on_modality and record is None:
            return TokenModalities(None, None)
        padding = (arguments.get("attention_mask"), modalities, arguments.get("position_ids"))
        if ids is None and self._is_continued(arguments, tokens):
            return TokenModalities.of(shape, None, *padding)
        if ids is not None:
            ids = _ids_of_call(ids, shape[1], _cache(arguments))
        elif input_ids is None and not self._has_features(arguments) and planner.depends_on_modality:
            _warn_of_unknown_modalities()
        ids = self.get_mm_token_type_ids(input_ids, inputs_embeds, ids)
        return TokenModalities.of(shape, ids, *padding)

    def get_mm_token_type_ids(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Returns the modality id of every token as a position in the `modalities` of the experts' configuration.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Token ids.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, D)`, *optional*):
                Embeddings of the tokens, if there are no `input_ids`.
            mm_token_type_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Modality ids of Transformers, if they are known.

        Returns:
            `torch.LongTensor` of shape `(B, T)`: The modality ids (see [`~token_modalities.find_modalities`]).
        """
        if mm_token_type_ids is not None:
            mm_token_type_ids = listed_ids(mm_token_type_ids, self.experts_config.modalities)
        placeholders = self.experts_config.placeholders
        return find_modalities(input_ids, inputs_embeds, mm_token_type_ids, placeholders, self.get_input_embeddings())

    def _is_continued(self, arguments: dict[str, Any], tokens: torch.Tensor) -> bool:
        """Returns whether the tokens continue a cached text without new images. Their placeholders are text then."""
        cache = _cache(arguments)
        if cache is None or self._has_features(arguments):
            return False
        if is_paged(cache):
            return True
        # The length of a static cache is stored on the device and unknown while a graph is traced.
        return tokens.shape[1] == 1 if is_tracing(tokens) else bool(cache.get_seq_length() > 0)

    @staticmethod
    def _has_features(arguments: dict[str, Any]) -> bool:
        """Returns whether the arguments contain images or similar inputs."""
        return any(value is not None and name.startswith(_FEATURES) for name, value in arguments.items())

    def _with_routing(self, outputs: Any, record: RoutingRecord, arguments: dict[str, Any], wants_losses: bool) -> Any:
        routing: dict[str, Any] = dict(record.outputs())
        labels = arguments.get("labels")
        has_head = self.get_output_embeddings() is not None
        # `config.output_router_logits` must not slow down inference: the losses are computed only for training and on
        # request.
        if has_head and routing["router_logits"] and (wants_losses or labels is not None or self.training):
            assert record.tokens is not None
            loss, losses = add_router_losses(
                self.experts_config,
                routing["router_logits"],
                routing["router_indices"],
                record.tokens,
                loss=outputs.get("loss"),
                labels=labels,
                num_items_in_batch=arguments.get("num_items_in_batch"),
                is_asked_for=wants_losses,
            )
            routing |= losses if loss is None else losses | {"loss": loss}
        return output_class(type(outputs))(**{**outputs, **routing})


class UpcycledGeneration(ContinuousTextBatching):
    """Base class of the upcycled models that generate text."""

    experts_config: SparseMoeVlmExpertsConfig

    def placeholder_tokens(self) -> set[int]:
        """
        Returns the ids of the placeholder tokens of images and further modalities.

        Returns:
            `set[int]`: The ids that the configuration of the base model declares.
        """
        return {token for ids in self.experts_config.placeholder_ids.values() for token in ids}


def _warn_of_unknown_modalities() -> None:
    if not torch.compiler.is_compiling():
        logger.warning_once(
            "`inputs_embeds` came without `mm_token_type_ids`: all tokens except placeholders are treated as text, but "
            "the experts of this model treat modalities differently. If image features are already merged into the "
            "embeddings, as in serving engines, pass `mm_token_type_ids` (zeros for text). Only models with joint "
            "experts do not need it."
        )


def _cache(arguments: dict[str, Any]) -> Any:
    return arguments.get("cache", arguments.get("past_key_values"))


def _ids_of_call(ids: torch.Tensor, num_tokens: int, cache: Any) -> torch.Tensor:
    """
    Returns the modality ids of the tokens of a call. In some decoding modes, `generate` passes the ids of the whole
    prompt, while a call runs only some of its tokens or also tokens after it. Tokens after the prompt are text.
    """
    if ids.shape[1] == num_tokens or cache is None or is_paged(cache) or is_tracing(ids):
        return ids
    start = int(cache.get_seq_length())
    missing = max(start + num_tokens - ids.shape[1], 0)
    return nn.functional.pad(ids, (0, missing))[:, start : start + num_tokens]


# ------------------------------------------------------------------------------------------------ sparse blocks


def put_experts_in(model: Any) -> None:
    """
    Replaces the dense blocks that `model.config.experts_config` lists with sparse blocks, and converts all submodels
    that contain them to upcycled models. The new weights are initialised by the model's `_init_weights`, or not at all
    if initialisation is disabled.

    Args:
        model (`PreTrainedModel`):
            A base model, or a model of the upcycled class. It is changed in place.

    Raises:
        ValueError: If a block is not part of a list of decoder layers.
    """
    config = model.config.experts_config
    paths = {layer: full_path(model, path) for layer, path in zip(config.sparse_layers, config.blocks, strict=True)}
    modules = dict(model.named_modules())
    unknown = [path for layer, path in zip(paths, config.blocks, strict=True) if paths[layer] not in modules]
    if unknown:
        raise ValueError(f"`experts_config.blocks` names {unknown}, which {type(model).__name__} does not have.")
    parts = _parts_around(model, list(paths.values()))
    planner = RoutingPlanner(config)
    for layer, path in paths.items():
        parent, _, name = path.rpartition(".")
        dense = model.get_submodule(path)
        weight = next(dense.parameters())
        block = _made_like(weight, functools.partial(UpcycledBlock, config, layer)).train(dense.training)
        setattr(model.get_submodule(parent), name, block)
        decoder_layer = model.get_submodule(_layer_path(model, path))
        decoder_layer.__class__ = upcycled_layer_class(type(decoder_layer))
    for part in parts:
        part.__class__ = upcycled_model_class(type(part), type(part.config))
        # Plain attributes, which replicas of the model also have.
        part.__dict__ |= {"experts_config": config, "routing_planner": planner}
        part.may_warn = bool(config.router_bias_update_rate)
    decoder = parts[-1]
    decoder.__dict__["holds_pools"] = True
    if config.pools:
        decoder.expert_pools = nn.ModuleDict()
        for pool, layers in config.pools.items():
            groups = config.layer_expert_groups(layers[0], always_on=False)
            decoder.expert_pools[str(pool)] = _made_like(weight, functools.partial(make_experts, config, groups))
        decoder.expert_pools.train(decoder.training)
    config._experts_implementation_internal = model.get_correct_experts_implementation(
        config._experts_implementation_internal
    )
    for part in reversed(parts):
        part.post_init()


def full_path(model: nn.Module, path: str) -> str:
    """Returns the path in a model of the module with this path in its base model."""
    prefix = getattr(model, "base_model_prefix", "")
    head = path.partition(".")[0]
    if prefix and hasattr(model, prefix) and not (hasattr(model, head) and head != prefix):
        return f"{prefix}.{path}"
    return path


def _made_like(weight: torch.Tensor, make: Any) -> Any:
    """Creates a module with the device and dtype of a weight. Its weights are not initialised."""
    with torch.device("meta"):
        module = make().to(weight.dtype)
    return module if weight.is_meta else module.to_empty(device=weight.device)


def _parts_around(model: Any, paths: list[str]) -> list[Any]:
    """Returns the submodels that contain all of the paths, from the outermost to the innermost."""
    parts = [model]
    pieces = paths[0].split(".")
    for number in range(1, len(pieces)):
        prefix = ".".join(pieces[:number])
        module = model.get_submodule(prefix)
        if isinstance(module, PreTrainedModel) and all(path.startswith(f"{prefix}.") for path in paths):
            parts.append(module)
    return parts


def _layer_path(model: nn.Module, path: str) -> str:
    """Returns the path of the decoder layer that contains a block: the last numbered module on its path."""
    pieces = path.split(".")
    for number in range(len(pieces) - 1, 0, -1):
        if pieces[number - 1].isdigit():
            return ".".join(pieces[:number])
    raise ValueError(
        f"the block {path!r} of {type(model).__name__} is not part of a list of layers: `blocks` must name blocks such "
        'as "layers.0.mlp".'
    )


# ------------------------------------------------------------------------------------------------ classes


def upcycled_model_class(base: type[PreTrainedModel], config_class: type | None = None) -> Any:
    """
    Returns the class of the upcycled models of a base model.

    Args:
        base (`type[PreTrainedModel]`):
            A model class of Transformers.
        config_class (`type`, *optional*):
            Class of the upcycled configuration. By default, it is derived from the configuration of the base class. It
            is needed for model types that have their own configuration, but the model class of another type, such as
            EXAONE, which uses that of Llama.

    Returns:
        `type`: A subclass of [`UpcycledMixin`] and of the base class, the same for every call.
    """
    if issubclass(base, UpcycledMixin):
        return base
    if config_class is None or not issubclass(config_class, UpcycledConfigMixin):
        config_class = upcycled_config_class(base.config_class)
    name = upcycled_name(base, config_class)
    made = globals().get(name)
    if made is None:
        made = globals().setdefault(name, _make_model_class(name, base, config_class))  # another thread may be faster
    return made


def output_class(base: type[ModelOutput]) -> Any:
    """Returns a subclass of an output class with fields for the routing, the same for every call."""
    if base not in _output_classes:
        names = [name for name in (*_ROUTING_FIELDS, *_LOSS_FIELDS) if name not in base.__dataclass_fields__]
        extra = [(name, Any, field(default=None)) for name in names]
        made = make_dataclass(f"{PREFIX}{base.__name__}", extra, bases=(base,)) if extra else base
        made.__module__ = __name__
        made = _output_classes.setdefault(base, made)  # another thread may have been faster
        globals().setdefault(made.__name__, made)
    return _output_classes[base]


_output_classes: dict[type, Any] = {}


def _make_model_class(name: str, base: Any, config_class: Any) -> type:
    """Creates the class of the upcycled models of a base model."""
    namespace = {
        "__module__": __name__,
        "__doc__": f"[`~transformers.{base.__name__}`] with experts: see [`UpcycledMixin`].",
        "config_class": config_class,
        "forward": forward_of(base.forward),
    }
    if issubclass(base, GenerationMixin):
        namespace["prepare_inputs_for_generation"] = _prepare_inputs_of(base)
    bases: tuple[Any, ...] = (UpcycledMixin, base)
    if issubclass(base, GenerationMixin):
        # Without `GenerationMixin`, the auto classes create a subclass, which cannot be pickled.
        bases = (UpcycledGeneration, *bases, GenerationMixin)
    made: Any = type(name, bases, namespace)
    # Transformers registers the outputs to record (`output_hidden_states` etc.) by class when it creates a model. At
    # that time, the submodels of an upcycled model still have their base classes.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(made), made._can_record_outputs)
    auto_class = _auto_class_of(base, config_class)
    if auto_class is not None:
        made.register_for_auto_class(auto_class)
    for kind in get_args(get_type_hints(base.forward).get("return", None)):
        if isinstance(kind, type) and issubclass(kind, ModelOutput):
            output_class(kind)  # created now, because a traced forward pass cannot create classes
    return made


def forward_of(base_forward: Any, others: Iterable[inspect.Parameter] = ()) -> Any:
    """
    Returns the `forward` of an upcycled class.

    Args:
        base_forward (`Callable`):
            `forward` of the base class.
        others (`Iterable[inspect.Parameter]`, *optional*):
            Parameters of a submodel, to which `base_forward` passes its keyword arguments.

    Returns:
        `Callable`: A function with the signature of the base class and the additional arguments of [`UpcycledMixin`].
    """
    signature = inspect.signature(base_forward)
    parameters = list(signature.parameters.values())
    names = [
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ][1:]
    variadic = [parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
    named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    of_others = [parameter for parameter in others if parameter.name not in signature.parameters]
    named += [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in of_others]
    takes = frozenset(parameter.name for parameter in (*named, *variadic))

    @functools.wraps(base_forward)
    def forward(self, *args, **kwargs):
        return self._run(base_forward, takes, {**dict(zip(names, args, strict=False)), **kwargs})

    # `generate` and `Trainer` inspect the signature of `forward`.
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("mm_token_type_ids", "output_router_logits")
        if name not in takes
    ]
    forward.__signature__ = signature.replace(parameters=[*named, *own, *variadic])  # type: ignore[attr-defined]
    return forward


def _prepare_inputs_of(base: Any) -> Any:
    """Returns `prepare_inputs_for_generation` of the upcycled class, which adds the modality ids of the step."""
    prepare = base.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(self, input_ids, *args, mm_token_type_ids=None, **kwargs):
        if mm_token_type_ids is None:
            return prepare(self, input_ids, *args, **kwargs)
        model_inputs = prepare(self, input_ids, *args, mm_token_type_ids=mm_token_type_ids, **kwargs)
        prompt = model_inputs.get("inputs_embeds")
        tokens = model_inputs["input_ids"] if prompt is None else prompt
        model_inputs["mm_token_type_ids"] = ids_of_step(mm_token_type_ids, input_ids, tokens)
        return model_inputs

    return prepare_inputs_for_generation


def _auto_class_of(base: Any, config_class: Any) -> str | None:
    """Returns the auto class under which `auto_map` lists a saved model, or `None` if there is none."""
    models = models_of_type(config_class.base_model_type)
    return next((auto_class for auto_class, name in models.items() if name == base.__name__), None)


def _base_of(model_class: type) -> Any:
    """Returns the Transformers class from which an upcycled class, or torch's subclass of one, was created."""
    mro = model_class.__mro__
    return mro[mro.index(ExpertsHost) + 1]


def _dense_config(config: Any) -> Any:
    """Returns the configuration of the base model of an upcycled configuration, as a new object."""
    base: Any = next(kind for kind in type(config).__mro__ if kind.__module__.startswith("transformers."))
    values = config.to_dict()
    for name in ("experts_config", "auto_map", "model_type", "architectures"):
        values.pop(name, None)
    return base.from_dict(values)


def __getattr__(name: str) -> Any:
    base_name, _, config_name = name.removeprefix(PREFIX).partition(OTHER_CONFIG)
    base = _find_base(base_name) if name.startswith(PREFIX) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return upcycled_model_class(
        base, upcycled_config_class(getattr(transformers, config_name or base.config_class.__name__))
    )


def _find_base(name: str) -> Any:
    """Returns the Transformers model class with this name, if it is exported or its module is already imported."""
    modules = [transformers, *(module for key, module in sys.modules.items() if ".modeling_" in key)]
    for module in modules:
        base = getattr(module, name, None) if module is transformers else vars(module).get(name)
        if isinstance(base, type) and issubclass(base, PreTrainedModel) and base.__module__.startswith("transformers."):
            return base
    return None


__all__ = ["UpcycledMixin", "upcycled_model_class"]

globals().update(_DEFINED)
