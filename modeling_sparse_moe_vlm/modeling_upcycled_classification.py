"""Upcycled models for sequence classification, such as reward models: a linear layer replaces the language head.

The class for a base model is created when it is first accessed, by its name: `UpcycledLlavaForSequenceClassification`
for the configuration `LlavaConfig`. Base models with images have such a class too, although Transformers itself has
classes for sequence classification almost only for language models.
"""

import inspect
import sys
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_upcycled import CLASSIFIER, PREFIX, models_of_type, upcycled_config_class
from .fused_head import unused_losses
from .modeling_upcycled import UpcycledMixin, forward_of, output_class, upcycled_model_class

logger = logging.get_logger(__name__)

# Auto classes of models with a language head, in the order in which they are tried.
_WITH_HEAD = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM")


class UpcycledClassificationMixin(GenericForSequenceClassification, UpcycledMixin):
    """
    Base class of the upcycled models for sequence classification. As in Transformers, the labels are scored from the
    hidden state of the last token that is not padding. They load from the checkpoint of an upcycled model with a
    language head: only the scoring layer is new.

    Router losses are not added to `loss`. For TRL's `RewardTrainer`, see `toolbox.training.RouterLossesMixin`.

    Args:
        config ([`~configuration_upcycled.UpcycledConfigMixin`]):
            Configuration of the upcycled model. `num_labels` is the number of scores, 1 for reward models.
    """

    tower_class: Any
    # Whether the model may still have to warn that its router losses have no effect.
    may_warn_of_losses: bool = True
    _tied_weights_keys = None

    def __init__(self, config):
        # Not the method of `UpcycledMixin`: the experts are in the submodel, which adds them itself.
        implementation, config._experts_implementation_internal = config._experts_implementation_internal, None
        PreTrainedModel.__init__(self, config)
        config._experts_implementation_internal = implementation
        self.num_labels = config.num_labels
        tower = self.tower_class(config)
        setattr(self, self.base_model_prefix, tower)
        self.score = nn.Linear(config.get_text_config().hidden_size, config.num_labels, bias=False)
        # Plain attributes, which replicas of the model also have.
        self.__dict__ |= {"experts_config": tower.experts_config, "routing_planner": tower.routing_planner}
        self.may_warn = tower.may_warn
        self.post_init()

    def dense_class(self) -> Any:
        """Returns the class of the base model with a language head, whose tensors have the same names."""
        return _class_with_head(self.config.base_model_type)

    def _plan(self, arguments, record):
        if self.training and torch.is_grad_enabled() and self.may_warn_of_losses and not torch.compiler.is_compiling():
            self.may_warn_of_losses = False
            warning = unused_losses(self.experts_config)
            if warning:
                logger.warning(warning)
        return super()._plan(arguments, record)


def _class_with_head(base_model_type: str) -> Any:
    models = models_of_type(base_model_type)
    return getattr(
        transformers, next(models[auto_class] for auto_class in (*_WITH_HEAD, "AutoModel") if auto_class in models)
    )


def classification_model_class(config_class: Any) -> Any:
    """
    Returns the class of the upcycled models for sequence classification of a base model.

    Args:
        config_class (`type`):
            Configuration class of the base model or of its upcycled models.

    Returns:
        `type`: A subclass of [`UpcycledClassificationMixin`], the same for every call.
    """
    base = next(kind for kind in config_class.__mro__ if kind.__module__.startswith("transformers."))
    return getattr(sys.modules[__name__], f"{PREFIX}{base.__name__.removesuffix('Config')}{CLASSIFIER}")


def _make_class(name: str, base_config: Any) -> type:
    base = getattr(transformers, models_of_type(base_config.model_type)["AutoModel"])
    pretrained = next(kind for kind in base.__mro__ if "PreTrainedModel" in kind.__name__)
    config_class = upcycled_config_class(base_config)
    namespace = {
        "__module__": __name__,
        "__doc__": f"[`~transformers.{base.__name__}`] with experts for sequence classification: see "
        "[`UpcycledClassificationMixin`].",
        "config_class": config_class,
        "tower_class": upcycled_model_class(base, config_class),
        "base_model_prefix": _class_with_head(base_config.model_type).base_model_prefix or "model",
        "forward": forward_of(
            GenericForSequenceClassification.forward, list(inspect.signature(base.forward).parameters.values())[1:]
        ),
    }
    made: Any = type(name, (UpcycledClassificationMixin, pretrained), namespace)
    made.register_for_auto_class("AutoModelForSequenceClassification")
    output_class(SequenceClassifierOutputWithPast)  # created now, because a traced forward pass cannot create classes
    return made


def __getattr__(name: str) -> Any:
    kind = name.removeprefix(PREFIX).removesuffix(CLASSIFIER)
    base_config: Any = getattr(transformers, f"{kind}Config", None) if name == f"{PREFIX}{kind}{CLASSIFIER}" else None
    if "AutoModel" not in models_of_type(getattr(base_config, "model_type", "")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _make_class(name, base_config))  # another thread may have been faster


__all__ = ["UpcycledClassificationMixin", "classification_model_class"]
