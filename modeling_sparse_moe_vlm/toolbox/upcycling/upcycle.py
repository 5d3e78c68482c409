"""`upcycle`: a sparse mixture of experts from a dense model of Transformers, with the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from ...configuration_upcycled import UpcycledExpertsConfig, upcycled_config_class
from ...expert_groups import BUILTIN_MODALITIES
from ...modeling_upcycled import put_experts_in
from .arrangement import Start, check_not_of_dense_model, experts_fields
from .blocks import DenseBlocks, block_weights, find_blocks, placeholder_ids, takes_images_by_cross_attention
from .dense_weights import check_seed, check_weights_at_hand
from .errors import UpcyclingError
from .receipt import ParityReceipt, check_receipt, default_bound, dense_outputs, made_batch, parity
from .router_rows import BlockInputs, collect_block_inputs
from .starts import start_block, start_pool

logger = logging.get_logger(__name__)

ROUTER_INITS = ("random", "data")
_OTHER_HEADS = (
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
)


def upcycle(
    model: PreTrainedModel,
    expert_groups: str | Sequence[Mapping[str, Any]] = "hybrid",
    num_experts: int | None = None,
    num_experts_per_tok: int = 2,
    *,
    start: str | None = None,
    layers: Collection[int] | None = None,
    router_init: str = "random",
    batch: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = None,
    seed: int = 0,
    modalities: Sequence[str] | None = None,
    placeholders: Mapping[str, Sequence[int]] | None = None,
    include_dense_layers_of_moe: bool = False,
    parity_bound: float | None = None,
    **fields: Any,
) -> Any:
    r"""
    Turns a dense model into a sparse mixture of experts that starts with the same outputs: its feed-forward blocks
    become experts. Everything else is the base model's own, so its processor and chat template are used as before.

    Args:
        model (`PreTrainedModel`):
            A loaded vision-language model or language model of Transformers whose decoder has gated feed-forward
            blocks. It is not changed, and the sparse model shares no weights with it.
        expert_groups (`str` or `list[dict]`, defaults to `"hybrid"`):
            `"hybrid"`, `"joint"`, `"isolated"`, or a list of groups: see [`SparseMoeVlmExpertsConfig`].
        num_experts (`int`, *optional*, defaults to 8):
            Number of routed experts of a layer. With a list of groups, it follows from the groups.
        num_experts_per_tok (`int`, defaults to 2):
            Number of routed experts per token.
        start (`str`, *optional*):
            `"copy"`, `"split"`, `"residual"` or `"drop"`: see [`~arrangement.Start`]. By default, an exact start:
            `"residual"` for hybrid experts, and `"copy"` for joint and isolated experts (`"split"` with a
            `granularity`).
        layers (`Collection[int]`, *optional*):
            Indices of the decoder layers that become sparse. By default, all that have a gated feed-forward block.
        router_init (`str`, defaults to `"random"`):
            `"random"` for small random router rows, or `"data"` for the centroids of the dense blocks' inputs on
            `batch`, per modality (spherical k-means, arXiv 2604.13508).
        batch (`dict` or iterable of `dict`, *optional*):
            Inputs in the form that the base's processor returns. The parity receipt is measured on the first of them,
            and `router_init="data"` uses all of them. By default, the receipt is measured on random tokens, which are
            assigned to all modalities in turn.
        seed (`int`, defaults to 0):
            Seed of all random draws. PyTorch's random state does not change.
        modalities (`list[str]`, *optional*):
            Names of the token modalities. By default, text for a language model, and text and image for other models.
            Video then counts as image; `["text", "image", "video"]` makes it a separate modality.
        placeholders (`dict[str, list[int]]`, *optional*):
            Ids of the placeholder tokens of each modality. By default, those in the base's configuration.
        include_dense_layers_of_moe (`bool`, defaults to `False`):
            Whether to upcycle the dense layers of a model that is a mixture of experts already.
        parity_bound (`float`, *optional*):
            Largest relative difference of the outputs that is accepted. By default, 1e-5 in float32, four times the
            machine epsilon of the type in half precision, and no bound for starts that are not exact. `float("inf")`
            accepts everything.
        fields:
            `granularity`, `drop_ratio` (with `"drop"`), `pool_start` (with pools), and further fields of
            [`SparseMoeVlmExpertsConfig`], such as `router` and `router_aux_loss_coef`.

    Returns:
        `PreTrainedModel`: The sparse model, of a subclass of the base's class, such as
        `UpcycledLlavaForConditionalGeneration`. `config.experts_config` describes its experts, and
        `config.experts_config.start["parity"]` is the parity receipt.

    Raises:
        UpcyclingError: If the model cannot be upcycled, if arguments contradict each other, or if the outputs of the
            sparse model differ from those of the dense model. The message says why.

    Example:

    ```python
    >>> from transformers import AutoModelForImageTextToText
    >>> from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle

    >>> dense = AutoModelForImageTextToText.from_pretrained("HuggingFaceTB/SmolVLM-256M-Instruct")
    >>> sparse = upcycle(dense, "isolated", num_experts=4)
    >>> sparse.save_pretrained("smolvlm-moe")
    ```
    """
    check_base(model)
    check_arguments(router_init, seed, layers=layers, modalities=modalities, parity_bound=parity_bound)
    batches = _as_list(batch)
    if router_init == "data" and not batches:
        raise UpcyclingError('`router_init="data"` needs a `batch`: inputs as the base\'s processor makes them.')
    check_weights_at_hand(model)
    found = find_blocks(model, layers, include_dense_layers_of_moe)
    chosen, config = experts_config(
        model,
        found,
        seed=seed,
        router_init=router_init,
        modalities=modalities,
        placeholders=placeholders,
        start=start,
        expert_groups=expert_groups,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        **fields,
    )
    inputs: dict[int, BlockInputs] = {}
    if router_init == "data":
        inputs = collect_block_inputs(
            model,
            batches,
            found.blocks,
            modalities=config.modalities,
            placeholder_ids=config.placeholder_ids,
            seed=seed,
        )
    sparse = with_sparse_blocks(model, found, config)
    _fill(sparse, model, found, config, chosen, inputs, seed)

    bound = (default_bound(model.dtype) if chosen.is_exact else None) if parity_bound is None else parity_bound
    receipt = _receipt(model, sparse, batches, bound, seed)
    check_receipt(receipt)
    config.start["parity"] = receipt.to_dict()
    logger.info(str(receipt))
    return sparse


def check_base(model: Any) -> None:
    """Raises `UpcyclingError` unless a model is of a class that Transformers exports, so that others can load it."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "experts_config", None) is not None:
        raise UpcyclingError(f"{name} is upcycled already.")
    if not isinstance(model, PreTrainedModel):
        raise UpcyclingError(f"`upcycle` takes a model of Transformers, got {name}.{_advice_on_wrapper(model)}")
    if any(name in table.values() for table in _OTHER_HEADS):
        raise UpcyclingError(
            f"{name} has a head that upcycling does not support. Upcycle the language model that it is based on "
            "(`AutoModelForCausalLM`, `AutoModelForImageTextToText` or `AutoModel`). For sequence classification, save "
            "the result and load it with `AutoModelForSequenceClassification`."
        )
    for kind in (type(model), type(model.config)):
        if getattr(transformers, kind.__name__, None) is not kind:
            raise UpcyclingError(
                f"{kind.__name__} is not a class that Transformers exports, so an upcycled model of it could not be "
                "loaded elsewhere. Models with custom code are not supported."
            )


