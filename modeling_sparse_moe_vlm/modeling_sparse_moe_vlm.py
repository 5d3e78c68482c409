"""The sparse mixture-of-experts vision-language model.

Data flow::

    images ──► vision tower ──► connector ──┐
                                            ├──► one sequence of tokens ──► decoder layers ──► language head
    text ────► token embedding ─────────────┘
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .attention import SparseMoeVlmAttention
from .attention_plan import plan_attention
from .cache_name import CACHE_NAME, is_paged, takes_cache_by_name
from .configuration_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmTextConfig
from .connector import SparseMoeVlmMultiModalProjector
from .decoder_layer import SparseMoeVlmDecoderLayer
from .experts import make_experts
from .image_generation import SparseMoeVlmImageGeneration
from .input_checks import (
    check_encoder_outputs,
    check_only_tokens,
    check_shapes,
    warn_of_missing_deepstack,
    warn_of_unknown_modalities,
)
from .language_head import SparseMoeVlmLanguageHead
from .modality_encoder import SparseMoeVlmModalityEncoders
from .native_towers import TowerInputs, make_tower, num_deepstack_levels_of
from .normalization import SparseMoeVlmRMSNorm
from .outputs import (
    SparseMoeVlmCausalLMOutputWithPast,
    SparseMoeVlmModelOutputWithPast,
    SparseMoeVlmTextModelOutputWithPast,
)
from .parallel_plans import is_one_of_several_processes, plan_by_group
from .pretrained import SparseMoeVlmPreTrainedModel
from .routing import RoutingPlanner, RoutingRecord, warn_of_resting_biases
from .steering import check_steering_arguments
from .token_modalities import TokenModalities, check_tokens, find_modalities
from .visual_features import SparseMoeVlmVisualFeatures

logger = logging.get_logger(__name__)

# ------------------------------------------------------------------------------------------------ decoder


class SparseMoeVlmTextModel(SparseMoeVlmPreTrainedModel):
    """The decoder without a language head: token embedding, decoder layers and final norm."""

    config: SparseMoeVlmTextConfig
    input_modalities = ("text",)
    _can_record_outputs = {
        "hidden_states": SparseMoeVlmDecoderLayer,
        "attentions": SparseMoeVlmAttention,
    }

    def __init__(self, config: SparseMoeVlmTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [SparseMoeVlmDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.expert_pools = nn.ModuleDict()
        for pool, layers in config.pools.items():
            groups = config.layer_expert_groups(layers[0], always_on=False)
            self.expert_pools[str(pool)] = make_experts(config, groups)
        self.norm = SparseMoeVlmRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.routing_planner = RoutingPlanner(config)
        self._may_warn = bool(config.router_bias_update_rate)
        self.gradient_checkpointing = False
        self.post_init()

    def init_parallel_plans(self) -> None:
        """Replaces the wildcards for expert groups with their names: in Transformers, wildcards only match numbers."""
        super().init_parallel_plans()
        self._tp_plan: dict[str, str] = plan_by_group(self._tp_plan, self.config)
        self._ep_plan: dict[str, str] = plan_by_group(self._ep_plan, self.config)
        if self.config.pools:
            self._fsdp_plan["expert_pools.*"] = "free_full_weight"

    def _attentions(self) -> Iterator[SparseMoeVlmAttention]:
        for layer in self.layers:
            attention = layer.self_attn
            assert isinstance(attention, SparseMoeVlmAttention)
            yield attention

    @takes_cache_by_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_modality_weights: bool = False,
        modality_priors: Mapping[str, float] | None = None,
        modality_guidance: float = 0.0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparseMoeVlmTextModelOutputWithPast:
        r"""
        Runs the decoder. See [`SparseMoeVlmForConditionalGeneration.forward`] for the arguments.

        Raises:
            ValueError: If not exactly one of `input_ids` and `inputs_embeds` is given, if the shape of
                `mm_token_type_ids`, `attention_mask` or `position_ids` does not match the tokens, or for image inputs.
        """
        check_steering_arguments(kwargs)
        check_only_tokens(kwargs)
        check_tokens(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        tokens = kwargs.pop("token_modalities", None)  # passed by the enclosing model, if there is one
        if tokens is None:
            tokens = TokenModalities.of(
                inputs_embeds.shape[:2], mm_token_type_ids, attention_mask, self.config.modalities, position_ids
            )
        # Older releases pass the cache of continuous batching under another name.
        cache = past_key_values if past_key_values is not None else kwargs.get("cache")
        check_shapes(inputs_embeds.shape[:2], attention_mask, position_ids, cache)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: past_key_values},
        )
        # Created after the mask, because Transformers does not look for several sequences per row if there is a cache.
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        parts = None
        # Continuous batching only runs text without images, for which distributed attention equals plain attention.
        if not is_paged(cache):
            parts = plan_attention(
                self.config,
                tokens.ids,
                inputs_embeds,
                causal_mask,
                past_key_values,
                attentions=tuple(self._attentions()),
                parameters=self.parameters(),
                output_attentions=bool(kwargs.get("output_attentions", self.config.output_attentions)),
                output_modality_weights=output_modality_weights,
                modality_priors=modality_priors,
                modality_guidance=modality_guidance,
            )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        returns_routing = kwargs.pop("output_router_logits", None)
        if returns_routing is None:
            returns_routing = self.config.output_router_logits
        deepstack = kwargs.pop("deepstack", ())  # passed by the enclosing model
        record = kwargs.pop("routing_record", None)  # passed by tools that observe the routing
        if record is None:
            if self._may_warn and self.training and torch.is_grad_enabled() and not is_tracing(inputs_embeds):
                self._may_warn = False
                warn_of_resting_biases(self)
            record = RoutingRecord() if returns_routing else None
        routing = self.routing_planner.plan(tokens, inputs_embeds.device, record)

        hidden_states = inputs_embeds
        for layer_idx, layer in enumerate(self.layers):
            pool = self.config.layer_pool(layer_idx)
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                routing=routing,
                attention_parts=parts,
                pooled_experts=None if pool is None else self.expert_pools[str(pool)],
                **{CACHE_NAME: past_key_values},
                **kwargs,
            )
            for features in deepstack:
                hidden_states = features.add_level(layer_idx, hidden_states)
        return SparseMoeVlmTextModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **(record.outputs() if returns_routing else {}),
            **(parts.read_out() if parts is not None else {}),
            **{CACHE_NAME: past_key_values},
        )


# ------------------------------------------------------------------------------------------------ vision and language


class SparseMoeVlmModel(SparseMoeVlmVisualFeatures):
    """The whole model without a language head: vision tower, connector and decoder."""

    def __init__(self, config: SparseMoeVlmConfig):
        super().__init__(config)
        self.vision_tower = make_tower(config.vision_config)
        self.tower_inputs = TowerInputs.of(type(self.vision_tower))
        for name, parameter in self.vision_tower.named_parameters():
            if name.endswith("mask_token"):  # only used for masked images, when the vision tower is pretrained
                parameter.requires_grad_(False)
        if config.use_deepstack is None and num_deepstack_levels_of(config.vision_config) > 0:
            logger.warning_once(
                f"The vision tower ({config.vision_config.model_type}) also returns DeepStack features, but the model "
                "does not read them. Set `use_deepstack=True` in the configuration of a new model to read them, or "
                "`use_deepstack=False` to leave them out without this warning."
            )
        self.multi_modal_projector = SparseMoeVlmMultiModalProjector(config)
        self.modality_encoders = SparseMoeVlmModalityEncoders(config)
        self.language_model = SparseMoeVlmTextModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_mm_token_type_ids(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the modality id of every token `(B, T)`: see [`~token_modalities.find_modalities`]."""
        return find_modalities(
            input_ids, inputs_embeds, mm_token_type_ids, self.config.placeholder_ids, self.get_input_embeddings()
        )

    def get_token_modalities(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        mm_token_type_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        has_features: bool,
        position_ids: torch.Tensor | None = None,
    ) -> TokenModalities:
        """Returns the modalities and the padding of the tokens. The outermost model calls it once per forward pass."""
        if input_ids is None and mm_token_type_ids is None and not has_features:
            warn_of_unknown_modalities(self.config.text_config, self.language_model.routing_planner)
        ids = self.get_mm_token_type_ids(input_ids, inputs_embeds, mm_token_type_ids)
        return TokenModalities.of(ids.shape, ids, attention_mask, self.config.text_config.modalities, position_ids)

    @takes_cache_by_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        modality_values: Mapping[str, torch.Tensor] | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparseMoeVlmModelOutputWithPast:
        r"""
        Runs the vision tower, the connector and the decoder. See [`SparseMoeVlmForConditionalGeneration.forward`] for
        the arguments and errors.
        """
        check_tokens(input_ids, inputs_embeds)
        for name, pixels in (("pixel_values", pixel_values), ("pixel_values_videos", pixel_values_videos)):
            if pixels is not None and mm_encoder_outputs is not None:
                raise ValueError(f"You cannot specify both `{name}` and `mm_encoder_outputs`.")
        check_encoder_outputs(mm_encoder_outputs, reads_videos=self.config.video_token_id is not None)
        tokens = kwargs.pop("token_modalities", None)  # passed by the enclosing model, if there is one
        if tokens is None:
            has_pixels = pixel_values is not None or pixel_values_videos is not None
            has_features = any((has_pixels, mm_encoder_outputs, modality_values))
            tokens = self.get_token_modalities(
                input_ids, inputs_embeds, mm_token_type_ids, attention_mask, has_features, position_ids
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        elif self.config.use_deepstack and mm_encoder_outputs is None and pixel_values is None:
            warn_of_missing_deepstack()

        if modality_values:
            inputs_embeds = self.modality_encoders.embed(modality_values, inputs_embeds, tokens.ids)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and pixel_values.numel() > 0:
            recorded = {name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs}
            image_outputs = self.get_image_features(pixel_values, image_grid_thw, return_dict=True, **recorded)
        elif image_outputs is not None and len(image_outputs.pooler_output) == 0:
            image_outputs = None
        deepstack = []
        if image_outputs is not None:
            inputs_embeds = self.insert_features(inputs_embeds, image_outputs, tokens, "image")
            if self.config.use_deepstack:
                deepstack.append(self.deepstack_of(image_outputs, tokens, "image"))
        else:
            cache = past_key_values if past_key_values is not None else kwargs.get("cache")
            if mm_encoder_outputs is None and self.has_placeholders(input_ids, cache):
                raise ValueError(
                    "The text has image placeholders, but there are no images: pass the `pixel_values` that the "
                    "processor returns, or `mm_encoder_outputs={}` to read the text without its images."
                )
            if self.training and torch.is_grad_enabled() and is_one_of_several_processes():
                # Other processes may have images, and all processes must run the same modules: data parallelism waits
                # for the gradient of every parameter, and all processes gather sharded weights together.
                inputs_embeds = inputs_embeds + (0.0 * self._blank_image_features()).sum().to(inputs_embeds)

        video_outputs = (mm_encoder_outputs or {}).get("video")
        if pixel_values_videos is not None and pixel_values_videos.numel() > 0:
            video_outputs = self.get_video_features(pixel_values_videos, return_dict=True)
        if video_outputs is not None and len(video_outputs.pooler_output) > 0:
            inputs_embeds = self.insert_features(inputs_embeds, video_outputs, tokens, "video")
            if self.config.use_deepstack:
                deepstack.append(self.deepstack_of(video_outputs, tokens, "video"))
        elif mm_encoder_outputs is None and self.config.video_token_id is not None:
            cache = past_key_values if past_key_values is not None else kwargs.get("cache")
            if self.has_placeholders(input_ids, cache, self.config.video_token_id):
                raise ValueError(
                    "The text has video placeholders, but there are no videos: pass the `pixel_values_videos` that the "
                    "processor returns, or `mm_encoder_outputs={}` to read the text without its videos."
                )

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: past_key_values},
            inputs_embeds=inputs_embeds,
            token_modalities=tokens,
            deepstack=deepstack,
            return_dict=True,
            **kwargs,
        )
        return SparseMoeVlmModelOutputWithPast(**outputs, image_outputs=image_outputs)


