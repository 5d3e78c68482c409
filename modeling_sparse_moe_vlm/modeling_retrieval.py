"""The sparse model for image-text retrieval: one decoder with experts embeds texts, images, and texts with images."""

from .configuration_retrieval import SparseMoeVlmRetrievalConfig
from .modeling_sparse_moe_vlm import SparseMoeVlmModel
from .pretrained import SparseMoeVlmPreTrainedModel
from .retrieval_head import ImageTextRetrievalMixin


class SparseMoeVlmForImageTextRetrieval(ImageTextRetrievalMixin, SparseMoeVlmPreTrainedModel):
    """
    The whole model with a head for retrieval. Texts and images go through the same decoder, and the hidden states are
    pooled and scaled to the length 1, so that the cosine similarity of two embeddings is their product.

    The weights of a [`SparseMoeVlmForConditionalGeneration`] can be loaded: `from_pretrained` initialises only the
    learned scale (and bias) of the loss. [`~toolbox.retrieval.to_retrieval`] does the same with a model in memory.

    Args:
        config ([`SparseMoeVlmRetrievalConfig`]):
            Configuration of the model.
        model ([`SparseMoeVlmModel`], *optional*):
            The model that computes the hidden states. By default, a new one is created.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> from modeling_sparse_moe_vlm.toolbox.retrieval import retrieval_inputs

    >>> model = AutoModel.from_pretrained("path/to/retrieval", trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained("path/to/retrieval", trust_remote_code=True)
    >>> texts = model.get_text_features(**retrieval_inputs(processor, ["a cat", "a dog"])).pooler_output
    >>> images = model.get_image_features(**retrieval_inputs(processor, [image])).pooler_output
    >>> scores = texts @ images.T
    ```
    """

    config: SparseMoeVlmRetrievalConfig

    def __init__(self, config: SparseMoeVlmRetrievalConfig, model: SparseMoeVlmModel | None = None):
        super().__init__(config)
        self.model = SparseMoeVlmModel(config) if model is None else model
        self.add_head()
        self.post_init()


SparseMoeVlmForImageTextRetrieval.register_for_auto_class("AutoModel")

__all__ = ["SparseMoeVlmForImageTextRetrieval"]
