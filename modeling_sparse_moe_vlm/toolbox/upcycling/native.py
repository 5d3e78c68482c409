"""Export of an upcycled model to a class of Transformers, the sparse twin of its base, without remote code.

model = upcycle(dense, expert_groups="joint")      # and training, if any
twin = to_native(model)
twin.save_pretrained("twin")
AutoProcessor.from_pretrained("dense").save_pretrained("twin")
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn.functional import pad
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
    __version__,
    initialization,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...checkpoint_conversion import MATRICES
from ...configuration_upcycled import OTHER_CONFIG, PREFIX
from ...experts_config import SparseMoeVlmExpertsConfig
from ...modeling_upcycled import full_path
from .errors import UpcyclingError
from .native_twins import COMPOSITE_TWINS, TWINS, SparseLayers, Twin

# The auto classes that may load an upcycled model, in the order in which they are tried.
_AUTO_CLASSES = (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModel)
# What the names of router biases end with.
ROUTER_BIAS = "e_score_correction_bias"
_MODELS_OF_TRANSFORMERS = "transformers.models."

# Fields of a base's configuration that a twin may lack, with any value. They do not affect the outputs, describe
# dense blocks that no longer exist, or decide which parameters exist, and parameters are compared.
_INERT_FIELDS = {
    "attention_bias",
    "attention_dropout",
    "attention_out_bias",
    "block_auto_adjust_ff_dim",
    "block_ffn_dim_multiplier",
    "block_multiple_of",
    "embd_pdrop",
    "embedding_initializer_range",
    "full_attn_idxs",
    "intermediate_size",
    "max_window_layers",
    "original_max_position_embeddings",
    "pretraining_tp",
    "resid_pdrop",
    "residual_dropout",
    "transformers_version",
    "use_bias",
}
# Fields that a twin's configuration need not declare, because its modules read them if they exist.
_UNDECLARED_FIELDS = {"head_dim"}


def to_native(model: PreTrainedModel) -> PreTrainedModel:
    """
    Turns an upcycled model into the class of Transformers that computes the same: the sparse twin of its base.

    The twin shares all unchanged weights with `model`, so that there is no second model in memory. Train only one of
    them. The twin's `save_pretrained` writes a checkpoint without remote code, in the format of checkpoints of its
    class on the Hub. The processor is the base's own: save it to the same folder.

    Args:
        model (`PreTrainedModel`):
            A model from [`upcycle`], or one that was loaded from the folder of such a model, before or after training.
            Adapters must be merged.

    Returns:
        `PreTrainedModel`: The twin, with the model's dtype, devices, generation configuration, attention implementation
        and mode (training or evaluation).

    Raises:
        UpcyclingError: If Transformers has no class that computes what the model does. The message gives the reason for
            each class that was considered.
    """
    _check_is_upcycled(model)
    _check_weights_are_plain(model)
    return _twin_of(model, model.state_dict())


def native_on_meta(model: PreTrainedModel, bias: torch.Tensor | None = None) -> PreTrainedModel:
    """
    Builds the twin of an upcycled model without weights: see [`to_native`].

    Args:
        model (`PreTrainedModel`):
            The upcycled model, on the meta device.
        bias (`torch.Tensor` of shape `(num_modalities, E)`, *optional*):
            Bias of all routers that have one (`router_bias_update_rate`), since a twin may be unable to have it. By
            default zeros, as before training.

    Returns:
        `PreTrainedModel`: The twin, on the meta device.

    Raises:
        UpcyclingError: If Transformers has no class that computes what the model does.
    """
    _check_is_upcycled(model)
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith(ROUTER_BIAS):
            state[name] = torch.zeros(tensor.shape) if bias is None else bias.expand(tensor.shape)
    return _twin_of(model, state)


def _check_is_upcycled(model: PreTrainedModel) -> None:
    experts = getattr(model.config, SparseMoeVlmExpertsConfig.base_config_key, None)
    if getattr(experts, "blocks", None) is None:
        raise UpcyclingError(f"{type(model).__name__} is not an upcycled model: there is nothing to export.")


def _twin_of(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Builds the twin of an upcycled model with the tensors of a state dict."""
    experts = getattr(model.config, SparseMoeVlmExpertsConfig.base_config_key)
    base_class = _class_of_transformers(model)
    base = base_config(model.config)
    decoder = base.get_text_config()
    blocks = _names_of_blocks(model, experts, state)
    layers = _sparse_layers(experts, state, blocks)

    reasons = []
    for twin in TWINS.get(decoder.model_type, ()):
        try:
            if twin.model_type not in CONFIG_MAPPING:
                raise UpcyclingError(f"transformers {__version__} does not have it")
            reason = twin.refusal(layers)
            if reason is not None:
                raise UpcyclingError(reason)
            return _build(model, base_class, base, twin, twin.fit(layers, decoder.hidden_size), state, blocks)
        except UpcyclingError as error:
            reasons.append(f"{twin.model_type}: {error}")
    if not reasons:
        raise UpcyclingError(
            f"Transformers has no sparse counterpart of {decoder.model_type!r} decoders. These decoders have one: "
            f"{', '.join(sorted(TWINS))}."
        )
    raise UpcyclingError(
        f"No sparse class of Transformers computes what this {type(model).__name__} does:\n"
        + "\n".join(f"- {reason}." for reason in reasons)
    )