# ------------------------------------------------------------------------------------------------ heads


class SparseMoeVlmForCausalLM(SparseMoeVlmLanguageHead, GenerationMixin):
    """The decoder with a language head, without a vision tower."""

    config: SparseMoeVlmTextConfig
    input_modalities = ("text",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SparseMoeVlmTextConfig):
        super().__init__(config)
        self.model = SparseMoeVlmTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache_by_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_modality_weights: bool = False,
        modality_priors: Mapping[str, float] | None = None,
        modality_guidance: float = 0.0,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparseMoeVlmCausalLMOutputWithPast:
        r"""
        Runs the decoder and the language head. See [`SparseMoeVlmForConditionalGeneration.forward`] for the arguments
        and [`SparseMoeVlmTextModel.forward`] for the errors.
        """
        wants_router_losses = bool(output_router_logits)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        shape = check_tokens(input_ids, inputs_embeds).shape[:2]
        tokens = TokenModalities.of(shape, mm_token_type_ids, attention_mask, self.config.modalities, position_ids)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: past_key_values},
            inputs_embeds=inputs_embeds,
            token_modalities=tokens,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_modality_weights=output_modality_weights,
            modality_priors=modality_priors,
            modality_guidance=modality_guidance,
            return_dict=True,
            **kwargs,
        )
        return self._head(outputs, labels, logits_to_keep, tokens, wants_router_losses, **kwargs)


