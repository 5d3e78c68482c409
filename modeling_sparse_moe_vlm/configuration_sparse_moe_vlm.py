"""Configuration of the sparse mixture-of-experts vision-language model."""

from __future__ import annotations

from .versions import SUPPORTED_TRANSFORMERS  # noqa: F401

# isort: split

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import AutoConfig

from .checks import build_config, check, check_dtype, check_spelling
from .config_validation import TEXT_MODEL_TYPE, check_fields, check_rope, check_text_fields
from .experts_config import Given, PushedWithoutPaths, SparseMoeVlmExpertsConfig
from .native_towers import merge_size_of, patches_per_side
from .parameters import count_parameters

if TYPE_CHECKING:
    # Every file of the model is named here, so that Transformers copies and hashes all of them along with this file.
    # `num_parameters` needs them, and Transformers distinguishes revisions of remote code by the files that a file
    # imports. Otherwise, two checkpoints that differ only in the model's files would share the configuration classes
    # below, and the auto classes would use the model class of the first checkpoint for both. (Transformers 4 copies
    # only the files named here. With a file missing, it would fail before `versions.py` can report the old version.)
    from .attention import SparseMoeVlmAttention  # noqa: F401
    from .attention_parts import AttentionParts  # noqa: F401
    from .attention_plan import plan_attention  # noqa: F401
    from .attention_runs import find_runs  # noqa: F401
    from .cache_name import CACHE_NAME  # noqa: F401
    from .cached_modalities import remember_modality_ids  # noqa: F401
    from .capacity import expert_capacity  # noqa: F401
    from .checkpoint_conversion import convert_from_disk  # noqa: F401
    from .checkpoint_integrity import read_header  # noqa: F401
    from .connector import SparseMoeVlmMultiModalProjector  # noqa: F401
    from .continuous_batching import ContinuousTextBatching  # noqa: F401
    from .decoder_layer import SparseMoeVlmDecoderLayer  # noqa: F401
    from .deepstack import Deepstack  # noqa: F401
    from .distributed_attention import merge  # noqa: F401
    from .expert_groups import ExpertGroup  # noqa: F401
    from .expert_shards import SparseMoeVlmExpertShards  # noqa: F401
    from .experts import SparseMoeVlmExperts  # noqa: F401
    from .experts_host import ExpertsHost  # noqa: F401
    from .experts_validation import check_expert_fields  # noqa: F401
    from .fused_head import takes_fused_head  # noqa: F401
    from .image_generation import SparseMoeVlmImageGeneration  # noqa: F401
    from .image_patches import to_images  # noqa: F401
    from .input_checks import check_shapes  # noqa: F401
    from .kept_names import keep_names  # noqa: F401
    from .language_head import SparseMoeVlmLanguageHead  # noqa: F401
    from .lora_targets import AdapterConfigs  # noqa: F401
    from .losses import router_losses  # noqa: F401
    from .modality_encoder import SparseMoeVlmModalityEncoder  # noqa: F401
    from .modeling_sparse_moe_vlm import SparseMoeVlmModel  # noqa: F401
    from .native_encoding import grids_of  # noqa: F401
    from .normalization import SparseMoeVlmRMSNorm  # noqa: F401
    from .outputs import SparseMoeVlmModelOutputWithPast  # noqa: F401
    from .parallel_plans import plan_by_group  # noqa: F401
    from .pretrained import SparseMoeVlmPreTrainedModel  # noqa: F401
    from .quantization import warn_of_unquantised_experts  # noqa: F401
    from .routing import SparseMoeVlmTopKRouter  # noqa: F401
    from .steering import initial_log_priors  # noqa: F401
    from .token_modalities import TokenModalities  # noqa: F401
    from .visible_keys import visible_counts  # noqa: F401
    from .vision_tower import check_vision_config  # noqa: F401
    from .visual_features import SparseMoeVlmVisualFeatures  # noqa: F401

# Outputs that `Trainer` ignores during prediction, so that it gathers only the logits.
_NOT_PREDICTIONS = [
    "past_key_values",
    "cache",
    "router_logits",
    "router_indices",
    "router_dropped",
    "aux_loss",
    "z_loss",
    "aux_loss_by_modality",
    "router_loss",
    "image_outputs",
    "image_hidden_states",
    "modality_weights",
    "count_free_modality_weights",
]

# The class to load for each auto class. `save_pretrained` writes these entries to `auto_map` for remote code.
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
    "AutoModelForMultimodalLM": f"{_MODEL_FILE}.SparseMoeVlmForCausalLM",  # for `transformers serve`
}


