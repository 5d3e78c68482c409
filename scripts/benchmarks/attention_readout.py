"""
Distributed attention against plain SDPA, for one layer: what reading α and β out, learning priors and guidance cost.

    python scripts/benchmarks/attention_readout.py --json

The sequence is text (1/8), a picture (1/2), text; its rows share that layout, and nothing is padded. On the CPU runs of
one modality are attended part by part, elsewhere the weights ride in extra channels of the backend's own call.

- `forward_with_readout`: forward, returning the weights and the count-free weights;
- `train_step_with_priors`: forward and backward, with learned priors by head;
- `decode_with_readout`: one query after that many keys, returning the weights, through 8 layers, since what a forward
  pass does once is not small beside one layer with one query;
- `guidance`: forward with `modality_guidance`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Row, parse_arguments, report, time_interleaved
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_sparse_moe_vlm.attention_plan import AttentionParts, visible_counts
from modeling_sparse_moe_vlm.attention_runs import find_runs

HEADS, HEAD_DIM, NUM_MODALITIES = 16, 64, 2
BARS = {"forward_with_readout": 1.15, "train_step_with_priors": 1.15, "decode_with_readout": 1.1, "guidance": 1.2}
BARS_FROM = 1024  # tokens
DECODED_LAYERS = 8
SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]


class Layer(torch.nn.Module):
    """What attention functions ask of an attention module."""

    num_key_value_groups = 1
    is_causal = True


def main() -> None:
    arguments = parse_arguments(__doc__)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    rows: list[Row] = []
    for length in (256, 1024) if arguments.quick else (256, 1024, 2048, 4096):
        for metric, (ours, plain) in make_runs(length, arguments.device, dtype).items():
            seconds = time_interleaved({"ours": ours, "plain": plain}, arguments.device, arguments.repetitions)
            case = f"1 × {HEADS} heads × {length} × {HEAD_DIM}, {str(dtype).removeprefix('torch.')}"
            bar = BARS[metric] if length >= BARS_FROM else None
            rows.append(Row(case, metric, seconds["ours"], seconds["plain"], bar))
    report("attention_readout", arguments.device, rows, arguments.json)


def make_runs(length: int, device: str, dtype: torch.dtype) -> dict[str, tuple[Callable, Callable]]:
    """By metric, our run and the plain one."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(3)
    )
    log_priors = torch.randn(HEADS, NUM_MODALITIES, generator=generator).to(device).requires_grad_()
    direction = torch.randn(1, length, HEADS, HEAD_DIM, generator=generator).to(device, dtype)
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    ids[:, length // 8 : length // 8 + length // 2] = 1
    runs = find_runs(ids) if device == "cpu" else None
    layer, options = Layer(), {"scaling": HEAD_DIM**-0.5}

    def attend(
        parts: AttentionParts, query: torch.Tensor, log_priors: torch.Tensor | None = None, num_layers: int = 1
    ) -> torch.Tensor:
        parts.weights.clear()
        parts.rows.clear()
        for _ in range(num_layers):
            output = parts.attend(SDPA, layer, query, key, value, None, log_priors, **options).output
        parts.read_out()
        return output

    def plain(query: torch.Tensor, num_layers: int = 1) -> torch.Tensor:
        for _ in range(num_layers):
            output = SDPA(layer, query, key, value, None, **options)[0]
        return output

    def train_step(output: torch.Tensor) -> None:
        (output * direction).sum().backward()
        for tensor in (query, key, value, log_priors):
            tensor.grad = None

    reading = AttentionParts(ids, NUM_MODALITIES, runs=runs, counts=visible_counts(None, ids, length, NUM_MODALITIES))
    learning = AttentionParts(ids, NUM_MODALITIES, runs=runs)
    guiding = AttentionParts(ids, NUM_MODALITIES, runs=runs, guidance=0.5)
    decoding = AttentionParts(ids, NUM_MODALITIES, counts=visible_counts(None, ids, 1, NUM_MODALITIES), keeps_rows=True)
    last = query[:, :, -1:]
    return {
        "forward_with_readout": (
            torch.no_grad()(lambda: attend(reading, query)),
            torch.no_grad()(lambda: plain(query)),
        ),
        "train_step_with_priors": (
            lambda: train_step(attend(learning, query, log_priors)),
            lambda: train_step(plain(query)),
        ),
        "decode_with_readout": (
            torch.no_grad()(lambda: attend(decoding, last, num_layers=DECODED_LAYERS)),
            torch.no_grad()(lambda: plain(last, num_layers=DECODED_LAYERS)),
        ),
        "guidance": (torch.no_grad()(lambda: attend(guiding, query)), torch.no_grad()(lambda: plain(query))),
    }


if __name__ == "__main__":
    main()
