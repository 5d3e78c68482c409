"""The model `sparse_moe_vlm` of lmms-eval."""

from typing import Any


def manifest() -> Any:
    """
    Describes the model to lmms-eval, which calls this entry point while it is imported. lmms-eval imports the class of
    the model when a run names it.

    Returns:
        `ModelManifest`: The name of the model and the path to its class.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("sparse_moe_vlm", chat_class_path=f"{__name__}.model.SparseMoeVlm")


__all__ = ["manifest"]
