"""A model of this package's architecture from a dense language model and a vision encoder."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields as dataclass_fields
from typing import Any

import torch
from transformers import AddedToken, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...configuration_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmTextConfig
from ...experts_config import SparseMoeVlmExpertsConfig
from ...modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmForConditionalGeneration
from ...native_towers import merge_size_of, num_deepstack_levels_of, patches_per_side
from ...vision_tower import check_vision_config
from .arrangement import experts_fields
from .decoder_layout import DecoderLayout, read_decoder
from .decoder_parity import check_decoder
from .decoders import decoder_layers
from .dense_weights import check_seed, check_weights_at_hand
from .errors import UpcyclingError
from .parts_weights import copy_decoder, copy_tower, empty_model, initialize_rest, start_experts
from .router_rows import collect_block_inputs

logger = logging.get_logger(__name__)


def _names(config_class: type) -> set[str]:
    return {field.name for field in dataclass_fields(config_class)}


# The sparse layers and the shape of the blocks follow from the language model as well.
_EXPERTS_FIELDS = _names(SparseMoeVlmExpertsConfig) - {
    "hidden_size",
    "num_hidden_layers",
    "hidden_act",
    "decoder_sparse_step",
    "mlp_only_layers",
}
_MODEL_FIELDS = _names(SparseMoeVlmConfig) - _names(SparseMoeVlmTextConfig) - {"text_config", "vision_config"}
# Fields of the decoder that can be chosen. The others follow from the language model.
_DECODER_FIELDS = {
    "max_position_embeddings",
    "use_cache",
    "attention_dropout",
    "alpha_init",
    "beta_init",
    "learned_modality_priors",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}
# Default side length of the squares of patches that the connector merges: the first that divides the patches per side.
_PIXEL_SHUFFLE_FACTORS = (2, 3, 1)


def upcycle_from_parts(
    language_model: PreTrainedModel,
    vision_encoder: PreTrainedModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_token: str = "<image>",
    expert_groups: str | list[dict[str, Any]] = "hybrid",
    num_experts: int | None = None,
    num_experts_per_tok: int = 2,
    start: str | None = None,
    granularity: int | None = None,
    drop_ratio: float | None = None,
    pool_start: str | None = None,
    layers: Collection[int] | None = None,
    router_init: str = "random",
    batch: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = None,
    seed: int = 0,
    **fields: Any,
) -> SparseMoeVlmForCausalLM | SparseMoeVlmForConditionalGeneration:
    """
    Builds a sparse vision-language model of this package from a dense language model and a vision encoder. For text, it
    computes what the language model computes. The connector between the two is new, so it must be trained before the
    model can use images.

    The language model may be of any class whose decoder has the layout of ours (Llama, Mistral, Qwen2, Qwen3, SmolLM2
    and SmolLM3, Granite, Gemma, OLMo, Phi-3, …). The layout is read from its configuration and its modules. The result
    is then compared with the language model layer by layer, and refused if they differ.

    The parts are not changed: their weights are copied, in the dtype and to the device of the language model. In
    addition to the parts, this needs memory for the result and, during the comparison, for its largest module in
    float64.

    Args:
        language_model (`PreTrainedModel`):
            A dense language model with its head, such as `AutoModelForCausalLM` loads.
        vision_encoder (`PreTrainedModel`, *optional*):
            A vision encoder that [`SparseMoeVlmConfig`] supports, such as SigLIP, CLIP, ViT, DINOv2 and DINOv3, or a
            model that contains one, such as `CLIPModel`. Without it, the result is a language model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The language model's tokenizer. If its vocabulary lacks the image token, the token is added **to this
            tokenizer**, and the model gets a row for it unless it has a spare one. Without a tokenizer, pass
            `image_token_id`.
        image_token (`str`, defaults to `"<image>"`):
            Placeholder token for images.
        expert_groups, num_experts, num_experts_per_tok, start, granularity, drop_ratio, pool_start:
            The experts and how they start: see [`~arrangement.experts_fields`]. The default is exact.
        layers (`Collection[int]`, *optional*):
            Indices of the layers that become sparse. By default, all.
        router_init (`str`, defaults to `"random"`):
            `"random"` for small random router rows, or `"data"` for rows that are computed from `batch`.
        batch (`Mapping` or iterable of `Mapping`, *optional*):
            Inputs of the language model, for `router_init="data"`.
        seed (`int`, defaults to 0):
            Seed of all random draws.
        fields:
            Further fields of the experts' configuration (`router`, `modalities`, …), of the decoder's configuration if
            they do not follow from the language model (`alpha_init`, `max_position_embeddings`, …), and of
            [`SparseMoeVlmConfig`] (`pixel_shuffle_factor`, `image_token_id`, …). By default, `pixel_shuffle_factor` is
            the first of 2, 3 and 1 that divides the patches per side, 2 with `image_sizing="native"`, and 1 if the
            vision encoder merges patches itself. `use_deepstack` is True if the vision encoder has DeepStack features.

    Returns:
        `SparseMoeVlmForConditionalGeneration`: The model, in evaluation mode. Without a vision encoder, a
        `SparseMoeVlmForCausalLM`, whose only modality is text by default. [`processor_from_parts`] builds the
        processor. `start["parity"]` of the decoder's configuration is the [`~receipt.ParityReceipt`].

    Raises:
        UpcyclingError: If our decoder cannot compute what the language model computes, if the vision encoder does not
            fit, or if fields are unknown or contradict each other.

    ```python
    >>> from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    >>> tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> language_model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> vision_encoder = AutoModel.from_pretrained("google/siglip-base-patch16-224")
    >>> model = upcycle_from_parts(language_model, vision_encoder, tokenizer=tokenizer)
    ```
    """
    if router_init not in ("random", "data"):
        raise UpcyclingError(f'`router_init` must be "random" or "data", got {router_init!r}.')
    if (router_init == "data") != (batch is not None):
        raise UpcyclingError('`batch` and `router_init="data"` belong together: give both, or neither.')
    check_seed(seed)
    _check_names(fields, vision_encoder is not None)
    for part in (language_model, vision_encoder):
        if part is not None:
            check_weights_at_hand(part)
    vision_config = None
    if vision_encoder is not None:
        vision_config = _vision_config(vision_encoder, fields.get("image_sizing", "fixed"))
    layout = read_decoder(language_model)
    widths = _widths(layout, layers)
    of_experts = {name: fields[name] for name in fields if name in _EXPERTS_FIELDS}
    modalities = of_experts.pop("modalities", ["text"] if vision_config is None else ["text", "image"])
    how, of_experts = experts_fields(
        widths=widths,
        num_hidden_layers=layout.blocks.num_layers,
        hidden_size=layout.blocks.hidden_size,
        hidden_act=layout.blocks.hidden_act,
        modalities=modalities,
        expert_groups=expert_groups,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        start=start,
        granularity=granularity,
        drop_ratio=drop_ratio,
        pool_start=pool_start,
        **of_experts,
    )
    of_decoder = layout.fields | {name: fields[name] for name in fields if name in _DECODER_FIELDS} | of_experts
    dense = [block.intermediate_size for block in layout.blocks.blocks if block.layer not in widths]
    of_decoder["intermediate_size"] = (dense or [layout.fields["intermediate_size"]])[0]
    of_model = {name: fields[name] for name in fields if name in _MODEL_FIELDS}
    if vision_config is not None and (tokenizer is not None or "image_token_id" not in of_model):
        of_model["image_token_id"] = _image_token_id(tokenizer, image_token, of_model)
    of_decoder["vocab_size"] = max(
        layout.fields["vocab_size"],
        of_model.get("image_token_id", 0) + 1,
        0 if tokenizer is None or vision_config is None else len(tokenizer),
    )
    config = _config(of_decoder, of_model, vision_config)
    inputs = {}
    if batch is not None:
        blocks = [block for block in layout.blocks.blocks if block.layer in widths]
        inputs = collect_block_inputs(language_model, batch, blocks, modalities=modalities, seed=seed)

    model = empty_model(config, language_model)
    copy_decoder(model, layout)
    start_experts(model, layout, how, seed, inputs)
    if vision_encoder is not None:
        copy_tower(model, vision_encoder)
    initialize_rest(model, seed)
    _set_generation(model, language_model)
    model.eval()
    place = decoder_layers(language_model)
    receipt = check_decoder(
        language_model,
        list(place.layers),
        model,
        is_centred=layout.is_centred,
        is_rounded=language_model.dtype != torch.float32 and (layout.is_changed or how.name == "split"),
        feed_forward={} if how.is_exact else {layer: layout.dense_block(layer) for layer in widths},
        seed=seed,
    )
    model.config.get_text_config().start = {
        **{name: value for name, value in how._asdict().items() if value},
        "seed": seed,
        "router_init": router_init,
        "base_model": language_model.name_or_path,
        **({} if vision_encoder is None else {"vision_encoder": vision_encoder.name_or_path}),
        "parity": receipt.to_dict(),
    }
    logger.info(str(receipt))
    return model


def _check_names(fields: Mapping[str, Any], has_images: bool) -> None:
    known = _EXPERTS_FIELDS | _DECODER_FIELDS | (_MODEL_FIELDS if has_images else set())
    for name in fields:
        if name in known:
            continue
        if name in _names(SparseMoeVlmTextConfig):
            raise UpcyclingError(f"`{name}` is taken from the language model: leave it out.")
        if name in _MODEL_FIELDS:
            raise UpcyclingError(f"`{name}` is for images: pass a vision encoder as well, or leave it out.")
        close = difflib.get_close_matches(name, known, n=1)
        raise UpcyclingError(
            f"`{name}` is not a field of the configuration" + (f": did you mean `{close[0]}`?" if close else ".")
        )


def _widths(layout: DecoderLayout, layers: Collection[int] | None) -> dict[int, int]:
    """Returns the widths of the dense blocks of the layers that become sparse, by layer."""
    widths = {block.layer: block.intermediate_size for block in layout.blocks.blocks}
    if layers is None:
        return widths
    wrong = sorted(set(layers) - set(widths))
    if wrong or not layers:
        raise UpcyclingError(f"`layers` must be some of the layers 0 to {len(widths) - 1}, got {sorted(layers)}.")
    dense = {width for layer, width in widths.items() if layer not in layers}
    if len(dense) > 1:
        raise UpcyclingError(
            f"layers that stay dense have the widths {sorted(dense)}, but our decoder has one: choose more `layers`."
        )
    return {layer: widths[layer] for layer in sorted(layers)}


def _image_token_id(tokenizer: PreTrainedTokenizerBase | None, image_token: str, given: Mapping[str, Any]) -> int:
    if tokenizer is None:
        raise UpcyclingError("images need a placeholder token: give `tokenizer`, or `image_token_id`.")
    if "image_token_id" in given:
        raise UpcyclingError(
            "`tokenizer` and `image_token_id` both say which token is the placeholder for images: give one."
        )
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(image_token, normalized=False, special=True)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(image_token)


def _vision_config(vision_encoder: PreTrainedModel, image_sizing: str) -> PreTrainedConfig:
    """Returns the configuration of the outermost part of a model that can be our vision tower."""
    reasons = []
    for module in vision_encoder.modules():
        if isinstance(module, PreTrainedModel):
            try:
                check_vision_config(module.config, image_sizing)
            except ValueError as error:
                reasons.append(str(error))
            else:
                return module.config
    # The most helpful reason is the one that says what to do.
    reason = next((each for each in reasons if "image_sizing" in each), (reasons or ["not a model"])[0])
    raise UpcyclingError(f"{type(vision_encoder).__name__} cannot be the vision encoder: {reason}")


def _config(
    of_decoder: dict[str, Any], of_model: dict[str, Any], vision_config: PreTrainedConfig | None
) -> SparseMoeVlmTextConfig | SparseMoeVlmConfig:
    try:
        text_config = SparseMoeVlmTextConfig(**of_decoder)
        if vision_config is None:
            return text_config
        if "pixel_shuffle_factor" not in of_model:
            of_model["pixel_shuffle_factor"] = _pixel_shuffle_factor(
                vision_config, is_native=of_model.get("image_sizing") == "native"
            )
        if num_deepstack_levels_of(vision_config) > 0:
            of_model.setdefault("use_deepstack", True)
        return SparseMoeVlmConfig(text_config=text_config, vision_config=copy.deepcopy(vision_config), **of_model)
    except UpcyclingError:
        raise
    except ValueError as error:
        raise UpcyclingError(str(error)) from error


def _pixel_shuffle_factor(vision_config: PreTrainedConfig, is_native: bool) -> int:
    """Returns the side of the squares of patches that the connector merges by default."""
    if merge_size_of(vision_config) > 1:
        return 1  # the vision encoder merges them itself
    side = patches_per_side(vision_config)
    return next(each for each in _PIXEL_SHUFFLE_FACTORS if side % each == 0 or (is_native and side > each))


def _set_generation(
    model: SparseMoeVlmForCausalLM | SparseMoeVlmForConditionalGeneration, language_model: PreTrainedModel
) -> None:
    """Copies the generation settings of the language model, and suppresses the image token."""
    settings = copy.deepcopy(language_model.generation_config)
    if settings is None:
        return
    if isinstance(model, SparseMoeVlmForConditionalGeneration):
        settings.suppress_tokens = [*(settings.suppress_tokens or []), model.config.image_token_id]
    model.generation_config = settings
