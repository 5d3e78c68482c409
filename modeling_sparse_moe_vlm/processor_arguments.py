"""Keyword arguments of the processor. Transformers reads the annotations, so they must not be strings."""

from transformers.processing_utils import ImagesKwargs, ProcessingKwargs


class SparseMoeVlmImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    Keyword arguments for images, in addition to those of the image processor. The arguments of the same names of
    [`SparseMoeVlmProcessor`] are the default values.
    """

    min_tiles: int | None
    max_tiles: int | None
    min_image_tokens: int | None
    max_image_tokens: int | None


class SparseMoeVlmProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of [`SparseMoeVlmProcessor`] and their default values."""

    images_kwargs: SparseMoeVlmImagesKwargs

    _defaults = {"text_kwargs": {"padding": False, "return_mm_token_type_ids": True}}