class SparseMoeVlmTextConfig(SparseMoeVlmExpertsConfig):
    r"""
    Configuration of [`SparseMoeVlmTextModel`], a decoder with the architecture of Llama and Qwen3 in which the
    feed-forward blocks of the sparse layers are mixtures of modality experts.

    Args:
        vocab_size (`int`, defaults to 32000):
            Size of the vocabulary.
        intermediate_size (`int`, defaults to 5632):
            Intermediate size of the feed-forward block in the dense layers.
        num_attention_heads (`int`, defaults to 16):
            Number of query heads.
        num_key_value_heads (`int`, *optional*, defaults to `num_attention_heads`):
            Number of key and value heads (grouped-query attention).
        head_dim (`int`, *optional*, defaults to `hidden_size // num_attention_heads`):
            Dimension of each attention head.
        max_position_embeddings (`int`, defaults to 32768):
            Maximum sequence length that the model is intended for.
        rms_norm_eps (`float`, defaults to 1e-6):
            Epsilon of the RMS normalisation layers.
        use_cache (`bool`, defaults to `True`):
            Whether to return the key/value cache.
        tie_word_embeddings (`bool`, defaults to `False`):
            Whether the language head shares its weights with the token embedding.
        rope_parameters (`dict`, *optional*):
            Parameters of the rotary position embedding, in the format of Transformers (`rope_type`, `rope_theta`, …).
        attention_bias (`bool`, defaults to `False`):
            Whether the query, key, value and output projections have biases.
        attention_out_bias (`bool`, *optional*, defaults to `attention_bias`):
            Whether the output projection of the attention has a bias. Qwen2, for example, has biases only in the other
            three projections.
        attention_dropout (`float`, defaults to 0.0):
            Dropout probability of the attention weights.
        use_qk_norm (`bool`, defaults to `True`):
            Whether to apply RMS normalisation to the queries and keys of each head, as in Qwen3.
        nope_layers (`list[int]`, *optional*):
            Layers without rotary embedding (NoPE, arXiv 2305.19466), as in some layers of SmolLM3.
        alpha_init (`float`, defaults to 0.5):
            Prior α₀ of the image part in distributed attention, and of every other modality except text. The weight
            that the attention logits give a part is multiplied by its prior.
        beta_init (`float`, defaults to 0.5):
            Prior β₀ of the text part. Only the ratio of the priors matters: with equal priors, distributed attention
            is plain attention.
        learned_modality_priors (`bool`, defaults to `False`):
            Whether every head learns its own priors, starting from `alpha_init` and `beta_init`. If `False`, the
            priors are fixed, as in Vidi (arXiv 2504.15681).
        start (`dict`, *optional*):
            A record of how the model was initialised from a dense model (see
            [`~toolbox.upcycling.upcycle_from_parts`]). The model does not use it.
        pad_token_id (`int`, *optional*):
            Id of the padding token.
        bos_token_id (`int`, *optional*):
            Id of the token that starts a sequence.
        eos_token_id (`int` or `list[int]`, *optional*):
            Id of the token that ends a sequence, or ids of several such tokens.

    The fields of the experts (`num_experts`, `expert_groups`, `router`, …) are inherited from
    [`SparseMoeVlmExpertsConfig`].

    Raises:
        ValueError: If a field is invalid or fields contradict each other. The message names the field and the fix.

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
    intermediate_size: int = 5632
    num_attention_heads: int = 16
    num_key_value_heads: int | Given = None
    head_dim: int | Given = None
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | Given = None
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    attention_dropout: float = 0.0
    use_qk_norm: bool = True
    nope_layers: list[int] | Given = None
    alpha_init: float = 0.5
    beta_init: float = 0.5
    learned_modality_priors: bool = False
    start: dict[str, Any] | Given = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(TEXT_AUTO_MAP))
        super().__post_init__(**kwargs)
        check_rope(self)

    def _complete(self) -> None:
        """Checks the decoder's own fields as well, and fills in those that were left out."""
        super()._complete()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.nope_layers is None:
            self.nope_layers = []
        check_text_fields(self)
        self.nope_layers = list(self.nope_layers)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.start = dict(self.start or {})
        # A copy, because Transformers adds missing parameters in place.
        self.rope_parameters = dict(self.rope_parameters or {})

    def validate_architecture(self) -> None:
        """Checks the fields again when a model is created: see [`SparseMoeVlmExpertsConfig.validate_architecture`]."""
        super().validate_architecture()
        check_text_fields(self)

    def num_parameters(self) -> int:
        """Returns the number of parameters of [`SparseMoeVlmForCausalLM`], counted without allocating weights."""
        return count_parameters(self, "text")[0]

    def num_active_parameters(self, modality: str = "text") -> int:
        """
        Returns the number of parameters that one token of `modality` uses: all parameters except those of the experts
        that do not serve the modality or that the router does not choose. With `router="top_p"`, it is an upper bound.

        Args:
            modality (`str`, defaults to `"text"`):
                One of `config.modalities`.

        Returns:
            `int`: The number of active parameters.

        Raises:
            ValueError: If the modality is unknown.
        """
        return count_parameters(self, modality)[1]