def _advice_on_wrapper(model: Any) -> str:
    """Returns advice for an object that wraps a model of Transformers."""
    if hasattr(model, "merge_and_unload"):
        return " Merge its adapters first: `model.merge_and_unload()`."
    if hasattr(model, "_orig_mod"):
        return " Pass the model that was compiled (`model._orig_mod`), and compile the result."
    if isinstance(getattr(model, "module", None), PreTrainedModel):
        return " Pass the model that it wraps (`model.module`)."
    return ""


def experts_config(
    model: PreTrainedModel,
    found: DenseBlocks,
    *,
    seed: int,
    router_init: str,
    modalities: Sequence[str] | None,
    placeholders: Mapping[str, Sequence[int]] | None,
    **request: Any,
) -> tuple[Start, UpcycledExpertsConfig]:
    """Returns how experts start, and their configuration, for a dense model and a request: see [`upcycle`]."""
    check_not_of_dense_model(request)
    if placeholders is None:
        placeholders = placeholder_ids(model.config)
    _check_placeholders(placeholders)
    takes_images = bool(placeholders) or takes_images_by_cross_attention(model) or "image" in _input_modalities(model)
    if modalities is None:
        modalities = ["text", "image"] if takes_images else ["text"]
    if takes_images_by_cross_attention(model) and len(modalities) > 1:
        if request.get("expert_groups") == "isolated":
            raise UpcyclingError(
                f'`expert_groups="isolated"` is not supported for {type(model).__name__}: its images enter by '
                "cross-attention or an encoder, so all tokens of the decoder are text, and experts for images would "
                'not get any. Use `expert_groups="joint"`.'
            )
        modalities = ["text"]
    text_config = model.config.get_text_config(decoder=True)
    chosen, fields = experts_fields(
        widths={block.layer: block.intermediate_size for block in found.blocks},
        num_hidden_layers=found.num_layers,
        hidden_size=found.hidden_size,
        hidden_act=found.hidden_act,
        modalities=list(modalities),
        initializer_range=request.pop("initializer_range", getattr(text_config, "initializer_range", 0.02)),
        **request,
    )
    prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix or " ") else ""
    config = UpcycledExpertsConfig(
        **fields,
        blocks=[block.name.removeprefix(prefix) for block in found.blocks],
        placeholder_ids={name: list(ids) for name, ids in placeholders.items()},
        start={
            **{name: value for name, value in chosen._asdict().items() if value},
            "seed": seed,
            "router_init": router_init,
            "base_model": model.name_or_path,
        },
    )
    return chosen, config


