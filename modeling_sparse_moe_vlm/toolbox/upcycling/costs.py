"""Costs of dense and sparse models, computed from their configurations: parameters, bytes and operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..meta_model import model_on_meta_device
from ..model_size import idle_parameters, model_size, short, text_modules

# Number of bytes of a weight, by type.
DTYPES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Costs:
    """
    Costs of a model.

    Args:
        total (`int`): Number of parameters; tied parameters count once.
        active (`dict[str, int]`): Number of parameters that one token uses, by modality.
        bytes (`dict[str, int]`): Size of all weights in bytes, by type.
        flops_per_token (`dict[str, int]`):
            Floating-point operations of the decoder and its head for one token, by modality: two for every weight of a
            matrix that the token is multiplied by. Attention scores and encoders are not counted, because upcycling
            does not change them.
    """

    total: int
    active: dict[str, int]
    bytes: dict[str, int]
    flops_per_token: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def costs_of(config: PreTrainedConfig | PreTrainedModel) -> Costs:
    """
    Computes the costs of a model without allocating its weights.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`):
            Configuration of any Transformers model or upcycled model, or the model itself, which may be on the meta
            device.

    Returns:
        [`Costs`]: The costs. Those by modality are empty if it is not known which experts a token uses.

    Raises:
        ValueError: If no auto class knows the configuration.
    """
    model = model_on_meta_device(config)
    size = model_size(model)
    matrices = _matrix_parameters(text_modules(model))
    idle = idle_parameters(model)
    return Costs(
        total=size.total,
        active=size.active,
        bytes={dtype: size.total * number for dtype, number in DTYPES.items()},
        flops_per_token={modality: 2 * (matrices - idle[modality]) for modality in size.active},
    )


def costs_table(columns: Mapping[str, Costs]) -> str:
    """
    Returns a Markdown table of costs.

    Args:
        columns (`Mapping[str, Costs]`):
            Costs by the title of their column.

    Returns:
        `str`: The table, with a row for every figure, and "–" for figures that a model does not have.
    """
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    modalities = list(dict.fromkeys(modality for costs in columns.values() for modality in costs.active))
    rows.append(["parameters", *(short(costs.total) for costs in columns.values())])
    for modality in modalities:
        rows.append([f"active per {modality} token", *_column(columns, "active", modality)])
    for dtype in DTYPES:
        rows.append([f"weights in {dtype}", *(f"{short(costs.bytes[dtype])}B" for costs in columns.values())])
    for modality in modalities:
        rows.append([f"FLOPs per {modality} token", *_column(columns, "flops_per_token", modality)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _column(columns: Mapping[str, Costs], field: str, modality: str) -> list[str]:
    figures = (getattr(costs, field).get(modality) for costs in columns.values())
    return ["–" if figure is None else short(figure) for figure in figures]


def _matrix_parameters(modules: Sequence[nn.Module]) -> int:
    """Counts the weights of matrices. Embeddings are not counted, unless a head shares them."""
    matrices = {parameter for module in modules for parameter in module.parameters() if parameter.dim() > 1}
    parts = [part for module in modules for part in module.modules()]
    looked_up = {part.weight for part in parts if isinstance(part, nn.Embedding)}
    multiplied = {part.weight for part in parts if isinstance(part, nn.Linear)}
    return sum(parameter.numel() for parameter in matrices - (looked_up - multiplied))
