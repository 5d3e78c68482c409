"""The features of images and videos: the vision tower and the connector convert them to tokens of the decoder."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check
from transformers.utils.import_utils import is_tracing

from .cache_name import is_paged
from .configuration_sparse_moe_vlm import SparseMoeVlmConfig
from .connector import SparseMoeVlmMultiModalProjector
from .expert_groups import BUILTIN_MODALITIES
from .outputs import join_image_tokens
from .parallel_plans import is_one_of_several_processes
from .pretrained import SparseMoeVlmPreTrainedModel
from .token_modalities import TokenModalities
from .vision_tower import patch_features

# Other libraries look for the first of these messages.
_MISMATCH = {
    "image": "Image features and image tokens do not match",
    "video": "Video features and video tokens do not match",
}


class SparseMoeVlmVisualFeatures(SparseMoeVlmPreTrainedModel):
    """Base class of the whole model without a language head, which encodes images and videos."""

    config: SparseMoeVlmConfig
    vision_tower: Any
    multi_modal_projector: SparseMoeVlmMultiModalProjector

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""
        Encodes images into image tokens.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`):
                The images, as returned by the image processor.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: The output of the vision tower, with a list
            of one tensor of shape `(image_seq_length, hidden_size)` per image as `pooler_output`.
        """
        # A processor called with an empty list of images returns an empty tensor.
        if pixel_values.numel() == 0:
            return BaseModelOutputWithPooling(pooler_output=[])
        outputs, features = self._encode_images(pixel_values, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            # A list would fix the number of images in a traced graph.
            pooler_output=features if is_tracing(features) else list(features),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""
        Encodes frames of videos into video tokens, in the same way as images.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(num_frames, channels, height, width)`):
                The frames of all videos, as returned by the processor. A further dimension in front, for the videos,
                is possible if all videos have the same number of frames.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: The output of the vision tower, with a list
            of one tensor of shape `(image_seq_length, hidden_size)` per frame as `pooler_output`, or per
            `video_temporal_pooling` frames, whose tokens are averaged.

        Raises:
            ValueError: If the model reads no videos, or if `video_temporal_pooling` does not divide the number of
                frames.
        """
        pooling = self.config.video_temporal_pooling
        if self.config.video_token_id is None:
            raise ValueError("the model reads no videos: its configuration has no `video_token_id`.")
        if pixel_values_videos.numel() == 0:
            return BaseModelOutputWithPooling(pooler_output=[])
        frames = pixel_values_videos.flatten(0, -4)
        if frames.shape[0] % pooling != 0:
            raise ValueError(
                f"`pixel_values_videos` has {frames.shape[0]} frames, but `video_temporal_pooling` ({pooling}) must "
                "divide their number: use a processor with the same `video_temporal_pooling`."
            )
        outputs, features = self._encode_images(frames, **kwargs)
        features = features.unflatten(0, (-1, pooling)).mean(dim=1)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=features if is_tracing(features) else list(features),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _encode_images(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[Any, torch.Tensor]:
        """Returns the output of the vision tower and the image tokens `(num_images, image_seq_length, hidden_size)`."""
        layer = self.config.vision_feature_layer
        if layer is not None:
            kwargs["output_hidden_states"] = True
        outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        hidden_states = outputs.last_hidden_state
        if layer is not None:
            if not outputs.get("hidden_states"):
                raise ValueError(
                    f"the vision tower ({self.config.vision_config.model_type}) does not return the hidden states of "
                    "its layers: leave out `vision_feature_layer`."
                )
            hidden_states = outputs.hidden_states[layer]
        features = patch_features(hidden_states, self.config.vision_config)
        if layer is not None and self.training and is_one_of_several_processes():
            # Data parallelism waits for the gradients of the layers after this one.
            features = features + (0.0 * outputs.last_hidden_state).sum().to(features)
        if self.training and outputs.get("pooler_output") is not None and is_one_of_several_processes():
            # The pooled output is not used, but data parallelism waits for the gradients of the head that computes it.
            features = features + (0.0 * outputs.pooler_output).sum().to(features)
        return outputs, self.multi_modal_projector(features)

    def insert_features(
        self, inputs_embeds: torch.Tensor, outputs: BaseModelOutputWithPooling, tokens: TokenModalities, kind: str
    ) -> torch.Tensor:
        """Replaces the embeddings of the placeholders of images or videos with their features."""
        assert tokens.ids is not None
        features = join_image_tokens(outputs.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
        is_placeholder = (tokens.ids == BUILTIN_MODALITIES.index(kind)).to(inputs_embeds.device)
        num_tokens = is_placeholder.sum()
        torch_compilable_check(
            num_tokens == features.shape[0],
            lambda: (
                f"{_MISMATCH[kind]}: tokens: {num_tokens}, features: {features.shape[0]}. Every {kind} needs one "
                f"{kind} placeholder in the text, which the processor expands to {self.config.image_seq_length} tokens "
                f"per {'tile' if kind == 'image' else 'frame'}."
            ),
        )
        return inputs_embeds.masked_scatter(is_placeholder.unsqueeze(-1), features)

    def has_placeholders(
        self,
        input_ids: torch.Tensor | None,
        past_key_values: Cache | None = None,
        token_id: int | None = None,
    ) -> bool:
        """
        Returns whether the token ids `(B, T)` contain image placeholders, or a given placeholder token. Returns `False`
        during tracing (the ids are unknown), with a filled cache, and in continuous batching (which refuses
        placeholders before it runs the model).
        """
        if input_ids is None or is_tracing(input_ids):
            return False
        if past_key_values is not None and (is_paged(past_key_values) or past_key_values.get_seq_length() > 0):
            return False
        return bool((input_ids == (self.config.image_token_id if token_id is None else token_id)).any())

    def _blank_image_features(self) -> torch.Tensor:
        config = self.config.vision_config
        shape = (1, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        blank = torch.zeros(shape, dtype=self.vision_tower.dtype, device=self.vision_tower.device)
        return self._encode_images(blank)[1]
