"""Configuration of the sparse mixture-of-experts vision-language model."""

from __future__ import annotations

from .versions import SUPPORTED_TRANSFORMERS  # noqa: F401

# isort: split

from dataclasses import fields
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import AutoConfig

from .checks import check, check_integer, check_spelling
from .config_validation import TEXT_MODEL_TYPE, check_fields, check_rope, check_text_fields, resolve_expert_groups
from .expert_groups import BUILTIN_MODALITIES, ExpertGroup
from .parameters import count_parameters
from .vision_tower import patches_per_side

# Completes the type of fields that may be left out, or given in another form: `__post_init__` replaces what was given.
Given = Any

# Outputs that `Trainer` does not gather when it predicts: what is left are the logits.
_NOT_PREDICTIONS = [
    "past_key_values",
    "cache",
    "router_logits",
    "aux_loss",
    "z_loss",
    "aux_loss_by_modality",
    "image_hidden_states",
    "modality_weights",
    "count_free_modality_weights",
]

_NUM_SHARDS = "_num_expert_shards"

# One name per auto class: what `save_pretrained` writes into `auto_map`, so that remote code loads everywhere.
_CONFIG_FILE = "configuration_sparse_moe_vlm"
_MODEL_FILE = "modeling_sparse_moe_vlm"
AUTO_MAP = {
    "AutoConfig": f"{_CONFIG_FILE}.SparseMoeVlmConfig",
    "AutoModel": f"{_MODEL_FILE}.SparseMoeVlmModel",
    "AutoModelForImageTextToText": f"{_MODEL_FILE}.SparseMoeVlmForConditionalGeneration",
    "AutoModelForMultimodalLM": f"{_MODEL_FILE}.SparseMoeVlmForConditionalGeneration",
    "AutoModelForCausalLM": f"{_MODEL_FILE}.SparseMoeVlmForConditionalGeneration",
}
TEXT_AUTO_MAP = {
    "AutoConfig": f"{_CONFIG_FILE}.SparseMoeVlmTextConfig",
    "AutoModel": f"{_MODEL_FILE}.SparseMoeVlmTextModel",
    "AutoModelForCausalLM": f"{_MODEL_FILE}.SparseMoeVlmForCausalLM",
}


