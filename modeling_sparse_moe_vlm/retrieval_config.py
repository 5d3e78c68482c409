"""The configuration of the head of retrieval models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from .checks import check, check_choice, check_distinct, check_integer, check_number, check_sequence
from .experts_config import Given

POOLINGS = ("last_token", "mean")
CONTRASTIVE_LOSSES = ("softmax", "sigmoid")
# Initial values of the learned scale: 1 / 0.07 as in CLIP, and 10 as in SigLIP.
_INITIAL_SCALES = {"softmax": math.log(1 / 0.07), "sigmoid": math.log(10.0)}


@dataclass(kw_only=True)
class RetrievalConfigMixin:
    """
    Base class of the configurations of retrieval models, which adds the fields of the head to the configuration of the
    model that computes the hidden states.

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
            image. [`~toolbox.retrieval.to_retrieval`] takes them from the chat template.

    Raises:
        ValueError: If a field is invalid. The message names the field and what is expected.
    """

    # Model type of the configuration without the fields of the head.
    tower_model_type: ClassVar[str]

    pooling: str = "last_token"
    contrastive_loss: str = "softmax"
    matryoshka_dims: list[int] | Given = None
    logit_scale_init_value: float | None = None
    logit_bias_init_value: float = -10.0
    image_prompt_ids: list[int] | Given = None

    def check_head(self) -> None:
        """Checks the fields of the head, and fills in those that were left out."""
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("contrastive_loss", self.contrastive_loss, CONTRASTIVE_LOSSES)
        self.matryoshka_dims = [] if self.matryoshka_dims is None else self.matryoshka_dims
        check_sequence("matryoshka_dims", self.matryoshka_dims, int)
        for size in self.matryoshka_dims:
            check_integer("matryoshka_dims", size, below=self.full_embedding_size + 1)
        check_distinct("matryoshka_dims", self.matryoshka_dims)
        self.matryoshka_dims = list(self.matryoshka_dims)
        check_number("logit_scale_init_value", self.initial_logit_scale, at_most=math.log(100.0))
        check(
            isinstance(self.logit_bias_init_value, int | float) and math.isfinite(self.logit_bias_init_value),
            f"`logit_bias_init_value` must be a number, got {self.logit_bias_init_value!r}.",
        )
        if self.image_prompt_ids is not None:
            check_sequence("image_prompt_ids", self.image_prompt_ids, int, at_most=1_000_000)
            self.image_prompt_ids = list(self.image_prompt_ids)

    @property
    def initial_logit_scale(self) -> float:
        """Initial value of the logarithm of the factor of the similarities."""
        # Not filled in by `check_head`, because `from_pretrained` can change the loss afterwards.
        given = self.logit_scale_init_value
        return _INITIAL_SCALES[self.contrastive_loss] if given is None else given

    @property
    def full_embedding_size(self) -> int:
        """Size of embeddings that are not truncated."""
        return self.get_text_config().hidden_size  # type: ignore[attr-defined]

    @property
    def trained_sizes(self) -> list[int]:
        """Sizes at which the loss is computed: the Matryoshka sizes and the full size, in ascending order."""
        return sorted({*(self.matryoshka_dims or []), self.full_embedding_size})

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """Same as in Transformers, but the configuration of a model without the head can be read as well."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        if config_dict.get("model_type") == cls.tower_model_type:
            others = ("auto_map", "architectures")
            kept = {name: value for name, value in config_dict.items() if name not in others}
            config_dict = kept | {"model_type": cls.model_type}  # type: ignore[attr-defined]
        return config_dict, kwargs