class SparseMoeVlmConfig(PushedWithoutPaths, PreTrainedConfig):
    r"""
    Configuration of [`SparseMoeVlmForConditionalGeneration`]: a vision tower, a connector and a decoder with experts.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the vision tower: any vision model of Transformers that maps `pixel_values` to patch
            features (SigLIP, CLIP, DINOv2, DINOv3, ViT, …). Defaults to SigLIP.
        text_config (`SparseMoeVlmTextConfig` or `dict`, *optional*):
            Configuration of the decoder.
        image_token_id (`int`, defaults to 1):
            Id of the placeholder token that image features replace.
        video_token_id (`int`, *optional*):
            Id of the placeholder token that the features of video frames replace. The vision tower and the connector
            encode frames like images. Needs `"video"` among `text_config.modalities`, so that `expert_groups` says
            which experts serve it.
        video_temporal_pooling (`int`, defaults to 1):
            Number of consecutive frames of a video whose tokens are averaged.
        modality_encoders (`dict[str, dict]`, *optional*):
            Encoders of further modalities, by the name of the modality (one of `text_config.modalities`). Each value
            contains the `model_type` and the fields of a configuration for which `AutoModel` creates an encoder
            (models registered with it included), and the `token_id` of the placeholder token.
        pixel_shuffle_factor (`int`, defaults to 2):
            Side of the squares of patches that are merged before the connector's MLP (space-to-depth). An image has
            `(image_size / patch_size / pixel_shuffle_factor) ** 2` tokens.
        vision_feature_layer (`int`, *optional*):
            Index of the hidden states of the vision tower to use, as in LLaVA: 0 for the embeddings, 1 for the first
            layer, -2 for the last layer but one. By default, the last hidden state, after the final normalisation.
        image_sizing (`str`, defaults to `"fixed"`):
            `"fixed"` for images that all have the size of the vision tower, or `"native"` for images of different
            sizes, which keep their aspect ratio. Vision towers that can interpolate their position embeddings or have
            rotary ones take such images, and towers that pack images of different sizes (SigLIP 2 NaFlex, Pixtral,
            Qwen2-VL and later) take nothing else. The processor must have the same setting: see `image_arguments`.
        use_deepstack (`bool`, *optional*):
            Whether the decoder also reads the DeepStack features of the vision tower (Qwen3-VL): merged features of
            earlier layers of the tower. The connector projects each level of them, and the model adds the first level
            to the hidden states of the image tokens after the first decoder layer, the second level after the second
            layer, and so on. By default, the model ignores them, with a warning.
        projector_hidden_act (`str`, defaults to `"gelu"`):
            Activation function of the connector's MLP.
        multimodal_projector_bias (`bool`, defaults to `True`):
            Whether the connector's MLP has biases.
        tie_word_embeddings (`bool`, defaults to `False`):
            Whether the language head shares its weights with the token embedding.
        use_cache (`bool`, defaults to `True`):
            Whether to return the key/value cache.

    Raises:
        ValueError: If a field is invalid or fields contradict each other. The message names the field and the fix.

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
            # The patch features do not pass through the pooling head. Without the head, no parameter is unused.
            init_kwargs={"vision_use_head": False},
        ),
        "text_config": SubConfigSpec(config_class=SparseMoeVlmTextConfig),
    }
    # The sharding plans name modules of the decoder. They do not apply to the vision tower.
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}

    vision_config: PreTrainedConfig | Given = None
    text_config: SparseMoeVlmTextConfig | Given = None
    image_token_id: int = 1
    video_token_id: int | None = None
    video_temporal_pooling: int = 1
    modality_encoders: dict[str, dict[str, Any]] | None = None
    pixel_shuffle_factor: int = 2
    vision_feature_layer: int | None = None
    image_sizing: str = "fixed"
    use_deepstack: bool | None = None
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
        check_dtype("dtype", self.dtype)
        check_fields(self)
        # The language head belongs to the whole model, so both flags must have the same value.
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        self.text_config.tie_word_embeddings = self.tie_word_embeddings

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        Creates a configuration from a dict: see [`~transformers.PreTrainedConfig.from_dict`].

        Args:
            config_dict (`dict[str, Any]`):
                The fields of the configuration.
            kwargs (`Any`):
                Fields that override those of the dict. Fields of the decoder override those of `text_config`.

        Returns:
            `SparseMoeVlmConfig`: The configuration.
        """
        given = {name: kwargs.pop(name) for name in DECODER_FIELDS & kwargs.keys()}
        if given:
            text_config = config_dict.get("text_config") or {}
            if isinstance(text_config, PreTrainedConfig):
                text_config = text_config.to_dict()
            config_dict = config_dict | {"text_config": text_config | given}
        return build_config(partial(super().from_dict, **kwargs), config_dict)

    def validate_architecture(self) -> None:
        """Checks the fields again when a model is created: see [`SparseMoeVlmExpertsConfig.validate_architecture`]."""
        super().validate_architecture()
        self.text_config.validate_architecture()
        check_fields(self)

    @property
    def placeholder_ids(self) -> dict[int, int]:
        """
        Ids of the placeholder tokens by modality id, for images (modality id 1), videos (2) and further modalities.
        """
        further = {
            self.text_config.modalities.index(name): encoder["token_id"]
            for name, encoder in (self.modality_encoders or {}).items()
        }
        videos = {} if self.video_token_id is None else {2: self.video_token_id}
        return {1: self.image_token_id} | videos | further

    @property
    def num_expert_shards(self) -> int:
        """Number of shards per expert group: see [`SparseMoeVlmExpertsConfig.num_expert_shards`]."""
        return self.text_config.num_expert_shards

    @num_expert_shards.setter
    def num_expert_shards(self, value: int) -> None:
        self.text_config.num_expert_shards = value

    @property
    def image_seq_length(self) -> int:
        """Number of image tokens per image, or with `image_sizing="native"` per square image of the tower's size."""
        return (patches_per_side(self.vision_config) // self._patches_per_token_side) ** 2

    @property
    def _patches_per_token_side(self) -> int:
        return merge_size_of(self.vision_config) * self.pixel_shuffle_factor

    @property
    def image_arguments(self) -> dict[str, Any]:
        """
        Arguments of [`SparseMoeVlmProcessor`] that must agree with the configuration: `image_seq_length` and, with
        `image_sizing="native"`, also `image_sizing`, `patch_size` and `merge_size`.
        """
        arguments: dict[str, Any] = {"image_seq_length": self.image_seq_length}
        if self.image_sizing == "native":
            arguments |= {
                "image_sizing": "native",
                "patch_size": self.vision_config.patch_size,
                "merge_size": self._patches_per_token_side,
            }
        return arguments

    def num_parameters(self) -> int:
        """Returns the number of parameters of [`SparseMoeVlmForConditionalGeneration`], without allocating weights."""
        return count_parameters(self, "text")[0]

    def num_active_parameters(self, modality: str = "text") -> int:
        """
        Returns the number of parameters that one token of `modality` uses: those of the decoder and its language head
        without the experts that do not serve the modality or that the router does not choose. For modalities other than
        text, the vision tower and the connector are included. With `router="top_p"`, it is an upper bound.

        Args:
            modality (`str`, defaults to `"text"`):
                One of `config.text_config.modalities`.

        Returns:
            `int`: The number of active parameters.

        Raises:
            ValueError: If the modality is unknown.
        """
        return count_parameters(self, modality)[1]

    # Only the decoder has experts. Transformers would refuse the implementation for a vision tower without experts.
    @property
    def _experts_implementation(self):
        return self._experts_implementation_internal

    @_experts_implementation.setter
    def _experts_implementation(self, value: str | dict | None):
        if not isinstance(value, dict):
            value = {"": value, "text_config": value}
        PreTrainedConfig._experts_implementation.fset(self, value)


# Fields of the decoder that `from_pretrained` also accepts for the whole model, which has no fields of these names.
DECODER_FIELDS = {field.name for field in fields(SparseMoeVlmTextConfig)} - {
    field.name for field in fields(SparseMoeVlmConfig)
}

SparseMoeVlmTextConfig.fields_of_loading = SparseMoeVlmConfig.fields_of_loading = frozenset(DECODER_FIELDS)

# `transformers serve` looks up the model type in these tables after it has imported only the configuration. The tables
# contain only names, which are the same in every revision of this code.
for _table in ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
    getattr(modeling_auto, _table)[SparseMoeVlmConfig.model_type] = "SparseMoeVlmForConditionalGeneration"
modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[SparseMoeVlmTextConfig.model_type] = "SparseMoeVlmForCausalLM"

# Makes `save_pretrained` copy this code into checkpoints. The auto classes find it through `auto_map`; only the
# installed package registers its classes with the auto classes.
SparseMoeVlmTextConfig.register_for_auto_class()
SparseMoeVlmConfig.register_for_auto_class()

__all__ = ["SparseMoeVlmConfig", "SparseMoeVlmTextConfig"]
