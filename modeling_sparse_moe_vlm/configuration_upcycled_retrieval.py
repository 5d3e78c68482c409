"""Configurations of upcycled models for image-text retrieval.

The class for a base configuration is created when it is first accessed, by its name: `UpcycledLlavaRetrievalConfig` for
`LlavaConfig`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import transformers
from transformers.configuration_utils import PreTrainedConfig

from .configuration_upcycled import PREFIX, upcycled_config_class
from .retrieval_config import RetrievalConfigMixin

if TYPE_CHECKING:
    # Never executed. It makes Transformers copy and check these files when it loads the configuration.
    from .modeling_upcycled_retrieval import UpcycledRetrievalMixin  # noqa: F401

SUFFIX = "RetrievalConfig"
MODEL_SUFFIX = "ForImageTextRetrieval"
TYPE_SUFFIX = "_retrieval"


class UpcycledRetrievalConfigMixin(RetrievalConfigMixin):
    """
    Base class of the configurations of upcycled retrieval models, which adds the fields of
    [`~retrieval_config.RetrievalConfigMixin`] to the configuration of an upcycled model.
    """

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.check_head()

    def link_experts(self) -> None:
        """Same as in upcycled models, but `auto_map` names the retrieval model."""
        super().link_experts()  # type: ignore[misc]
        kind = type(self).__name__.removesuffix(SUFFIX)
        self.auto_map = {
            "AutoConfig": f"{__name__.rpartition('.')[2]}.{kind}{SUFFIX}",
            "AutoModel": f"modeling_upcycled_retrieval.{kind}{MODEL_SUFFIX}",
        }


def retrieval_config_class(base: type[PreTrainedConfig]) -> Any:
    """
    Returns the configuration class of the upcycled retrieval models of a base model.

    Args:
        base (`type[PreTrainedConfig]`):
            Configuration class of the base model. It must be exported by Transformers.

    Returns:
        `type`: A subclass of [`UpcycledRetrievalConfigMixin`], the same for every call.

    Raises:
        AttributeError: If Transformers does not export a configuration class with this name.
    """
    return getattr(sys.modules[__name__], f"{PREFIX}{base.__name__.removesuffix('Config')}{SUFFIX}")


def __getattr__(name: str) -> Any:
    kind = name.removeprefix(PREFIX).removesuffix(SUFFIX)
    base = getattr(transformers, f"{kind}Config", None) if name == f"{PREFIX}{kind}{SUFFIX}" else None
    if not (isinstance(base, type) and issubclass(base, PreTrainedConfig)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    tower = upcycled_config_class(base)
    namespace = {
        "__module__": __name__,
        "__doc__": f"Configuration of upcycled [`~transformers.{base.__name__}`] models for retrieval.",
        "model_type": tower.model_type + TYPE_SUFFIX,
        "tower_model_type": tower.model_type,
    }
    if not hasattr(tower.__init__, "__wrapped__"):
        namespace["__init__"] = tower.__init__  # otherwise, a generated `__init__` would hide the base's own
    made: Any = type(name, (UpcycledRetrievalConfigMixin, tower), namespace)
    made.register_for_auto_class()
    return globals().setdefault(name, made)  # another thread may have been faster


__all__ = ["UpcycledRetrievalConfigMixin", "retrieval_config_class"]
