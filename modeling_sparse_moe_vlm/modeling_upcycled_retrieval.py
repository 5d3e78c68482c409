"""Upcycled models for image-text retrieval: base models with experts and a retrieval head instead of the language head.

The class for a base model is created when it is first accessed, by its name: `UpcycledLlavaForImageTextRetrieval` for
the configuration `LlavaConfig`.
"""

import sys
from typing import Any

import transformers
from transformers.modeling_utils import PreTrainedModel

from .configuration_upcycled import PREFIX, models_of_type, upcycled_config_class
from .configuration_upcycled_retrieval import MODEL_SUFFIX, retrieval_config_class
from .modeling_upcycled import UpcycledMixin, upcycled_model_class
from .retrieval_head import ImageTextRetrievalMixin

# Auto classes of models with a language head, in the order in which they are tried.
_WITH_HEAD = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM")


class UpcycledRetrievalMixin(ImageTextRetrievalMixin, UpcycledMixin):
    """
    Base class of the upcycled retrieval models.

    Args:
        config ([`~configuration_upcycled_retrieval.UpcycledRetrievalConfigMixin`]):
            Configuration of the model.
        model (`PreTrainedModel`, *optional*):
            The upcycled model without a language head that computes the hidden states. By default, a new one is
            created.
    """

    tower_class: Any
    base_model_prefix = "model"
    _tied_weights_keys = None

    def __init__(self, config, model=None):
        # Not the method of `UpcycledMixin`: the experts are in `model`, which adds them itself.
        implementation, config._experts_implementation_internal = config._experts_implementation_internal, None
        PreTrainedModel.__init__(self, config)
        config._experts_implementation_internal = implementation
        self.model = self.tower_class(config) if model is None else model
        self.add_head()
        self.post_init()

    def dense_class(self) -> Any:
        """Returns the class of the base model with a language head, whose tensors have the same names."""
        models = models_of_type(self.config.base_model_type)
        name = next(models[auto_class] for auto_class in (*_WITH_HEAD, "AutoModel") if auto_class in models)
        return getattr(transformers, name)

    def _placeholders(self) -> list[int]:
        placeholders = self.config.experts_config.placeholders
        return [token_id for ids in placeholders.values() for token_id in ids]


def retrieval_model_class(config_class: Any) -> Any:
    """
    Returns the class of the upcycled retrieval models of a base model.

    Args:
        config_class (`type`):
            Configuration class of the base model, of its upcycled models or of its upcycled retrieval models.

    Returns:
        `type`: A subclass of [`UpcycledRetrievalMixin`], the same for every call.
    """
    base = next(kind for kind in config_class.__mro__ if kind.__module__.startswith("transformers."))
    return getattr(sys.modules[__name__], f"{PREFIX}{base.__name__.removesuffix('Config')}{MODEL_SUFFIX}")


def __getattr__(name: str) -> Any:
    kind = name.removeprefix(PREFIX).removesuffix(MODEL_SUFFIX)
    base_config: Any = getattr(transformers, f"{kind}Config", None) if name == f"{PREFIX}{kind}{MODEL_SUFFIX}" else None
    of_type = models_of_type(base_config.model_type) if hasattr(base_config, "model_type") else {}
    if "AutoModel" not in of_type:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(transformers, of_type["AutoModel"])
    pretrained = next(kind for kind in base.__mro__ if "PreTrainedModel" in kind.__name__)
    namespace = {
        "__module__": __name__,
        "__doc__": f"[`~transformers.{base.__name__}`] with experts for retrieval: see [`UpcycledRetrievalMixin`].",
        "config_class": retrieval_config_class(base_config),
        "tower_class": upcycled_model_class(base, upcycled_config_class(base_config)),
    }
    made: Any = type(name, (UpcycledRetrievalMixin, pretrained), namespace)
    made.register_for_auto_class("AutoModel")
    return globals().setdefault(name, made)  # another thread may have been faster


__all__ = ["UpcycledRetrievalMixin", "retrieval_model_class"]