def _check_weights_are_plain(model: PreTrainedModel) -> None:
    """Raises `UpcyclingError` if weights are adapted, quantised, offloaded or sharded."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UpcyclingError("The model has adapters: merge them first (`model = model.merge_and_unload()`).")
    if getattr(model, "is_quantized", False):
        raise UpcyclingError("The model is quantized: load it without `quantization_config`.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UpcyclingError("Some weights are offloaded: load the model without a `device_map` that offloads.")
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise UpcyclingError("The weights are sharded over processes: load the model in a single process.")


def _class_of_transformers(model: nn.Module) -> type[PreTrainedModel]:
    """Returns the base's class, which an upcycled model inherits from."""
    for cls in type(model).__mro__:
        if cls.__module__.startswith(_MODELS_OF_TRANSFORMERS) and issubclass(cls, PreTrainedModel):
            return cls
    raise UpcyclingError(
        f"The base of {type(model).__name__} is not a class of Transformers, so it has no sparse counterpart there."
    )


def base_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the base's configuration, without what upcycling added."""
    cls: type[PreTrainedConfig] = next(
        cls for cls in type(config).__mro__ if cls.__module__.startswith(_MODELS_OF_TRANSFORMERS)
    )
    values = config.to_dict()
    for name in (SparseMoeVlmExpertsConfig.base_config_key, "model_type", "auto_map", "architectures"):
        values.pop(name, None)
    return cls.from_dict(values)


def dense_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the configuration of the dense model that was upcycled, with the name of its class."""
    dense = base_config(config)
    if config.architectures:
        dense.architectures = [name.removeprefix(PREFIX).partition(OTHER_CONFIG)[0] for name in config.architectures]
    return dense


def _names_of_blocks(model: PreTrainedModel, experts: Any, state: dict[str, torch.Tensor]) -> list[str]:
    """Returns the names of the sparse blocks in the model's state dict, by layer."""
    blocks = [full_path(model, block) for block in experts.blocks]
    missing = [block for block in blocks if f"{block}.gate.weight" not in state]
    if missing:
        raise UpcyclingError(f"{type(model).__name__} has no {_some(missing)}: pass the whole upcycled model.")
    return blocks


