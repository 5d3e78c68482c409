"""The layout of a dense decoder in terms of this package's decoder, read from its configuration and its modules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from .blocks import DenseBlocks, block_weights, find_blocks
from .decoders import decoder_layers, text_config_of
from .errors import UpcyclingError
from .layer_trace import LayerTrace, trace_decoder
from .norms import Norm, read_norm
from .starts import GatedWeights


class _Factors(NamedTuple):
    """
    Factors of the dense model (such as Granite's and Gemma's), which are folded into the weights of our decoder.

    Args:
        embedding, residual, logits (`float`): Factors of embedded tokens, of what layers add, and of logits.
        attention (`float`): Factor of attention logits, in addition to the usual 1/√d.
    """

    embedding: float = 1.0
    residual: float = 1.0
    attention: float = 1.0
    logits: float = 1.0


class _Layer(NamedTuple):
    """
    The parts of a layer except its feed-forward block, by their names in our layer.

    Args:
        norms (`dict[str, Norm]`): The norms, by the name of the module.
        projections (`dict[str, torch.Tensor]`): Weights and biases of the attention, by the name of the tensor.
        fields (`dict[str, Any]`): The fields of our configuration that follow from them.
    """

    norms: dict[str, Norm]
    projections: dict[str, torch.Tensor]
    fields: dict[str, Any]


@dataclass(frozen=True)
class DecoderLayout:
    """
    A dense decoder in terms of this package's decoder.

    Args:
        fields (`dict[str, Any]`):
            Fields of [`SparseMoeVlmTextConfig`], except those of the experts.
        blocks ([`DenseBlocks`]):
            The dense feed-forward blocks.
        is_centred (`bool`):
            Whether norms are LayerNorms. The mean of everything that enters the residual stream is then subtracted. For
            such a stream, an RMS norm computes what a LayerNorm computes.
    """

    fields: dict[str, Any]
    blocks: DenseBlocks
    is_centred: bool
    _model: PreTrainedModel
    _layers: list[_Layer]
    _final_norm: Norm
    _factors: _Factors

    @property
    def is_changed(self) -> bool:
        """Whether some weights differ from those of the dense model."""
        norms = [self._final_norm, *(norm for layer in self._layers for norm in layer.norms.values())]
        return self.is_centred or self._factors != _Factors() or any(norm.adds_one for norm in norms)

    def outer_weights(self) -> dict[str, torch.Tensor]:
        """Returns the token embedding, final norm and language head, by their names in our model."""
        embedding, head = self._model.get_input_embeddings().weight, self._model.get_output_embeddings().weight
        norm = self._final_norm.weight
        into_norm = self._factors.logits
        if self.fields["tie_word_embeddings"]:
            into_norm /= self._factors.embedding  # the head takes over the factor of the embedding
        weights = {
            "embed_tokens.weight": self._centred(_times(embedding, self._factors.embedding), dim=1),
            "norm.weight": _times(norm, into_norm),
        }
        return weights if self.fields["tie_word_embeddings"] else weights | {"lm_head.weight": head}

    def layer_weights(self, layer: int) -> dict[str, torch.Tensor]:
        """Returns the norms and the attention of a layer, by their names in our layer, computed at each call."""
        weights = {f"{name}.weight": norm.weight for name, norm in self._layers[layer].norms.items()}
        scaled = "self_attn.q_norm." if self.fields["use_qk_norm"] else "self_attn.q_proj."
        for name, tensor in (weights | self._layers[layer].projections).items():
            if name.startswith(scaled):
                tensor = _times(tensor, self._factors.attention)
            elif name.startswith("self_attn.o_proj."):
                tensor = self._centred(_times(tensor, self._factors.residual), dim=0)
            weights[name] = tensor
        return weights

    def block_weights(self, layer: int) -> GatedWeights:
        """Returns the dense feed-forward block of a layer."""
        block = self.blocks.blocks[layer]
        weights = block_weights(self._model.get_submodule(block.name), block)
        return weights._replace(down=self._centred(_times(weights.down, self._factors.residual), dim=0))

    def dense_block(self, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns a function that runs the dense feed-forward block of a layer in float32."""
        activation = ACT2FN[self.blocks.hidden_act]

        def run(x: torch.Tensor) -> torch.Tensor:
            gate, up, down = (weight.float() for weight in self.block_weights(layer))
            return F.linear(activation(F.linear(x, gate)) * F.linear(x, up), down)

        return run

    def _centred(self, weight: torch.Tensor, dim: int) -> torch.Tensor:
        if not self.is_centred:
            return weight
        return weight.float() - weight.float().mean(dim=dim, keepdim=True)