class SparseMoeVlmForConditionalGeneration(SparseMoeVlmImageGeneration, GenerationMixin):
    """
    The whole model with a language head, which answers questions about images and captions images.

    ```python
    >>> from transformers import AutoModelForImageTextToText, AutoProcessor

    >>> model = AutoModelForImageTextToText.from_pretrained("path/to/checkpoint", trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained("path/to/checkpoint", trust_remote_code=True)
    >>> messages = [
    ...     {
    ...         "role": "user",
    ...         "content": [{"type": "image", "url": "scene.png"}, {"type": "text", "text": "What is this?"}],
    ...     }
    ... ]
    >>> inputs = processor.apply_chat_template(
    ...     messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ... )
    >>> processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: SparseMoeVlmConfig):
        super().__init__(config)
        self.model = SparseMoeVlmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes images into image tokens: see [`SparseMoeVlmModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Encodes frames of videos into video tokens: see [`SparseMoeVlmModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    @takes_cache_by_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        modality_values: Mapping[str, torch.Tensor] | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_modality_weights: bool = False,
        modality_priors: Mapping[str, float] | None = None,
        modality_guidance: float = 0.0,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SparseMoeVlmCausalLMOutputWithPast:
        r"""
        Runs the model on exactly one of `input_ids` and `inputs_embeds`.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Token ids.
            pixel_values (`torch.FloatTensor` of shape `(num_tiles, channels, height, width)`, *optional*):
                The tiles of all images of the batch, in the order of their placeholders. With `image_sizing="native"`,
                their patches, of shape `(num_patches, channels * patch_size**2)`.
            attention_mask (`torch.Tensor` of shape `(B, number of cached tokens + T)`, *optional*):
                0 for padding and 1 for other tokens, cached ones included; or a prepared 4-D mask.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Positions of the tokens. If they restart within a row and no mask is given, the row contains several
                sequences, which do not attend to each other. Tokens with negative positions are padding then.
            past_key_values (`Cache`, *optional*): Cached keys and values.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, D)`, *optional*): Embeddings of the tokens.
            mm_token_type_ids (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Modality id of every token (its position in `modalities` of the decoder's configuration), as returned by
                the processor. Derived from the placeholders by default; models without a vision tower assume text.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                Features to use instead of `pixel_values` and `pixel_values_videos`:
                `{"image": model.get_image_features(…), "video": model.get_video_features(…)}`. With `{}`,
                the model reads a text with image placeholders without its images.
            modality_values (`Mapping[str, torch.Tensor]`, *optional*):
                Inputs of the encoders of further modalities, by the name of the modality. The rows of each tensor are
                the items of the batch, in the order of their placeholders.
            pixel_values_videos (`torch.FloatTensor` of shape `(num_frames, channels, height, width)`, *optional*):
                The frames of all videos of the batch, in the order of their placeholders.
            image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`, *optional*):
                With `image_sizing="native"`, 1 and the height and the width of each image in patches.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Target tokens of the language loss. The model shifts them, and ignores positions with -100.
            use_cache (`bool`, *optional*, defaults to `config.use_cache`): Whether to return the key/value cache.
            output_router_logits (`bool`, *optional*, defaults to `config.text_config.output_router_logits`):
                Whether to return the router logits and losses and, with labels, to add the losses to the loss. If the
                argument is left out, router losses are computed only with labels or in training mode.
            output_modality_weights (`bool`, *optional*, defaults to `False`):
                Whether to return the weight of every attention part (α, β, …), by layer, head and token. With a cache,
                it must be set from the call that fills the cache onwards.
            modality_priors (`Mapping[str, float]`, *optional*):
                Factors by modality that multiply the priors of the attention parts: `{"image": 2.0}` doubles the prior
                of images.
            modality_guidance (`float`, *optional*, defaults to 0.0):
                Guidance scale g: for tokens that can attend to an image, the attention returns Z + g·(Z − O_text)
                instead of Z, where O_text is the attention output over text only.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Number of last positions whose logits are computed (0 for all), or the positions themselves.
            kwargs (`Any`): Other arguments of Transformers models, such as `output_hidden_states`.

        Raises:
            ValueError: If the number of image features does not match the number of image tokens, if the text has
                image placeholders but there are no images, if both or neither of two exclusive arguments are given, or
                for the same reasons as in [`SparseMoeVlmTextModel.forward`].
        """
        wants_router_losses = bool(output_router_logits)
        if output_router_logits is None:
            output_router_logits = self.config.text_config.output_router_logits
        check_tokens(input_ids, inputs_embeds)
        has_pixels = pixel_values is not None or pixel_values_videos is not None
        has_features = any((has_pixels, mm_encoder_outputs, modality_values))
        tokens = self.model.get_token_modalities(
            input_ids, inputs_embeds, mm_token_type_ids, attention_mask, has_features, position_ids
        )
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: past_key_values},
            inputs_embeds=inputs_embeds,
            token_modalities=tokens,
            mm_encoder_outputs=mm_encoder_outputs,
            modality_values=modality_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_modality_weights=output_modality_weights,
            modality_priors=modality_priors,
            modality_guidance=modality_guidance,
            return_dict=True,
            **kwargs,
        )
        return self._head(outputs, labels, logits_to_keep, tokens, wants_router_losses, **kwargs)


# Makes `save_pretrained` copy this code into checkpoints. `config.auto_map` names the other auto classes of each model.
# The classes are not registered with the auto classes here; otherwise, all later checkpoints in the same process would
# use this code instead of their own.
SparseMoeVlmTextModel.register_for_auto_class("AutoModel")
SparseMoeVlmModel.register_for_auto_class("AutoModel")
SparseMoeVlmForCausalLM.register_for_auto_class("AutoModelForCausalLM")
SparseMoeVlmForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "SparseMoeVlmForCausalLM",
    "SparseMoeVlmForConditionalGeneration",
    "SparseMoeVlmModel",
    "SparseMoeVlmPreTrainedModel",
    "SparseMoeVlmTextModel",
]