def _sparse_layers(experts: Any, state: dict[str, torch.Tensor], blocks: list[str]) -> SparseLayers:
    """Describes the sparse layers of a model, which must be alike and treat all tokens alike."""
    if experts.expert_capacity_factor is not None:
        raise UpcyclingError("`expert_capacity_factor` is set: no class of Transformers has experts with a capacity.")
    if experts.pools:
        raise UpcyclingError("`expert_pool` is set: no class of Transformers shares experts between layers.")
    if experts.router == "top_p":
        raise UpcyclingError('`router` is "top_p": no class of Transformers has such a router.')
    top_k = {experts.experts_per_token(modality) for modality in experts.modalities}
    if len(top_k) > 1:
        raise UpcyclingError(
            "`num_experts_per_tok_by_modality` differs between modalities: no class of Transformers can tell the "
            "modalities of tokens apart."
        )
    shapes = set()
    for layer in experts.sparse_layers:
        groups = experts.layer_expert_groups(layer)
        for group in groups:
            if set(group.modalities) != set(experts.modalities):
                raise UpcyclingError(
                    f"`expert_groups[{group.name!r}]` serves {', '.join(group.modalities)} only: no class of "
                    "Transformers can tell the modalities of tokens apart. Models that are upcycled with "
                    '`expert_groups="joint"`, or with always-on experts of all modalities, can be exported.'
                )
        routed = [group for group in groups if not group.always_on]
        if len(routed) != 1:
            raise UpcyclingError(
                f"`expert_groups` has {len(routed)} routed groups in layer {layer}: classes of Transformers have "
                "only one."
            )
        shared_width = sum(group.num_experts * group.intermediate_size for group in groups if group.always_on)
        shapes.add((routed[0].num_experts, routed[0].intermediate_size, shared_width))
    if len(shapes) > 1:
        raise UpcyclingError(
            "`expert_groups` differs between layers: in classes of Transformers, all layers have the same experts."
        )
    (num_experts, width, shared_width) = shapes.pop()
    return SparseLayers(
        num_layers=experts.num_hidden_layers,
        sparse=tuple(experts.sparse_layers),
        num_experts=num_experts,
        top_k=top_k.pop(),
        width=width,
        shared_width=shared_width,
        router=experts.router,
        norm_topk_prob=experts.norm_topk_prob,
        has_bias=any(bool(_bias(state, block).any()) for block in blocks if f"{block}.gate.{ROUTER_BIAS}" in state),
        dense_width=_dense_width(state, blocks[0]),
    )


def _dense_width(state: dict[str, torch.Tensor], block: str) -> int | None:
    """Returns the width of the blocks that stayed dense, if there are any."""
    layer, _, attribute = block.rpartition(".")
    layers = layer.rpartition(".")[0]
    down = re.compile(rf"{re.escape(layers)}\.\d+\.{attribute}\.(down_proj|w2)\.weight")
    return next((tensor.shape[1] for name, tensor in state.items() if down.fullmatch(name)), None)


def _bias(state: dict[str, torch.Tensor], block: str) -> torch.Tensor:
    """Returns the bias `(E,)` of a router, or zeros if it has none."""
    weight = state[f"{block}.gate.weight"]
    bias = state.get(f"{block}.gate.{ROUTER_BIAS}")
    if bias is None:
        return torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
    if not torch.equal(bias, bias[:1].expand_as(bias)):
        raise UpcyclingError(
            "The routers' biases of `router_bias_update_rate` differ between modalities: no class of Transformers can "
            "tell the modalities of tokens apart."
        )
    return bias[0]


def _build(
    model: PreTrainedModel,
    base_class: type[PreTrainedModel],
    base: PreTrainedConfig,
    twin: Twin,
    layers: SparseLayers,
    state: dict[str, torch.Tensor],
    blocks: list[str],
) -> PreTrainedModel:
    """Builds a twin with the model's weights."""
    config = _twin_config(base, twin, layers)
    twin_class = base_class if type(config) is type(base) else _twin_class(base_class, type(base), type(config))
    with init_empty_weights(include_buffers=False), initialization.no_init_weights():
        native = twin_class._from_config(config, dtype=model.dtype, attn_implementation=_attention(model.config))
    native.tie_weights()  # a head may have another shape before it is tied
    tensors = _twin_state(twin, layers, base.get_text_config(), state, blocks)
    _check_same_tensors(native, tensors)
    native.load_state_dict(tensors, assign=True)
    native.tie_weights()
    # Buffers that are not part of the state dict, such as rotary frequencies, were computed on the CPU.
    for name, buffer in native.named_buffers():
        if name not in tensors:
            parent, _, attribute = name.rpartition(".")
            setattr(native.get_submodule(parent), attribute, buffer.to(model.device))
    if getattr(model, "generation_config", None) is not None:
        native.generation_config = copy.deepcopy(model.generation_config)
    if twin.swaps_stacks:
        native._weight_conversions = _conversions_to_hub_format(native)
    return native.train(model.training)