@torch.no_grad()
def read_decoder(model: PreTrainedModel) -> DecoderLayout:
    """
    Reads the layout of a dense language model of any class by running it on a few tokens.

    Args:
        model (`PreTrainedModel`):
            A language model with its head. It is not changed.

    Returns:
        [`DecoderLayout`]

    Raises:
        UpcyclingError: If the model has no language head or no weights, reads more than text, or has parts that our
            decoder does not have. [`~decoder_parity.check_decoder`] finds differences that only the outputs show.
    """
    name = type(model).__name__
    config = _check_model(model)
    blocks = find_blocks(model)
    place = decoder_layers(model)
    if len(blocks.blocks) < len(place.layers):
        raise UpcyclingError(f"{name} has layers without a feed-forward block, which our decoder does not support.")
    decoder = model.get_submodule(place.decoder) if place.decoder else model
    traces, (norm_name, norm_module) = trace_decoder(model, decoder, list(place.layers))
    _check_rest(model, [norm_module, *(part for trace in traces for part in trace.read)])
    layers = [_read_layer(config, trace, f"{place.path}.{number}.") for number, trace in enumerate(traces)]
    final_norm = read_norm(norm_name, norm_module, blocks.hidden_size)
    norms = [final_norm, *(norm for layer in layers for norm in layer.norms.values())]
    epsilons = sorted({norm.eps for norm in norms})
    if len(epsilons) > 1:
        raise UpcyclingError(f"the norms of {name} have the epsilons {epsilons}, but our decoder has a single one.")
    around = [final_norm, *(norm for layer in layers for part, norm in layer.norms.items() if "attn." not in part)]
    is_centred = final_norm.is_centred
    if any(norm.is_centred != is_centred for norm in around) or any(
        norm.is_centred for norm in norms if not any(norm is other for other in around)
    ):
        raise UpcyclingError(f"{name} has LayerNorms beside RMS norms, but our decoder has only RMS norms.")
    for number, layer in enumerate(layers):
        if layer.fields != layers[0].fields:
            raise UpcyclingError(
                f"attention in layer {number} of {name} has {layer.fields}, and in layer 0 {layers[0].fields}: in our "
                "decoder, attention is the same in all layers."
            )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    if is_centred and (final_norm.weight != final_norm.weight[0]).any():
        is_tied = False  # the head needs the embedding with its mean
    fields = {
        "vocab_size": len(embedding.weight),
        "hidden_size": blocks.hidden_size,
        "intermediate_size": blocks.blocks[0].intermediate_size,
        "num_hidden_layers": len(layers),
        "hidden_act": blocks.hidden_act,
        "rms_norm_eps": epsilons[0],
        "nope_layers": [number for number, trace in enumerate(traces) if not trace.is_rotary],
        "tie_word_embeddings": is_tied,
        **layers[0].fields,
        **_config_fields(config, len(embedding.weight)),
    }
    factors = _Factors(
        embedding=_embedding_factor(config, embedding),
        residual=float(getattr(config, "residual_multiplier", 1.0)),
        attention=_attention_factor(traces[0].attention[1], fields["head_dim"]),
        logits=1.0 / float(getattr(config, "logits_scaling", 1.0)),
    )
    return DecoderLayout(fields, blocks, is_centred, model, layers, final_norm, factors)


def _check_model(model: PreTrainedModel) -> PreTrainedConfig:
    """Returns the configuration of a language model, or raises `UpcyclingError` if its layout cannot be read."""
    if not isinstance(model, PreTrainedModel):
        raise UpcyclingError(f"`language_model` must be a model of Transformers, got {type(model).__name__}.")
    name = type(model).__name__
    config = text_config_of(model)
    if config is not model.config:
        raise UpcyclingError(f"{name} reads more than text: upcycle the whole model, with `upcycle`.")
    head = model.get_output_embeddings()
    if head is None:
        raise UpcyclingError(f"{name} has no language head: load it with `AutoModelForCausalLM`.")
    if getattr(head, "bias", None) is not None:
        raise UpcyclingError(f"the language head of {name} has a bias, but that of our decoder has none.")
    if model.device.type == "meta":
        raise UpcyclingError(f"{name} is on the meta device, without weights: load it first.")
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None and set(kinds) != {"full_attention"}:
        raise UpcyclingError(
            f"{name} has layers with {', '.join(sorted(set(kinds) - {'full_attention'}))}, and those of our decoder "
            "have full attention. `upcycle` keeps the model's own decoder."
        )
    if kinds is None and window is not None and window < config.max_position_embeddings:
        raise UpcyclingError(
            f"{name} attends to the last {window} tokens (`sliding_window`), and our decoder to all earlier ones. "
            "`upcycle` keeps the model's own decoder. To have attention without a window, which is the same for texts "
            "of up to so many tokens, set `language_model.config.sliding_window = None`."
        )
    return config


