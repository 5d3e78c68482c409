"""The sparse classes of Transformers that an upcycled model can be turned into, for each type of dense decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from .errors import UpcyclingError

# Width of a shared expert of zeros, if a twin must have one. Tensor parallelism can split it.
ZERO_SHARED_WIDTH = 128


@dataclass(frozen=True)
class SparseLayers:
    """A description of the sparse layers of a model, in terms that all twins have in common.

    Args:
        num_layers (`int`): Number of decoder layers.
        sparse (`tuple[int, ...]`): The layers that have experts.
        num_experts (`int`): Number of routed experts of a layer.
        top_k (`int`): Number of routed experts per token.
        width (`int`): Width of a routed expert.
        shared_width (`int`): Total width of the always-on experts of a layer; 0 if there are none.
        router (`str`): `"softmax"` or `"sigmoid"`.
        norm_topk_prob (`bool`): Whether the weights of the chosen experts sum to 1.
        has_bias (`bool`): Whether the biases of the routers affect the choice of experts.
        dense_width (`int`, *optional*): Width of the blocks of dense layers, if there are any.
    """

    num_layers: int
    sparse: tuple[int, ...]
    num_experts: int
    top_k: int
    width: int
    shared_width: int
    router: str
    norm_topk_prob: bool
    has_bias: bool
    dense_width: int | None = None

    @property
    def dense(self) -> tuple[int, ...]:
        """The layers without experts."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.sparse)

    @property
    def num_shared(self) -> int:
        """Total width of the always-on experts, in routed experts."""
        return self.shared_width // self.width


