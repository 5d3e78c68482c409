"""Configuration of models for image-text retrieval."""

from __future__ import annotations

from .versions import SUPPORTED_TRANSFORMERS  # noqa: F401

# isort: split

from typing import TYPE_CHECKING

from .checks import check
from .configuration_sparse_moe_vlm import SparseMoeVlmConfig
from .parameters import count_parameters
from .retrieval_config import RetrievalConfigMixin

if TYPE_CHECKING:
    # Named here so that Transformers copies and hashes all files of the model along with this file.
    from .contrastive import contrastive_loss  # noqa: F401
    from .modeling_retrieval import SparseMoeVlmForImageTextRetrieval  # noqa: F401
    from .retrieval_head import ImageTextRetrievalMixin  # noqa: F401
    from .sentence_transformers_files import write_files  # noqa: F401


class SparseMoeVlmRetrievalConfig(RetrievalConfigMixin, SparseMoeVlmConfig):
    r"""
    Configuration of [`SparseMoeVlmForImageTextRetrieval`]: the fields of [`SparseMoeVlmConfig`], and those of the head.

    Args:
        pooling (`str`, defaults to `"last_token"`):
            How the hidden states of a text or image become one embedding: `"last_token"` or `"mean"`.
        contrastive_loss (`str`, defaults to `"softmax"`):
            `"softmax"` (InfoNCE, as in CLIP) or `"sigmoid"` (as in SigLIP).
        matryoshka_dims (`list[int]`, *optional*):
            Sizes to which embeddings can be truncated. The loss is the mean of the losses at these sizes and at the
            full size. By default, only the full size is trained.
        logit_scale_init_value (`float`, *optional*):
            Initial value of the logarithm of the factor of the similarities in the loss. Defaults to log(1 / 0.07) for
            the softmax loss and to log(10) for the sigmoid loss.
        logit_bias_init_value (`float`, defaults to -10.0):
            Initial value of the bias of the sigmoid loss. The softmax loss has no bias.
        image_prompt_ids (`list[int]`, *optional*):
            Token ids of the prompt for an image that is given only as `pixel_values`, with all placeholders of the
            image. Defaults to the placeholders only. [`~toolbox.retrieval.to_retrieval`] takes the ids from the chat
            template. Empty if the number of tokens depends on the size of the image (tiles and native sizes); images
            then need `input_ids`.

    Raises:
        ValueError: If a field is invalid or fields contradict each other. The message names the field and the fix.

    ```python
    >>> from modeling_sparse_moe_vlm import SparseMoeVlmRetrievalConfig

    >>> config = SparseMoeVlmRetrievalConfig(matryoshka_dims=[64, 256])
    >>> config.trained_sizes
    [64, 256, 2048]
    ```
    """

    model_type = "sparse_moe_vlm_retrieval"
    tower_model_type = SparseMoeVlmConfig.model_type

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(RETRIEVAL_AUTO_MAP))
        super().__post_init__(**kwargs)
        self.check_head()
        is_fixed = self.image_sizing == "fixed"
        if self.image_prompt_ids is None:
            self.image_prompt_ids = [self.image_token_id] * self.image_seq_length if is_fixed else []
        num_places = self.image_prompt_ids.count(self.image_token_id)
        check(
            is_fixed or not self.image_prompt_ids,
            '`image_prompt_ids` must be empty with `image_sizing="native"`, because the number of tokens of an image '
            "depends on its size.",
        )
        check(
            num_places == self.image_seq_length or not self.image_prompt_ids,
            f"`image_prompt_ids` has {num_places} placeholders (id {self.image_token_id}), but an image has "
            f"{self.image_seq_length} tokens.",
        )

    def validate_architecture(self) -> None:
        """Checks the fields again when a model is created: see [`SparseMoeVlmExpertsConfig.validate_architecture`]."""
        super().validate_architecture()
        self.check_head()

    def num_parameters(self) -> int:
        """Returns the number of parameters of [`SparseMoeVlmForImageTextRetrieval`], without allocating weights."""
        return self._count("text")[0]

    def num_active_parameters(self, modality: str = "text") -> int:
        """
        Returns the number of parameters that one token of `modality` uses, as for
        [`SparseMoeVlmForConditionalGeneration`], but without a language head: see
        [`SparseMoeVlmConfig.num_active_parameters`].
        """
        return self._count(modality)[1]

    def _count(self, modality: str) -> tuple[int, int]:
        # Imported here, because that file imports this one.
        from .modeling_retrieval import SparseMoeVlmForImageTextRetrieval

        return count_parameters(self, modality, SparseMoeVlmForImageTextRetrieval)


RETRIEVAL_AUTO_MAP = {
    "AutoConfig": "configuration_retrieval.SparseMoeVlmRetrievalConfig",
    "AutoModel": "modeling_retrieval.SparseMoeVlmForImageTextRetrieval",
}

SparseMoeVlmRetrievalConfig.fields_of_loading = SparseMoeVlmConfig.fields_of_loading
SparseMoeVlmRetrievalConfig.register_for_auto_class()

__all__ = ["SparseMoeVlmRetrievalConfig"]