def _check_rest(model: PreTrainedModel, read: Iterable[nn.Module]) -> None:
    """Raises `UpcyclingError` if a model has weights outside these modules, the embedding and the head."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings(), *read)
    known = {parameter for module in modules for parameter in module.parameters()}
    rest = [name for name, parameter in model.named_parameters() if parameter not in known]
    if rest:
        more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""
        raise UpcyclingError(
            f"{type(model).__name__} has weights that our decoder has no place for: {', '.join(rest[:3])}{more}. "
            "`upcycle` keeps the model's own decoder."
        )


def _read_layer(config: PreTrainedConfig, trace: LayerTrace, prefix: str) -> _Layer:
    attention_name, attention = trace.attention
    what = f"`{prefix}{attention_name}` ({type(attention).__name__})"
    num_heads = config.num_attention_heads
    num_key_value_heads = getattr(config, "num_key_value_heads", None) or num_heads
    tensors, output = _queries_keys_values(trace.projections, num_heads, num_key_value_heads)
    query_size, key_size = len(tensors["q_proj.weight"]), len(tensors["k_proj.weight"])
    head_dim = query_size // num_heads
    if (query_size, key_size, len(tensors["v_proj.weight"]), output.in_features) != (
        num_heads * head_dim, num_key_value_heads * head_dim, num_key_value_heads * head_dim, query_size
    ):  # fmt: skip
        shapes = [tuple(projection.weight.shape) for projection in trace.projections]
        raise UpcyclingError(
            f"{what} has projections of the shapes {shapes}, which are not those of {num_heads} heads of queries and "
            f"{num_key_value_heads} of keys and values."
        )
    tensors["o_proj.weight"] = output.weight
    has_bias = any(name.endswith("bias") for name in tensors)
    for name in ("q_proj", "k_proj", "v_proj") if has_bias else ():
        tensors.setdefault(f"{name}.bias", output.weight.new_zeros(len(tensors[f"{name}.weight"])))
    if output.bias is not None:
        tensors["o_proj.bias"] = output.bias
    hidden_size = output.out_features
    norms = {
        "input_layernorm": read_norm(prefix + trace.input_norm[0], trace.input_norm[1], hidden_size),
        "post_attention_layernorm": read_norm(
            prefix + trace.feed_forward_norm[0], trace.feed_forward_norm[1], hidden_size
        ),
    }
    for ours, (name, module) in zip(("q_norm", "k_norm"), trace.attention_norms):
        norms[f"self_attn.{ours}"] = read_norm(prefix + name, module, head_dim)
    fields = {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "attention_bias": has_bias,
        "attention_out_bias": output.bias is not None,
        "use_qk_norm": bool(trace.attention_norms),
    }
    return _Layer(norms, {f"self_attn.{name}": tensor.detach() for name, tensor in tensors.items()}, fields)


def _queries_keys_values(
    projections: list[nn.Linear], num_heads: int, num_key_value_heads: int
) -> tuple[dict[str, torch.Tensor], nn.Linear]:
    """Returns the tensors of queries, keys and values (one projection in Phi-3), and the output projection."""
    *inputs, output = projections
    names = ("q_proj", "k_proj", "v_proj")
    tensors = {}
    if len(inputs) == 1:
        of_head = inputs[0].out_features // (num_heads + 2 * num_key_value_heads)
        sizes = [heads * of_head for heads in (num_heads, num_key_value_heads, num_key_value_heads)]
        for kind, tensor in inputs[0].named_parameters():
            for name, part in zip(names, tensor[: sum(sizes)].split(sizes), strict=True):
                tensors[f"{name}.{kind}"] = part
    else:
        for name, projection in zip(names, inputs, strict=True):
            tensors |= {f"{name}.{kind}": tensor for kind, tensor in projection.named_parameters()}
    return tensors, output


def _config_fields(config: PreTrainedConfig, vocab_size: int) -> dict[str, Any]:
    """Returns the fields that only the configuration tells."""
    name = type(config).__name__
    rope = copy.deepcopy(getattr(config, "rope_parameters", None) or {})
    if "rope_type" not in rope:
        raise UpcyclingError(
            f"{name} does not have one rotary embedding for all layers, as our decoder: `rope_parameters` is {rope}."
        )
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UpcyclingError(
            f"{name} rotates a part of each head (`partial_rotary_factor`), and our decoder whole heads."
        )
    fields = {
        "rope_parameters": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_dropout": getattr(config, "attention_dropout", 0.0),
        "initializer_range": config.initializer_range,
    }
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        # Some configurations have -1 for no token.
        ids = getattr(config, field, None)
        if isinstance(ids, list):
            fields[field] = [token for token in ids if 0 <= token < vocab_size] or None
        else:
            fields[field] = ids if ids is not None and 0 <= ids < vocab_size else None
    return fields


def _embedding_factor(config: PreTrainedConfig, embedding: nn.Module) -> float:
    """Returns the factor of the embedding, from the configuration (Granite) or the embedding module (Gemma)."""
    return float(getattr(config, "embedding_multiplier", 1.0)) * float(getattr(embedding, "embed_scale", 1.0))


def _attention_factor(attention: nn.Module, head_dim: int) -> float:
    scaling = getattr(attention, "scaling", None)
    factor = 1.0 if scaling is None else float(scaling) * math.sqrt(head_dim)
    return 1.0 if math.isclose(factor, 1.0) else factor


def _times(weight: torch.Tensor, factor: float) -> torch.Tensor:
    return weight if factor == 1.0 else weight.float() * factor
