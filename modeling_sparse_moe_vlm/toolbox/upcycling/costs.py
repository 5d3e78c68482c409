"""What a model costs, dense and sparse: parameters, bytes and operations, from its configuration only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..meta_model import model_on_meta_device
from ..model_size import idle_parameters, model_size, short, text_modules

# Bytes of a weight, by type.
DTYPES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Costs:
    """
    What a model costs.

    Args:
        total (`int`): Number of parameters; tied ones count once.
        active (`dict[str, int]`): By modality, those that one token uses.
        bytes (`dict[str, int]`): By type, the size of all weights.
        flops_per_token (`dict[str, int]`):
            By modality, floating-point operations of the decoder and its head for one token: two for every weight of
            a matrix that the token is multiplied by. Attention scores, which grow with the length of the text, and
            encoders, which run once per image, are not in it; upcycling leaves both as they are.
    """

    total: int
    active: dict[str, int]
    bytes: dict[str, int]
    flops_per_token: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def costs_of(config: PreTrainedConfig | PreTrainedModel) -> Costs:
    """
    Works out what a model costs without making its weights.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`):
            Configuration of a dense or an upcycled model, or of any Transformers model; or the model itself, which may
            be on the meta device.

    Returns:
        [`Costs`]: by modality only where it is known what a token uses.

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
    A Markdown table of costs.

    Args:
        columns (`Mapping[str, Costs]`):
            By title of a column, what it shows.

    Returns:
        `str`: a row for every figure; "–" where a model does not have it.
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
    """Number of weights in matrices. Those of embeddings are left out, which are looked up, unless a head has them."""
    matrices = {parameter for module in modules for parameter in module.parameters() if parameter.dim() > 1}
    parts = [part for module in modules for part in module.modules()]
    looked_up = {part.weight for part in parts if isinstance(part, nn.Embedding)}
    multiplied = {part.weight for part in parts if isinstance(part, nn.Linear)}
    return sum(parameter.numel() for parameter in matrices - (looked_up - multiplied))
