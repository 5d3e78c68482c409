"""The model card of an upcycled model: what it was made from, how, what it costs and how exact it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from ...experts_config import experts_config_of
from ...versions import SUPPORTED_TRANSFORMERS
from .costs import Costs, costs_table
from .receipt import ParityReceipt

_BODY = """---
{data}
---

# {name}

A sparse mixture of experts, made from the dense model {base} by upcycling: its feed-forward blocks became
experts, and everything else is the dense model's own, the processor included.

{costs}

| experts | |
| --- | --- |
{experts}

{parity}## Use

The code of the model lies beside its weights, so that only `transformers{supported}` is needed. Code from the Hub runs
on your machine: read it, and pin a revision.

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
```
"""


# By the auto class that loads a model, the task that the Hub lists it under; earlier ones are preferred.
_TASKS = {
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMultimodalLM": "any-to-any",
    "AutoModel": None,
}


def write_card(folder: Path, name: str, source: str, model: PreTrainedModel, dense: Costs, sparse: Costs) -> None:
    """
    Writes `README.md`.

    Args:
        folder (`Path`):
            Folder of the model.
        name (`str`):
            What the model is called.
        source (`str`):
            The dense model: a folder, or a name on the Hub.
        model (`PreTrainedModel`):
            The upcycled model, which may be on the meta device.
        dense ([`Costs`]), sparse ([`Costs`]):
            What the models cost.
    """
    config = experts_config_of(model.config)
    of_model = [key for key, place in model.config.auto_map.items() if place.endswith(f".{type(model).__name__}")]
    auto_class = next((key for key in _TASKS if key in of_model), "AutoModel")
    is_on_hub = not os.path.exists(source)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_TASKS[auto_class],
        base_model=source if is_on_hub else None,
        tags=["moe", "upcycled", "custom_code"],
    )
    rows = {
        "start": _start(config.start),
        "groups": ", ".join(_group(group) for group in config.expert_groups),
        "routed experts per token": config.num_experts_per_tok,
        "sparse layers": f"{len(config.sparse_layers)} of {config.num_hidden_layers}",
    }
    parity = config.start.get("parity")
    content = _BODY.format(
        data=data.to_yaml(),
        name=name,
        base=f"[{source}](https://huggingface.co/{source})" if is_on_hub else f"`{source}`",
        costs=costs_table({"dense": dense, "sparse": sparse}),
        experts="\n".join(f"| {title} | {value} |" for title, value in rows.items()),
        parity="" if parity is None else f"Before any training: {ParityReceipt(**parity)}.\n\n",
        supported=SUPPORTED_TRANSFORMERS,
        auto_class=auto_class,
    )
    (folder / "README.md").write_text(content, encoding="utf-8")


def _start(start: dict[str, Any]) -> str:
    """How the experts started, without what is measured."""
    details = {name: value for name, value in start.items() if name in ("granularity", "drop_ratio", "pool_start")}
    details = {name: value for name, value in details.items() if value != 1} | {
        "router rows": start["router_init"],
        "seed": start["seed"],
    }
    return f"{start['name']} ({', '.join(f'{name} {value}' for name, value in details.items())})"


def _group(group: dict[str, Any]) -> str:
    always_on = ", always on" if group["always_on"] else ""
    return f"{group['name']} ({group['num_experts']} × {group['intermediate_size']}{always_on})"