@dataclass(frozen=True)
class Twin:
    """A decoder of Transformers with experts that computes what an upcycled decoder computes.

    Names of parameters are templates: `{block}` is the name of the dense block, `{layer}` that of its decoder layer.

    Args:
        model_type (`str`): Type of the twin's decoder.
        fields (`Callable`): Returns the fields of its configuration that differ from the base's, given the sparse
            layers and the base's configuration. They describe the sparse layers, and make the rest of the decoder that
            of the base.
        routers (`tuple[str, ...]`): The routers that it supports.
        always_normalised (`bool`): Whether it always normalises the weights of the chosen experts.
        gate (`str`): Name of the router's weight `(E, D)`.
        experts (`str`): Name of the module with the stacks `gate_up_proj` `(E, 2 I, D)` and `down_proj` `(E, D, I)`.
        bias (`str`, *optional*): Name of the router's bias for the choice of experts.
        bias_shape (`tuple[int, ...]`): Its shape.
        shared (`str`, *optional*): Name of the module of always-on experts.
        shared_unit (`str`): The widths that they can have: `"any"`, `"expert"` (a multiple of a routed expert's) or
            `"same"` (that of one routed expert).
        needs_shared (`bool`): Whether it always has always-on experts, which are zeros if the model has none.
        shared_gate (`str`, *optional*): Name of the weight `(1, D)` of a sigmoid gate of the always-on experts.
        shared_is_fused (`bool`): Whether gate and up projection of the always-on experts are one matrix.
        dense_layers (`str`): Which layers can be dense: `"none"`, `"any"`, `"first"` or `"ends"`.
        swaps_stacks (`bool`): Whether checkpoints on the Hub have the stacks of experts transposed.
        splits_qkv (`bool`): Whether it has three matrices for the base's one of queries, keys and values.
    """

    model_type: str
    fields: Callable[[SparseLayers, PreTrainedConfig], dict[str, Any]]
    routers: tuple[str, ...] = ("softmax",)
    always_normalised: bool = True
    gate: str = "{block}.gate.weight"
    experts: str = "{block}.experts"
    bias: str | None = None
    bias_shape: tuple[int, ...] = (-1,)
    shared: str | None = None
    shared_unit: str = "any"
    needs_shared: bool = False
    shared_gate: str | None = None
    shared_is_fused: bool = False
    dense_layers: str = "none"
    swaps_stacks: bool = False
    splits_qkv: bool = False

    def refusal(self, layers: SparseLayers) -> str | None:
        """Returns why the twin cannot have these sparse layers, or `None` if it can."""
        if layers.router not in self.routers:
            return f"its router is {' or '.join(self.routers)}, the model's `router` is {layers.router!r}"
        if self.always_normalised and not layers.norm_topk_prob:
            return "its weights of the chosen experts always sum to 1, and the model's `norm_topk_prob` is False"
        if layers.has_bias and self.bias is None:
            return "its routers have no bias, and `router_bias_update_rate` gave the model's routers one"
        if layers.shared_width and self.shared is None:
            return "it has no always-on experts, and the model's `expert_groups` has some"
        if layers.shared_width > layers.width and self.shared_unit == "same":
            return (
                f"its always-on experts are as wide as a routed one ({layers.width}, `moe_intermediate_size`), and the "
                f"model's are wider together ({layers.shared_width})"
            )
        dense = layers.dense
        allowed = {
            "none": (),
            "any": dense,
            "first": tuple(range(len(dense))),
            "ends": tuple(layer for layer in dense if not layers.sparse[0] < layer < layers.sparse[-1]),
        }[self.dense_layers]
        if dense != allowed:
            where = {"none": "no layer", "first": "only the first layers", "ends": "only the first and last layers"}
            return f"{where[self.dense_layers]} can be dense in it, and the model's layers {list(dense)} are (`layers`)"
        return None

    def fit(self, layers: SparseLayers, hidden_size: int) -> SparseLayers:
        """
        The sparse layers as the twin has them: experts that must be wider get neurons of zeros.

        Args:
            layers (`SparseLayers`): The sparse layers of the model.
            hidden_size (`int`): Width of the residual stream.
        """
        width, shared = layers.width, layers.shared_width
        if self.swaps_stacks and hidden_size in (width, 2 * width):
            width += 64  # a stack of square matrices does not tell whether it is transposed
        if shared == 0 and self.needs_shared:
            shared = ZERO_SHARED_WIDTH if self.shared_unit == "any" else width
        if self.shared_unit != "any":
            shared = -(-shared // width) * width
        return replace(layers, width=width, shared_width=shared)


def _mixtral(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return {
        "num_local_experts": layers.num_experts,
        "num_experts_per_tok": layers.top_k,
        "intermediate_size": layers.width,
    }


def _mixtral_as_phi3(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return _mixtral(layers, base) | {"rope_parameters": _rope_of_phi3(base)}


def _qwen_moe(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return {
        "num_experts": layers.num_experts,
        "num_experts_per_tok": layers.top_k,
        "moe_intermediate_size": layers.width,
        "norm_topk_prob": layers.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(layers.dense),
    }


def _qwen2_moe(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return _qwen_moe(layers, base) | {
        "shared_expert_intermediate_size": layers.shared_width,
        "qkv_bias": _has_qkv_bias(base),
    }


def _qwen3_vl_moe(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    fields = _qwen_moe(layers, base)
    del fields["norm_topk_prob"]
    return fields


def _qwen3_5_moe(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return {
        "num_experts": layers.num_experts,
        "num_experts_per_tok": layers.top_k,
        "moe_intermediate_size": layers.width,
        "shared_expert_intermediate_size": layers.shared_width,
    }


def _granitemoeshared(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return _mixtral(layers, base) | {"shared_intermediate_size": layers.shared_width}


def _granitemoeshared_as_llama(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return _granitemoeshared(layers, base) | {
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": _head_dim(base) ** -0.5,
    }


def _granitemoeshared_as_phi3(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return _granitemoeshared_as_llama(layers, base) | {"rope_parameters": _rope_of_phi3(base)}


def _deepseek_v3(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return {
        "n_routed_experts": layers.num_experts,
        "num_experts_per_tok": layers.top_k,
        "moe_intermediate_size": layers.width,
        "n_shared_experts": layers.num_shared,
        "first_k_dense_replace": len(layers.dense),
        "norm_topk_prob": layers.norm_topk_prob,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    }


def _glm4_moe(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    # Its own default turns half of each head.
    rope = {**base.rope_parameters, "partial_rotary_factor": 1.0}
    return _deepseek_v3(layers, base) | {"rope_parameters": rope, "use_qk_norm": False}


def _glm4_moe_with_biases(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return _glm4_moe(layers, base) | {"attention_bias": _has_qkv_bias(base)}


def _glm4_moe_with_norms(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return _glm4_moe(layers, base) | {"use_qk_norm": True}


def _ernie4_5_moe(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return {
        "moe_num_experts": layers.num_experts,
        "moe_k": layers.top_k,
        "moe_intermediate_size": layers.width,
        "moe_num_shared_experts": layers.num_shared,
        "moe_layer_start_index": layers.sparse[0],
        "moe_layer_end_index": layers.sparse[-1],
        "moe_layer_interval": 1,
    }


def _hunyuan_v1_moe(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return {"num_experts": layers.num_experts, "moe_topk": layers.top_k, "intermediate_size": layers.width}


def _lfm2_moe(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return {
        "num_experts": layers.num_experts,
        "num_experts_per_tok": layers.top_k,
        "moe_intermediate_size": layers.width,
        "num_dense_layers": len(layers.dense),
        "norm_topk_prob": layers.norm_topk_prob,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
        "intermediate_size": layers.dense_width or base.intermediate_size,
    }


def _cohere2_moe(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return {
        "num_experts": layers.num_experts,
        "num_experts_per_tok": layers.top_k,
        "intermediate_size": layers.width,
        "prefix_dense_intermediate_size": base.intermediate_size,
        "num_shared_experts": layers.num_shared,
        "shared_expert_combination_strategy": "sum",
        "expert_selection_fn": layers.router,
        "norm_topk_prob": layers.norm_topk_prob,
        "mlp_layer_types": ["dense" if layer in layers.dense else "sparse" for layer in range(layers.num_layers)],
        # Dense layers would also rotate queries and keys in full attention.
        "prefix_dense_sliding_window_pattern": 4,
        "head_dim": _head_dim(base),
        "rope_theta": base.rope_parameters["rope_theta"],
        "rope_parameters": base.rope_parameters,
    }


def _flex_olmo(layers: SparseLayers, base: PreTrainedConfig) -> dict[str, Any]:
    return {
        "num_experts": layers.num_experts,
        "num_experts_per_tok": layers.top_k,
        "intermediate_size": layers.width,
        "norm_topk_prob": layers.norm_topk_prob,
    }


def _rope_of_phi3(base: PreTrainedConfig) -> dict[str, Any]:
    rope = base.rope_parameters
    if rope["rope_type"] != "default" or rope["partial_rotary_factor"] != 1.0:
        raise UpcyclingError("it has rotary embeddings of the usual kind, and `rope_parameters` say otherwise")
    return {name: rope[name] for name in ("rope_type", "rope_theta")}


def _has_qkv_bias(config: PreTrainedConfig) -> bool:
    return getattr(config, "attention_bias", True)  # Qwen2 always has it


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# The twins, in the order in which they are tried: softmax before sigmoid routers, without before with shared experts.
_MIXTRAL = Twin("mixtral", _mixtral)
_QWEN2_MOE = Twin(
    "qwen2_moe",
    _qwen2_moe,
    always_normalised=False,
    shared="{block}.shared_expert",
    needs_shared=True,
    shared_gate="{block}.shared_expert_gate.weight",
    dense_layers="any",
)
_QWEN3_MOE = Twin("qwen3_moe", _qwen_moe, always_normalised=False, dense_layers="any")
_QWEN3_VL_MOE = Twin("qwen3_vl_moe_text", _qwen3_vl_moe, dense_layers="any", swaps_stacks=True)
_QWEN3_5_MOE = Twin(
    "qwen3_5_moe_text",
    _qwen3_5_moe,
    shared="{block}.shared_expert",
    needs_shared=True,
    shared_gate="{block}.shared_expert_gate.weight",
)
_GRANITE_MOE = Twin(
    "granitemoe",
    _mixtral,
    gate="{layer}.block_sparse_moe.router.weight",
    experts="{layer}.block_sparse_moe.experts",
)
_GRANITE_MOE_SHARED = replace(
    _GRANITE_MOE,
    model_type="granitemoeshared",
    fields=_granitemoeshared,
    shared="{layer}.shared_mlp",
    shared_is_fused=True,
)
_GRANITE_MOE_SWA = replace(_GRANITE_MOE_SHARED, model_type="granitemoe_swa")
_GRANITE_MOE_HYBRID = replace(_GRANITE_MOE_SHARED, model_type="granitemoehybrid", needs_shared=True)
_DEEPSEEK_V3 = Twin(
    "deepseek_v3",
    _deepseek_v3,
    routers=("sigmoid",),
    always_normalised=False,
    bias="{block}.gate.e_score_correction_bias",
    shared="{block}.shared_experts",
    shared_unit="expert",
    needs_shared=True,
    dense_layers="first",
)
_GLM4_MOE = replace(_DEEPSEEK_V3, model_type="glm4_moe", fields=_glm4_moe)
_ERNIE4_5_MOE = Twin(
    "ernie4_5_moe",
    _ernie4_5_moe,
    bias="{block}.gate.moe_statics.e_score_correction_bias",
    bias_shape=(1, -1),
    shared="{block}.shared_experts",
    shared_unit="expert",
    dense_layers="ends",
)
_HUNYUAN_V1_MOE = Twin(
    "hunyuan_v1_moe",
    _hunyuan_v1_moe,
    gate="{block}.gate.wg.weight",
    shared="{block}.shared_mlp",
    shared_unit="same",
    needs_shared=True,
)
_LFM2_MOE = Twin(
    "lfm2_moe",
    _lfm2_moe,
    routers=("sigmoid",),
    always_normalised=False,
    bias="{block}.expert_bias",
    dense_layers="first",
)
_COHERE2_MOE = Twin(
    "cohere2_moe", _cohere2_moe, shared="{block}.shared_experts", shared_unit="expert", dense_layers="any"
)
_FLEX_OLMO = Twin("flex_olmo", _flex_olmo, always_normalised=False)

_LLAMA_TWINS = (_MIXTRAL, replace(_GRANITE_MOE_SHARED, fields=_granitemoeshared_as_llama), _GLM4_MOE)

# Twins by the type of a dense decoder.
TWINS: dict[str, tuple[Twin, ...]] = {
    "cohere2": (_COHERE2_MOE, replace(_COHERE2_MOE, routers=("sigmoid",), always_normalised=False)),
    "ernie4_5": (_ERNIE4_5_MOE,),
    "exaone": _LLAMA_TWINS,
    "granite": (_GRANITE_MOE, _GRANITE_MOE_SHARED),
    "granite_swa": (_GRANITE_MOE_SWA,),
    "granitemoehybrid": (_GRANITE_MOE_HYBRID,),
    "helium": (_ERNIE4_5_MOE,),
    "hunyuan_v1_dense": (_HUNYUAN_V1_MOE,),
    "internlm3": _LLAMA_TWINS,
    "iquestcoder": _LLAMA_TWINS,
    "lfm2": (_LFM2_MOE,),
    "llama": _LLAMA_TWINS,
    "ministral": (_MIXTRAL,),
    "mistral": _LLAMA_TWINS,
    "olmo2": (_FLEX_OLMO,),
    "phi3": (
        replace(_MIXTRAL, fields=_mixtral_as_phi3, splits_qkv=True),
        replace(_GRANITE_MOE_SHARED, fields=_granitemoeshared_as_phi3, splits_qkv=True),
    ),
    "qwen2": (_QWEN2_MOE, replace(_GLM4_MOE, fields=_glm4_moe_with_biases)),
    "qwen3": (_QWEN3_MOE, replace(_GLM4_MOE, fields=_glm4_moe_with_norms)),
    "qwen3_5_text": (_QWEN3_5_MOE,),
    "qwen3_vl_text": (_QWEN3_VL_MOE,),
    "seed_oss": (_QWEN2_MOE, replace(_GLM4_MOE, fields=_glm4_moe_with_biases)),
    "youtu": (_DEEPSEEK_V3,),
}

# For dense models whose class contains a fixed decoder: the type of the model with the twin of that decoder. All other
# vision-language models build their decoder from `text_config`, and keep their class.
COMPOSITE_TWINS = {"qwen3_5": "qwen3_5_moe", "qwen3_vl": "qwen3_vl_moe"}