def _check_placeholders(placeholders: Any) -> None:
    """Raises `UpcyclingError` unless `placeholders` has a list of token ids for each of its modalities."""
    is_dict = isinstance(placeholders, Mapping)
    for name, ids in placeholders.items() if is_dict else ():
        are_ids = isinstance(ids, list | tuple) and all(isinstance(token, int) and token >= 0 for token in ids)
        if name not in BUILTIN_MODALITIES[1:] or not are_ids:
            is_dict = False
    if not is_dict:
        raise UpcyclingError(
            f"`placeholders` must be a dict of lists of token ids, with keys among {BUILTIN_MODALITIES[1:]}, such as "
            f'{{"image": [32000]}}, got {placeholders!r}.'
        )


def _input_modalities(model: PreTrainedModel) -> Sequence[str]:
    found = getattr(model, "input_modalities", "text")
    return (found,) if isinstance(found, str) else found


def check_arguments(
    router_init: Any, seed: Any, *, layers: Any = None, modalities: Any = None, parity_bound: Any = None
) -> None:
    """Raises `UpcyclingError` for arguments of [`upcycle`] that have a wrong type or value."""
    if router_init not in ROUTER_INITS:
        raise UpcyclingError(f"`router_init` must be one of {ROUTER_INITS}, got {router_init!r}.")
    check_seed(seed)
    for name, value in (("layers", layers), ("modalities", modalities)):
        if value is not None and (isinstance(value, str) or not isinstance(value, Collection)):
            raise UpcyclingError(f"`{name}` must be a list, got {value!r}.")
    is_number = isinstance(parity_bound, int | float) and not isinstance(parity_bound, bool)
    if parity_bound is not None and not (is_number and parity_bound >= 0):
        raise UpcyclingError(f"`parity_bound` must be a number of at least 0, got {parity_bound!r}.")


def _as_list(batch: Any) -> list[Mapping[str, Any]]:
    if batch is None:
        return []
    batches = [batch] if isinstance(batch, Mapping) or not isinstance(batch, Iterable) else list(batch)
    for inputs in batches:
        if not isinstance(inputs, Mapping):
            raise UpcyclingError(
                "`batch` must be inputs as the base's processor returns them (a dict of tensors), or a list of them, "
                f"got {type(batch).__name__}."
            )
    return batches


def with_sparse_blocks(model: PreTrainedModel, found: DenseBlocks, config: UpcycledExpertsConfig) -> Any:
    """Copies a model, with empty sparse blocks in place of its dense blocks, which are not copied."""
    blocks = [model.get_submodule(block.name) for block in found.blocks]
    quantizer = getattr(model, "hf_quantizer", None)
    shared: dict[int, Any] = {id(module): module for module in (*blocks, quantizer)}
    sparse: Any = copy.deepcopy(model, shared)
    if quantizer is not None:  # the weights were dequantised when they were loaded, and are saved like any others
        quantizer.remove_quantization_config(sparse)
    make_sparse(sparse, config)
    return sparse


def make_sparse(model: Any, config: UpcycledExpertsConfig) -> None:
    """Replaces a model's dense blocks with empty sparse blocks on the same devices, and changes its class."""
    own_config = model.config
    own_config.__class__ = upcycled_config_class(type(own_config))
    own_config.__dict__.pop("_experts_implementation_internal", None)
    own_config.experts_config = config
    own_config.link_experts()
    with no_init_weights():
        put_experts_in(model)
    own_config.architectures = [type(model).__name__]


def _fill(
    sparse: Any,
    model: PreTrainedModel,
    found: DenseBlocks,
    config: UpcycledExpertsConfig,
    start: Start,
    inputs: Mapping[int, BlockInputs],
    seed: int,
) -> None:
    weights = {block.layer: (model.get_submodule(block.name), block) for block in found.blocks}
    for layer, (dense, block) in weights.items():
        start_block(
            sparse.get_submodule(block.name),
            config,
            block_weights(dense, block),
            start,
            seed=seed,
            inputs=inputs.get(layer),
        )
    for pool, layers in config.pools.items():
        of_layers = (block_weights(*weights[layer]) for layer in layers)
        start_pool(_pools(sparse)[str(pool)], config, pool, of_layers, start, seed=seed)


def _pools(sparse: Any) -> nn.ModuleDict:
    return next(module.expert_pools for module in sparse.modules() if getattr(module, "holds_pools", False))


def _receipt(
    model: PreTrainedModel, sparse: Any, batches: Sequence[Mapping[str, Any]], bound: float | None, seed: int
) -> ParityReceipt:
    placeholders = {token for ids in sparse.experts_config.placeholder_ids.values() for token in ids}
    batch = batches[0] if batches else made_batch(model, placeholders, seed)
    try:
        dense = dense_outputs(model, batch)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        if batches:
            raise
        raise UpcyclingError(
            f"{type(model).__name__} does not run on text only ({error}), so its outputs cannot be compared: pass a "
            "`batch` as its processor makes it."
        ) from error
    return parity(dense, sparse, batch, is_given=bool(batches), bound=bound)
