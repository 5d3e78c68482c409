"""The features of images and videos: the vision tower and the connector convert them to tokens of the decoder."""

from collections.abc import Sequence
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
from .deepstack import Deepstack
from .expert_groups import BUILTIN_MODALITIES
from .image_patches import Grid, to_patches
from .native_encoding import features_by_size, grids_of, loaded_embeddings, merged_inputs, padded_inputs, sized_inputs
from .native_towers import TowerInputs, merge_size_of, num_channels_of, patches_per_side
from .outputs import SparseMoeVlmVisualOutput, join_image_tokens
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
    tower_inputs: TowerInputs
    multi_modal_projector: SparseMoeVlmMultiModalProjector

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Encodes images into image tokens.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`):
                The images, as returned by the image processor. With `image_sizing="native"`, the patches of all images
                `(num_patches, channels * patch_size**2)`, or images of one size.
            image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`, *optional*):
                With patches, 1 and the height and the width of each image in patches.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: The output of the vision tower, with a list
            of one tensor of shape `(number of tokens, hidden_size)` per image as `pooler_output`. With
            `image_sizing="native"`, `last_hidden_state` contains the features of all images one after another, without
            class and register tokens, and `hidden_states` and `attentions` are `None`. With `use_deepstack`,
            `deepstack_features` is a list of one such list of tensors per level.

        Raises:
            ValueError: If the inputs have other shapes.
        """
        # A processor called with an empty list of images returns an empty tensor.
        if pixel_values.numel() == 0:
            return BaseModelOutputWithPooling(pooler_output=[])
        if self.config.image_sizing == "native":
            patches, grids = self._patches_of(pixel_values, image_grid_thw)
            return self._encode_patches(patches, grids, self._missing_calls(grids))
        if image_grid_thw is not None:
            raise ValueError(
                "the model takes images of one size, but got `image_grid_thw`, which belongs to images of different "
                'sizes: use a processor with `image_sizing="fixed"`, or set `image_sizing="native"` in the '
                "configuration of the model."
            )
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
        if self.config.image_sizing == "native":
            of_frames = self._encode_patches(*self._patches_of(frames))
            of_frames.pooler_output = self._pool_frames(of_frames.pooler_output)
            if of_frames.deepstack_features is not None:
                of_frames.deepstack_features = [self._pool_frames(level) for level in of_frames.deepstack_features]
            return of_frames
        outputs, features = self._encode_images(frames, **kwargs)
        features = features.unflatten(0, (-1, pooling)).mean(dim=1)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=features if is_tracing(features) else list(features),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _pool_frames(self, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
        """Averages the tokens of consecutive frames."""
        return list(torch.stack(tokens).unflatten(0, (-1, self.config.video_temporal_pooling)).mean(dim=1))

    def _encode_images(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[Any, torch.Tensor]:
        """Returns the output of the vision tower and the image tokens `(num_images, image_seq_length, hidden_size)`."""
        outputs, hidden_states = self._run_tower(pixel_values, **kwargs)
        features = patch_features(
            hidden_states, self.config.vision_config, patches_per_side(self.config.vision_config) ** 2
        )
        return outputs, self.multi_modal_projector(features)

    def _run_tower(self, *args: torch.Tensor, **kwargs: Any) -> tuple[Any, torch.Tensor]:
        """Returns the output of the vision tower and the hidden states of the layer that the model reads."""
        layer = self.config.vision_feature_layer
        if layer is not None:
            kwargs["output_hidden_states"] = True
        outputs = self.vision_tower(*args, return_dict=True, **kwargs)
        hidden_states = outputs.last_hidden_state
        if layer is not None:
            if not outputs.get("hidden_states"):
                raise ValueError(
                    f"the vision tower ({self.config.vision_config.model_type}) does not return the hidden states of "
                    "its layers: leave out `vision_feature_layer`."
                )
            hidden_states = outputs.hidden_states[layer]
        if self.training and is_one_of_several_processes():
            if layer is not None:
                # Data parallelism waits for the gradients of the layers after this one.
                hidden_states = hidden_states + (0.0 * outputs.last_hidden_state).sum().to(hidden_states)
            if outputs.get("pooler_output") is not None:
                # The pooled output is not used, but data parallelism waits for the gradients of the head that computes
                # it.
                hidden_states = hidden_states + (0.0 * outputs.pooler_output).sum().to(hidden_states)
        return outputs, hidden_states

    # ---------------------------------------------------------------------------------------------- native sizes

    def _patches_of(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[Grid]]:
        """Returns the patches of images and the height and width of each image in patches."""
        config = self.config.vision_config
        if image_grid_thw is None:
            if pixel_values.dim() != 4:
                raise ValueError(
                    f"`pixel_values` of shape {tuple(pixel_values.shape)} need `image_grid_thw`: pass all inputs that "
                    "the processor returns."
                )
            grid = (pixel_values.shape[2] // config.patch_size, pixel_values.shape[3] // config.patch_size)
            image_grid_thw = torch.tensor([(1, *grid)] * len(pixel_values))
            pixel_values = to_patches(pixel_values, config.patch_size)
        return pixel_values.to(self.vision_tower.dtype), grids_of(image_grid_thw, pixel_values, self.config)

    def _missing_calls(self, grids: Sequence[Grid]) -> int:
        """Returns how often another process of a training run calls the vision tower more often than this one."""
        if not (self.training and torch.is_grad_enabled() and is_one_of_several_processes()):
            return 0
        num_calls = len(set(grids))
        most = torch.tensor(num_calls, device=self.vision_tower.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        return int(most) - num_calls

    def _encode_patches(
        self, patches: torch.Tensor, grids: Sequence[Grid], missing_calls: int = 0
    ) -> SparseMoeVlmVisualOutput:
        """Returns the features of patches `(num_patches, hidden_size)` and the tokens of each image."""
        config = self.config.vision_config
        deepstack: Sequence[torch.Tensor] | None = None
        kind = self.tower_inputs.kind
        if kind == "pixel_values":
            features = features_by_size(patches, grids, config, self._encode_size)
            for _ in range(missing_calls):
                # All processes gather sharded weights together, as often as the process with the most sizes.
                features = features + (0.0 * self._encode_size(self._blank_images())).sum()
        elif kind == "spatial_shapes":
            inputs = padded_inputs(patches, grids, config)
            with loaded_embeddings(self.vision_tower):
                _, padded = self._run_tower(**inputs)
            features = padded[inputs["pixel_attention_mask"].bool().to(padded.device)]
        elif kind == "image_sizes":
            _, packed = self._run_tower(**sized_inputs(patches, grids, config))
            features = packed[0]
        else:
            features, deepstack = self._merged_features(*merged_inputs(patches, grids, config))
            side = merge_size_of(config)
            grids = [(rows // side, columns // side) for rows, columns in grids]
        numbers = [rows * columns // self.config.pixel_shuffle_factor**2 for rows, columns in grids]
        outputs = SparseMoeVlmVisualOutput(last_hidden_state=features)
        if deepstack is None:
            outputs.pooler_output = list(self.multi_modal_projector(features, grids).split(numbers))
        else:
            tokens, levels = self.multi_modal_projector(features, grids, deepstack)
            outputs.pooler_output = list(tokens.split(numbers))
            outputs.deepstack_features = [list(level.split(numbers)) for level in levels]
        return outputs

    def _encode_size(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the features of the patches of images of one size."""
        config = self.config.vision_config
        options = {"interpolate_pos_encoding": True} if self.tower_inputs.takes_interpolation else {}
        num_patches = (images.shape[2] // config.patch_size) * (images.shape[3] // config.patch_size)
        with loaded_embeddings(self.vision_tower):
            _, hidden_states = self._run_tower(images, **options)
        return patch_features(hidden_states, config, num_patches)

    def _merged_features(
        self, patches: torch.Tensor, grid_thw: torch.Tensor
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor] | None]:
        """
        Returns the features of squares of patches that the vision tower has merged, and its DeepStack features if the
        model reads them.
        """
        outputs = self.vision_tower(patches, grid_thw=grid_thw, return_dict=True)
        features = outputs.pooler_output
        if self.config.use_deepstack:
            return features, outputs.deepstack_features
        if self.training and is_one_of_several_processes():
            # Data parallelism waits for the gradients of the mergers of earlier layers (DeepStack), which are not used.
            for unused in outputs.get("deepstack_features") or ():
                features = features + (0.0 * unused).sum().to(features)
        return features, None

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
                f"{kind} placeholder in the text, which the processor expands to {self._tokens_per_placeholder(kind)}."
            ),
        )
        return inputs_embeds.masked_scatter(is_placeholder.unsqueeze(-1), features)

    def deepstack_of(self, outputs: BaseModelOutputWithPooling, tokens: TokenModalities, kind: str) -> Deepstack:
        """
        Returns the DeepStack features of images or videos, for the decoder.

        Args:
            outputs ([`~transformers.modeling_outputs.BaseModelOutputWithPooling`]):
                What `get_image_features` or `get_video_features` returned.
            tokens ([`~token_modalities.TokenModalities`]):
                The modalities of the tokens.
            kind (`str`):
                `"image"` or `"video"`.

        Raises:
            ValueError: If the outputs have no DeepStack features.
        """
        assert tokens.ids is not None
        levels = getattr(outputs, "deepstack_features", None)
        if levels is None:
            raise ValueError(
                f"`mm_encoder_outputs[{kind!r}]` has no `deepstack_features`, which the model reads "
                f"(`use_deepstack=True`): pass what `get_{kind}_features` returns."
            )
        return Deepstack(tokens.ids == BUILTIN_MODALITIES.index(kind), [join_image_tokens(level) for level in levels])

    def _tokens_per_placeholder(self, kind: str) -> str:
        if kind == "image" and self.config.image_sizing == "native":
            return "as many tokens as the size of the image needs"
        return f"{self.config.image_seq_length} tokens per {'tile' if kind == 'image' else 'frame'}"

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
        if self.config.image_sizing == "fixed":
            return self._encode_images(self._blank_images())[1]
        patches, grids = self._patches_of(self._blank_images())
        outputs = self._encode_patches(patches, grids, self._missing_calls(grids))
        levels = (outputs.pooler_output, *(outputs.deepstack_features or ()))
        return torch.cat([tokens for level in levels for tokens in level])

    def _blank_images(self) -> torch.Tensor:
        """Returns one black image: of the size of the vision tower, or of one token if images have native sizes."""
        config = self.config.vision_config
        if self.config.image_sizing == "fixed":
            side = config.image_size
        else:
            side = merge_size_of(config) * self.config.pixel_shuffle_factor * config.patch_size
        shape = (1, num_channels_of(config), side, side)
        return torch.zeros(shape, dtype=self.vision_tower.dtype, device=self.vision_tower.device)