def _twin_class(base_class: type, base_config: type, twin_config: type) -> type[PreTrainedModel]:
    """Returns the class of the same kind (causal language model, base model, …) for the twin's configuration."""
    for auto_class in _AUTO_CLASSES:
        mapping = auto_class._model_mapping
        if base_config in mapping and twin_config in mapping and mapping[base_config] is base_class:
            return mapping[twin_config]
    raise UpcyclingError(f"it has no class that corresponds to {base_class.__name__}")


def _twin_config(base: PreTrainedConfig, twin: Twin, layers: SparseLayers) -> PreTrainedConfig:
    """Returns the configuration of the whole twin: that of the base, with the twin's decoder."""
    decoder = base.get_text_config()
    text_config = _decoder_config(decoder, twin, layers)
    if decoder is base:
        return text_config
    (name,) = [name for name, value in vars(base).items() if value is decoder]
    if base.model_type not in COMPOSITE_TWINS:
        config = copy.deepcopy(base)  # other twins may be tried after this one
        setattr(config, name, text_config)
        return config
    config_class = CONFIG_MAPPING[COMPOSITE_TWINS[base.model_type]]
    values = base.to_dict()
    values.pop("model_type")
    own = {field.name for field in fields(config_class)}
    return config_class.from_dict({key: value for key, value in values.items() if key in own} | {name: text_config})


def _decoder_config(base: PreTrainedConfig, twin: Twin, layers: SparseLayers) -> PreTrainedConfig:
    """
    Returns the configuration of the twin's decoder.

    Raises:
        UpcyclingError: If it cannot express a field of the base's configuration.
    """
    config_class = CONFIG_MAPPING[twin.model_type]
    declared = {field.name for field in fields(config_class)}
    changed = twin.fields(layers, base)
    causal_lms = AutoModelForCausalLM._model_mapping
    # Serving engines choose the class of a decoder within a model by this name.
    changed["architectures"] = [causal_lms[config_class].__name__] if config_class in causal_lms else None
    carried = {}
    for name in (field.name for field in fields(type(base))):
        value = getattr(base, name)
        if name in changed:
            continue
        if name in declared or name in _UNDECLARED_FIELDS:
            carried[name] = copy.deepcopy(value)
        elif name == "layer_types" and set(value) in ({"full_attention"}, {"sliding_attention"}):
            continue  # all layers are alike, as in a twin; `sliding_window` is a separate field
        elif value and name not in _INERT_FIELDS:
            raise UpcyclingError(f"its configuration has no `{name}`, which is {value!r} in the base's")
    config = config_class(**carried | changed)
    for name, value in (carried | changed).items():
        kept = getattr(config, name, None)
        if kept != value and (kept or value) and name != "transformers_version":
            raise UpcyclingError(f"its configuration makes `{name}` {kept!r}, which is {value!r} in the base's")
    return config


def _attention(config: PreTrainedConfig) -> dict[str, str]:
    """Returns the attention implementations of a model and its parts."""
    parts = {"": config} | {name: getattr(config, name, None) for name in config.sub_configs}
    return {
        name: part._attn_implementation
        for name, part in parts.items()
        if name != SparseMoeVlmExpertsConfig.base_config_key and getattr(part, "_attn_implementation", None) is not None
    }


