"""Makes upcycled models run the code of this installed package instead of the code in their checkpoint."""

from __future__ import annotations

import os
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .. import modeling_upcycled, modeling_upcycled_classification
from ..configuration_upcycled import PREFIX, UpcycledConfigMixin, auto_map_of, upcycled_config_class
from ..configuration_upcycled_retrieval import TYPE_SUFFIX, UpcycledRetrievalConfigMixin, retrieval_config_class
from ..modeling_upcycled_retrieval import retrieval_model_class
from .model_names import check_model_name

# Prefix of the model types of upcycled models.
TYPE_PREFIX = f"{PREFIX.lower()}_"
# Modules of the model classes, by their names in `auto_map`.
_MODULES = {
    module.__name__.rpartition(".")[2]: module for module in (modeling_upcycled, modeling_upcycled_classification)
}


def use_installed_code(checkpoint: str | os.PathLike) -> None:
    """
    Makes the auto classes run this package's code for a checkpoint of an upcycled model. Other checkpoints are not
    affected: the package's own model types are registered when it is imported.

    Args:
        checkpoint (`str` or `os.PathLike`):
            Folder of the checkpoint, path to its configuration file, or its name on the Hub.

    Raises:
        FileNotFoundError: If there is no such checkpoint (see [`~toolbox.model_names.check_model_name`]).
    """
    check_model_name(checkpoint)
    model_type = PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type", "")
    if not model_type.startswith(TYPE_PREFIX):
        return
    base_type = model_type.removeprefix(TYPE_PREFIX)
    if base_type in CONFIG_MAPPING:
        register(upcycled_config_class(CONFIG_MAPPING[base_type]))
    else:
        register(retrieval_config_class(CONFIG_MAPPING[base_type.removesuffix(TYPE_SUFFIX)]))


def register(config_class: Any) -> None:
    """Registers a configuration class with the auto classes if it is the class of an upcycled model."""
    if not issubclass(config_class, UpcycledConfigMixin):
        return
    if issubclass(config_class, UpcycledRetrievalConfigMixin):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, retrieval_model_class(config_class), exist_ok=True)
        return
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, path in auto_map_of(config_class).items():
        if auto_class != AutoConfig.__name__:
            module, _, name = path.rpartition(".")
            model_class = getattr(_MODULES[module], name)
            getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)
