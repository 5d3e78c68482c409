"""The files from which sentence-transformers loads a retrieval model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# The model itself pools and normalises, so that there is only one definition of an embedding.
_EMBEDDINGS: dict[str, Any] = {"method": "forward", "method_output_name": "embeddings"}
_FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            # Texts and images are also converted to messages, so that each has only one embedding.
            "text": _EMBEDDINGS,
            "image": _EMBEDDINGS,
            "image+text": _EMBEDDINGS,
            "message": _EMBEDDINGS | {"format": "structured"},
        },
        "module_output_name": "sentence_embedding",
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}


def write_files(folder: str | os.PathLike) -> None:
    """
    Writes the files from which sentence-transformers (6.0 or later) loads a retrieval model. Existing files are kept,
    because they can contain the prompts of a user.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of the model. It is created if it does not exist.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in _FILES.items():
        path = Path(folder) / name
        if not path.exists():
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