class SparseMoeVlmTextConfig(PreTrainedConfig):
    r"""
    Configuration of [`SparseMoeVlmTextModel`], a decoder in the Llama/Qwen3 convention whose feed-forward blocks are
    sparse mixtures of modality experts.

    Args:
        vocab_size (`int`, defaults to 32000):
            Size of the vocabulary.
        hidden_size (`int`, defaults to 2048):
            Width of the residual stream.
        intermediate_size (`int`, defaults to 5632):
            Width of the feed-forward block of the dense layers.
        num_hidden_layers (`int`, defaults to 24):
            Number of decoder layers.
        num_attention_heads (`int`, defaults to 16):
            Number of query heads.
        num_key_value_heads (`int`, *optional*):
            Number of key and value heads (grouped-query attention); `num_attention_heads` when `None`.
        head_dim (`int`, *optional*):
            Size of one head; `hidden_size // num_attention_heads` when `None`.
        hidden_act (`str`, defaults to `"silu"`):
            Activation of the gated feed-forward blocks (SwiGLU with `"silu"`).
        max_position_embeddings (`int`, defaults to 32768):
            Longest sequence that the model is meant for.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights.
        rms_norm_eps (`float`, defaults to 1e-6):
            Epsilon of the RMS normalisations.
        use_cache (`bool`, defaults to `True`):
            Whether to return the key/value cache.
        tie_word_embeddings (`bool`, defaults to `False`):
            Whether the language head shares the token embedding.
        rope_parameters (`dict`, *optional*):
            Rotary position embedding, in Transformers' form (`rope_type`, `rope_theta`, …).
        attention_bias (`bool`, defaults to `False`):
            Whether the attention projections have biases.
        attention_dropout (`float`, defaults to 0.0):
            Dropout on the attention weights.
        use_qk_norm (`bool`, defaults to `True`):
            Whether queries and keys are RMS-normalised per head, as in Qwen3.
        alpha_init (`float`, defaults to 0.5):
            Prior of the image part in distributed attention, and of every other modality but text (α₀): how much more
            than its attention logits say a part weighs.
        beta_init (`float`, defaults to 0.5):
            Prior of the text part (β₀). Equal priors are plain attention; only their ratio counts.
        learned_modality_priors (`bool`, defaults to `False`):
            Whether every head learns its own priors, from `alpha_init` and `beta_init` on, or they stay what they are
            (fixed, as in Vidi, arXiv 2504.15681).
        decoder_sparse_step (`int`, defaults to 1):
            Every how many layers one is sparse: layer `i` is if `(i + 1) % decoder_sparse_step == 0`.
        mlp_only_layers (`list[int]`, *optional*):
            Layers that stay dense whatever `decoder_sparse_step` says.
        modalities (`list[str]`, *optional*, defaults to `["text", "image"]`):
            Names of the token modalities; the position is the id in `mm_token_type_ids`. Those that Transformers
            knows have its numbers (0 text, 1 image, 2 video, 3 audio); others take any place behind the pictures'.
        num_experts (`int`, *optional*, defaults to 8):
            Number of routed experts of a sparse layer. With explicit `expert_groups` it is derived from them.
        num_experts_per_tok (`int`, defaults to 2):
            Number of routed experts that a token goes to (with `router="top_p"`, at most that many).
        num_experts_per_tok_by_modality (`dict[str, int]`, *optional*):
            Other numbers for some modalities, e.g. `{"image": 1}`.
        moe_intermediate_size (`int`, defaults to 1408):
            Width of one expert, where its group gives none.
        expert_groups (`str` or `list[dict]`, defaults to `"hybrid"`):
            The arrangement of experts, by name or as a list of groups (see [`ExpertGroup`] for the keys; `modalities`
            defaults to all, `intermediate_size` to `moe_intermediate_size`). By name:

            - `"hybrid"`: a joint pool of `num_experts` routed experts plus one always-on expert per modality; the best
              arm of MoIIE (arXiv 2508.09779, 13 benchmarks: hybrid 60.0, isolated 59.1, joint 59.1, dense 58.8).
            - `"joint"`: one pool of `num_experts` routed experts for every modality.
            - `"isolated"`: `num_experts` routed experts split evenly into one group per modality.
        expert_pool (`list[int]`, *optional*):
            Cross-layer expert pools: for every layer the number of the pool whose routed experts it uses, `None` (as
            in dense layers) for its own. Layers of one pool share the routed experts, each with a router of its own
            (UniPool, arXiv 2605.06665); always-on experts stay with their layers.
        router (`str`, defaults to `"softmax"`):
            How router logits become expert weights: `"softmax"`, `"sigmoid"` (DeepSeek-V3, arXiv 2412.19437) or
            `"top_p"` (the fewest experts whose probability reaches `router_top_p`; arXiv 2403.07652).
        router_top_p (`float`, defaults to 0.6):
            Probability that the chosen experts must reach together, for `router="top_p"`.
        norm_topk_prob (`bool`, defaults to `True`):
            Whether the weights of the chosen experts are scaled to sum to 1.
        output_router_logits (`bool`, defaults to `False`):
            Whether to return the router logits and, with labels, to add the router losses to the loss.
        router_aux_loss_coef (`float`, defaults to 0.001):
            Coefficient of the load-balancing loss (per modality, averaged over layers and modalities).
        router_z_loss_coef (`float`, defaults to 0.0):
            Coefficient of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5). It keeps logits small; it does not
            balance.
        router_local_entropy_coef (`float` or `dict[str, float]`, defaults to 0.0):
            Coefficient of LIMoE's local entropy loss (arXiv 2206.02770), which makes the router decide; for
            all modalities, or by modality (0 for those that are left out).
        router_global_entropy_coef (`float` or `dict[str, float]`, defaults to 0.0):
            Coefficient of LIMoE's global entropy loss, which makes the tokens of a modality differ; likewise.
        router_global_entropy_threshold (`float` or `dict[str, float]`, *optional*):
            τ of the global entropy loss, in nats: log(S) asks a modality to use at least about S experts. By default
            all the experts that serve it.
        router_bias_update_rate (`float`, *optional*):
            Loss-free balancing (DeepSeek-V3, arXiv 2412.19437, eq. 16; arXiv 2408.15664): routers have a bias per
            modality and expert for the choice of experts alone, which moves by that much after every training step
            (the paper's rate is 1e-3). With 0 the bias is there and stays as it is; with `None` there is none.
        expert_capacity_factor (`float`, *optional*):
            Capacity of an expert, in multiples of its share in balanced routing; the least certain tokens beyond it
            are dropped (V-MoE's batch-priority routing, arXiv 2106.05974). With it the routing of a token
            depends on its batch. No limit when `None`.

    Raises:
        ValueError: If fields contradict each other; the message names the field and the fix.

    ```python
    >>> from modeling_sparse_moe_vlm import SparseMoeVlmTextConfig

    >>> config = SparseMoeVlmTextConfig(num_experts=16, num_experts_per_tok=4)
    >>> [group["name"] for group in config.expert_groups]
    ['joint', 'text', 'image']
    ```
    """

    model_type = TEXT_MODEL_TYPE
    base_config_key = "text_config"
    keys_to_ignore_at_inference = _NOT_PREDICTIONS

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.self_attn.modality_log_priors": "colwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "expert_pools.*.gate_up_proj": "packed_colwise",
        "expert_pools.*.down_proj": "rowwise",
        "expert_pools.*": "moe_tp_experts",
        "layers.*.mlp.shared_experts.*.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.*.up_proj": "colwise",
        "layers.*.mlp.shared_experts.*.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
        "expert_pools.*.gate_up_proj": "grouped_gemm",
        "expert_pools.*.down_proj": "grouped_gemm",
        "expert_pools.*": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | Given = None
    head_dim: int | Given = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | Given = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    use_qk_norm: bool = True
    alpha_init: float = 0.5
    beta_init: float = 0.5
    learned_modality_priors: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | Given = None
    modalities: list[str] | Given = None
    num_experts: int | Given = None
    num_experts_per_tok: int = 2
    num_experts_per_tok_by_modality: dict[str, int] | None = None
    moe_intermediate_size: int = 1408
    expert_groups: list[dict[str, Any]] | Given = "hybrid"
    expert_pool: list[int | None] | None = None
    router: str = "softmax"
    router_top_p: float = 0.6
    norm_topk_prob: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0
    router_local_entropy_coef: float | dict[str, float] = 0.0
    router_global_entropy_coef: float | dict[str, float] = 0.0
    router_global_entropy_threshold: float | dict[str, float] | None = None
    router_bias_update_rate: float | None = None
    expert_capacity_factor: float | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        check_spelling(kwargs, {field.name for field in fields(type(self))})
        kwargs.setdefault("auto_map", dict(TEXT_AUTO_MAP))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.mlp_only_layers is None:
            self.mlp_only_layers = []
        if self.modalities is None:
            self.modalities = BUILTIN_MODALITIES[:2]
        check_text_fields(self)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.mlp_only_layers = list(self.mlp_only_layers)
        self.modalities = list(self.modalities)
        resolve_expert_groups(self)
        # A copy, since the library completes it in place.
        self.rope_parameters = dict(self.rope_parameters or {})
        super().__post_init__(**kwargs)
        check_rope(self)

    # ---------------------------------------------------------------- arrangement of experts

    def is_sparse_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` has experts (else a dense feed-forward block)."""
        return layer_idx not in self.mlp_only_layers and (layer_idx + 1) % self.decoder_sparse_step == 0

    def layer_expert_groups(self, layer_idx: int, always_on: bool | None = None) -> tuple[ExpertGroup, ...]:
        """
        The expert groups of one layer, in the order of the router's logits.

        Args:
            layer_idx (`int`):
                Index of the layer.
            always_on (`bool`, *optional*):
                Only the always-on groups (`True`) or only the routed ones (`False`).

        Returns:
            `tuple[ExpertGroup, ...]`: empty for a dense layer.
        """
        if not self.is_sparse_layer(layer_idx):
            return ()
        groups = (ExpertGroup.from_dict(group) for group in self.expert_groups)
        return tuple(
            group
            for group in groups
            if (group.layers is None or layer_idx in group.layers) and always_on in (None, group.always_on)
        )

    @property
    def pools(self) -> dict[int, list[int]]:
        """The layers of every expert pool, by the pool's number."""
        pools: dict[int, list[int]] = {}
        for layer, pool in enumerate(self.expert_pool or []):
            if pool is not None:
                pools.setdefault(pool, []).append(layer)
        return pools

    def layer_pool(self, layer_idx: int) -> int | None:
        """The pool whose routed experts layer `layer_idx` uses; `None` for its own."""
        return None if self.expert_pool is None else self.expert_pool[layer_idx]

    @property
    def layers_by_experts(self) -> list[list[int]]:
        """The sparse layers in order, those that share their routed experts together."""
        own = [[i] for i in range(self.num_hidden_layers) if self.is_sparse_layer(i) and self.layer_pool(i) is None]
        return sorted([*own, *self.pools.values()])

    @property
    def routed_group_names(self) -> list[str]:
        """Names of the routed groups of the whole model; with a single one, `mlp.experts` is that group itself."""
        return [group["name"] for group in self.expert_groups if not group["always_on"]]

    def experts_per_token(self, modality: str) -> int:
        """Number of routed experts per token of `modality`."""
        return (self.num_experts_per_tok_by_modality or {}).get(modality, self.num_experts_per_tok)

    @property
    def num_expert_shards(self) -> int:
        """
        Number of modules that the experts of a group are cut into, for device maps; a group has no more than it has
        experts. A choice of loading (`from_pretrained(…, num_expert_shards=4)`), which is not saved.
        """
        return self.__dict__.get(_NUM_SHARDS, 1)

    @num_expert_shards.setter
    def num_expert_shards(self, value: int) -> None:
        check_integer("num_expert_shards", value)
        self.__dict__[_NUM_SHARDS] = value

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(d)
        d.pop(_NUM_SHARDS, None)

    # ---------------------------------------------------------------- size

    def num_parameters(self) -> int:
        """Total number of parameters of the decoder with its language head, counted without allocating weights."""
        return count_parameters(self, "text")[0]

    def num_active_parameters(self, modality: str = "text") -> int:
        """
        Number of parameters that one token of `modality` uses: everything but the experts that do not serve it or are
        not picked for it. With `router="top_p"` it is an upper bound.

        Args:
            modality (`str`, defaults to `"text"`):
                One of `config.modalities`.

        Raises:
            ValueError: If the modality is unknown.
        """
        return count_parameters(self, modality)[1]

    # ---------------------------------------------------------------- validation

    def validate_architecture(self) -> None:
        """Checks the fields again, which may have been changed, when a model is made of them."""
        super().validate_architecture()
        check_text_fields(self)
        resolve_expert_groups(self)


class SparseMoeVlmConfig(PreTrainedConfig):
    r"""
    Configuration of [`SparseMoeVlmForConditionalGeneration`]: a vision tower, a connector and a decoder with experts.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the vision tower: any Transformers vision model that maps `pixel_values` to patch
            features (SigLIP, CLIP, DINOv2, DINOv3, ViT, …). Defaults to SigLIP.
        text_config (`SparseMoeVlmTextConfig` or `dict`, *optional*):
            Configuration of the decoder.
        image_token_id (`int`, defaults to 1):
            Id of the placeholder token that image features replace.
        modality_encoders (`dict[str, dict]`, *optional*):
            By name of a further modality (one of `text_config.modalities`), its encoder: the `model_type` and fields of
            any configuration that `AutoModel` makes an encoder of, registered ones included, and the `token_id` of its
            placeholder token.
        pixel_shuffle_factor (`int`, defaults to 2):
            Patches are merged in squares of that side before the connector's MLP (space-to-depth), so an image has
            `(image_size / patch_size / pixel_shuffle_factor) ** 2` tokens.
        projector_hidden_act (`str`, defaults to `"gelu"`):
            Activation of the connector's MLP.
        multimodal_projector_bias (`bool`, defaults to `True`):
            Whether the connector's MLP has biases.
        tie_word_embeddings (`bool`, defaults to `False`):
            Whether the language head shares the token embedding.
        use_cache (`bool`, defaults to `True`):
            Whether to return the key/value cache.

    Raises:
        ValueError: If fields contradict each other; the message names the field and the fix.

    ```python
    >>> from modeling_sparse_moe_vlm import SparseMoeVlmConfig

    >>> config = SparseMoeVlmConfig(text_config={"num_experts": 16})
    >>> config.image_seq_length
    49
    ```
    """

    model_type = "sparse_moe_vlm"
    keys_to_ignore_at_inference = _NOT_PREDICTIONS
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="siglip_vision_model",
            # The pooling head is no part of the patch features: without it no parameter is unused.
            init_kwargs={"vision_use_head": False},
        ),
        "text_config": SubConfigSpec(config_class=SparseMoeVlmTextConfig),
    }
    # Plans name modules of the decoder; the vision tower is not sharded with it.
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}

    vision_config: PreTrainedConfig | Given = None
    text_config: SparseMoeVlmTextConfig | Given = None
    image_token_id: int = 1
    modality_encoders: dict[str, dict[str, Any]] | None = None
    pixel_shuffle_factor: int = 2
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        check_spelling(kwargs, {field.name for field in fields(type(self))})
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        for field in ("vision_config", "text_config"):
            value = getattr(self, field)
            check(
                value is None or isinstance(value, dict | PreTrainedConfig),
                f"`{field}` must be a configuration or a dict, got {value!r}.",
            )
        super().__post_init__(**kwargs)
        check_fields(self)
        # The language head belongs to the whole model, so the two flags are one.
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        self.text_config.tie_word_embeddings = self.tie_word_embeddings

    def validate_architecture(self) -> None:
        """See [`SparseMoeVlmTextConfig.validate_architecture`]."""
        super().validate_architecture()
        self.text_config.validate_architecture()
        check_fields(self)

    @property
    def placeholder_ids(self) -> dict[int, int]:
        """By modality id, the id of the placeholder token: 1 for images, and the further modalities'."""
        further = {
            self.text_config.modalities.index(name): encoder["token_id"]
            for name, encoder in (self.modality_encoders or {}).items()
        }
        return {1: self.image_token_id} | further

    @property
    def num_expert_shards(self) -> int:
        """See [`SparseMoeVlmTextConfig.num_expert_shards`]."""
        return self.text_config.num_expert_shards

    @num_expert_shards.setter
    def num_expert_shards(self, value: int) -> None:
        self.text_config.num_expert_shards = value

    @property
    def image_seq_length(self) -> int:
        """Number of tokens that one image becomes."""
        return (patches_per_side(self.vision_config) // self.pixel_shuffle_factor) ** 2

    def num_parameters(self) -> int:
        """Total number of parameters of [`SparseMoeVlmForConditionalGeneration`], without allocating weights."""
        return count_parameters(self, "text")[0]

    def num_active_parameters(self, modality: str = "text") -> int:
        """
        Number of parameters that one token of `modality` uses: the decoder with its head, less the experts that do not
        serve the token or are not picked for it; for image tokens also the vision tower and the connector. With
        `router="top_p"` it is an upper bound.

        Args:
            modality (`str`, defaults to `"text"`):
                One of `config.text_config.modalities`.

        Raises:
            ValueError: If the modality is unknown.
        """
        return count_parameters(self, modality)[1]

    # Only the decoder has experts; passed down to a library vision tower a plain string would be refused.
    @property
    def _experts_implementation(self):
        return self._experts_implementation_internal

    @_experts_implementation.setter
    def _experts_implementation(self, value: str | dict | None):
        if not isinstance(value, dict):
            value = {"": value, "text_config": value}
        PreTrainedConfig._experts_implementation.fset(self, value)


# `transformers serve` reads these tables when the configuration is imported, before any model file.
for _table in ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
    getattr(modeling_auto, _table)[SparseMoeVlmConfig.model_type] = "SparseMoeVlmForConditionalGeneration"

for _config in (SparseMoeVlmTextConfig, SparseMoeVlmConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)

__all__ = ["SparseMoeVlmConfig", "SparseMoeVlmTextConfig"]