def _twin_state(
    twin: Twin,
    layers: SparseLayers,
    decoder: PreTrainedConfig,
    state: dict[str, torch.Tensor],
    blocks: list[str],
) -> dict[str, torch.Tensor]:
    """Returns the twin's tensors by name."""
    of_blocks = tuple(f"{block}." for block in blocks)
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith(of_blocks)}
    if twin.splits_qkv:
        for name in [name for name in tensors if name.endswith(".qkv_proj.weight")]:
            heads, kv_heads = decoder.num_attention_heads, decoder.num_key_value_heads
            by_head = tensors.pop(name).unflatten(0, (heads + 2 * kv_heads, -1))
            for part, rows in zip("qkv", by_head.split([heads, kv_heads, kv_heads]), strict=True):
                tensors[name.replace(".qkv_proj.", f".{part}_proj.")] = rows.flatten(0, 1)
    for block in blocks:
        place = {"block": block, "layer": block.rpartition(".")[0]}
        router = state[f"{block}.gate.weight"]
        tensors[twin.gate.format(**place)] = router
        if twin.bias is not None:
            tensors[twin.bias.format(**place)] = _bias(state, block).reshape(twin.bias_shape)
        experts = twin.experts.format(**place)
        gate_up = _stack(state, f"{block}.experts.", "gate_up_proj")
        down = _stack(state, f"{block}.experts.", "down_proj")
        more = layers.width - down.shape[2]
        if more:
            gate_up = pad(gate_up.unflatten(1, (2, -1)), (0, 0, 0, more)).flatten(1, 2)
            down = pad(down, (0, more))
        tensors[f"{experts}.gate_up_proj"] = gate_up
        tensors[f"{experts}.down_proj"] = down
        if layers.shared_width:
            tensors |= _shared(twin, layers.shared_width, state, block, place)
    return tensors


def _shared(
    twin: Twin, width: int, state: dict[str, torch.Tensor], block: str, place: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Returns the twin's always-on expert of one layer: those of all groups concatenated, and padded with zeros."""
    prefix = f"{block}.shared_experts."
    router = state[f"{block}.gate.weight"]
    nothing = router.new_zeros(0, router.shape[1])
    gate = torch.cat([nothing, *_ending(state, prefix, ".gate_proj.weight")])
    up = torch.cat([nothing, *_ending(state, prefix, ".up_proj.weight")])
    down = torch.cat([nothing.T, *_ending(state, prefix, ".down_proj.weight")], dim=1)
    more = width - gate.shape[0]
    gate, up, down = pad(gate, (0, 0, 0, more)), pad(up, (0, 0, 0, more)), pad(down, (0, more))
    assert twin.shared is not None
    name = twin.shared.format(**place)
    if twin.shared_is_fused:
        return {f"{name}.input_linear.weight": torch.cat([gate, up]), f"{name}.output_linear.weight": down}
    tensors = {f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up, f"{name}.down_proj.weight": down}
    if twin.shared_gate is not None:
        # The sigmoid of 0 is 1/2, whatever the token.
        tensors[f"{name}.down_proj.weight"] = 2 * down
        tensors[twin.shared_gate.format(**place)] = router.new_zeros(1, router.shape[1])
    return tensors


def _stack(state: dict[str, torch.Tensor], prefix: str, suffix: str) -> torch.Tensor:
    """Returns a stack of the experts of one layer, which may be sharded or unfused."""
    found = _ending(state, prefix, suffix)
    if not found:
        return torch.cat(
            [torch.stack(_ending(state, prefix, f".{matrix}.weight")) for matrix in MATRICES[suffix]], dim=1
        )
    first, *others = found
    return torch.cat([first, *(shard.to(first.device) for shard in others)]) if others else first


def _ending(state: dict[str, torch.Tensor], prefix: str, suffix: str) -> list[torch.Tensor]:
    """Returns the tensors whose names have a prefix and a suffix, in the order of the state dict."""
    return [tensor for name, tensor in state.items() if name.startswith(prefix) and name.endswith(suffix)]


def _check_same_tensors(native: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Raises `UpcyclingError` if the twin's tensors are not those that the model has for it."""
    own = native.state_dict()
    for reason, names in (
        ("it has no place for", tensors.keys() - own.keys()),
        ("the model lacks its", own.keys() - tensors.keys()),
        ("of another shape in it are", [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]),
    ):
        if names:
            raise UpcyclingError(f"{reason} {_some(names)}")


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"`{first}`" + (f" and {len(others)} more" if others else "")


def _conversions_to_hub_format(native: PreTrainedModel) -> list[Any]:
    """
    Returns the conversions that saving reverts. They always transpose. Those of the library only transpose a stack if
    its shape differs from the model's, which is never the case in saving, so only Transformers could read the result.
    """
    conversions = get_model_conversion_mapping(native, add_legacy=False)
    for conversion in conversions:
        for operation in getattr(conversion, "operations", []):
            if getattr(operation, "check_dims", False):
                operation.check_dims = False
    return conversions
