"""
Compares distributed attention with plain SDPA. Measures the cost of reading out α and β, of learned priors and of
guidance in one layer, and the cost of the read-out in `generate` with a whole model.

    python scripts/benchmarks/attention_readout.py --json

The sequence is text (1/8), an image (1/2) and text. All rows have this layout, without padding. On the CPU, runs of one
modality are attended part by part. On a GPU, extra channels in the backend's own call compute the weights. On a GPU,
everything runs in bfloat16 and is measured twice: with the kernel that torch chooses, and with FlashAttention.

- `forward_with_readout`: forward that returns the weights and the count-free weights
- `train_step_with_priors`: forward and backward with learned priors per head
- `decode_with_readout`: one query after that many keys, returning the weights. It runs through 8 layers, because the
  work that is done once per forward pass would be too large a part of one layer with one query
- `guidance`: forward with `modality_guidance`
- `generate_with_readout`: seconds per token of `generate` with and without `output_modality_weights`, for the `small`
  preset after a prompt with an image. `--quick` uses `tiny`, without a bar, because fixed costs are a larger part of so
  small a model. Tokens per second are printed as well
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from harness import Row, is_cuda, parse_arguments, report, time_interleaved
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.attention_parts import AttentionParts, RowParts, RunParts
from modeling_sparse_moe_vlm.attention_runs import find_runs
from modeling_sparse_moe_vlm.toolbox.training.models import load_config
from modeling_sparse_moe_vlm.visible_keys import visible_counts

HEADS, HEAD_DIM, NUM_MODALITIES = 16, 64, 2
BARS = {"forward_with_readout": 1.15, "train_step_with_priors": 1.15, "decode_with_readout": 1.1, "guidance": 1.2}
BARS_FROM = 1024  # tokens
GENERATE_BAR = 1.05
DECODED_LAYERS = 8
PROMPT_TEXT = 128
SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]


class Layer(torch.nn.Module):
    """The attributes of an attention module that attention functions read."""

    num_key_value_groups = 1
    is_causal = True


def main() -> None:
    arguments = parse_arguments(__doc__)
    on_gpu = is_cuda(arguments.device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows: list[Row] = []
    lengths = (32, 64) if arguments.quick else (256, 1024, 2048, 4096, 8192) if on_gpu else (256, 1024, 2048, 4096)
    for length in lengths:
        for metric, (ours, plain) in make_runs(length, arguments.device, dtype).items():
            for kernel, context in kernels(arguments.device).items():
                with context:
                    seconds = time_interleaved({"ours": ours, "plain": plain}, arguments.device, arguments.repetitions)
                case = f"1 × {HEADS} heads × {length} × {HEAD_DIM}, {str(dtype).removeprefix('torch.')}{kernel}"
                bar = BARS[metric] if length >= BARS_FROM else None
                rows.append(Row(case, metric, seconds["ours"], seconds["plain"], bar))
    preset, new_tokens = ("tiny", 4) if arguments.quick else ("small", 32)
    rows.append(time_generation(preset, new_tokens, arguments.device, dtype, arguments.repetitions))
    report("attention_readout", arguments, rows)


def kernels(device: str) -> dict[str, AbstractContextManager]:
    """Returns contexts that choose the kernel of SDPA, by the suffix that the name of a case gets."""
    return {"": nullcontext()} | ({", flash": sdpa_kernel(SDPBackend.FLASH_ATTENTION)} if is_cuda(device) else {})


def time_generation(preset: str, new_tokens: int, device: str, dtype: torch.dtype, repetitions: int) -> Row:
    """Measures the seconds per generated token, including the prefill, with and without the read-out."""
    torch.manual_seed(0)
    config = load_config(preset)
    model = SparseMoeVlmForConditionalGeneration._from_config(config).to(device, dtype).eval()
    size = config.vision_config.image_size
    input_ids = torch.full((1, PROMPT_TEXT + config.image_seq_length), 5)
    input_ids[:, 8 : 8 + config.image_seq_length] = config.image_token_id
    inputs = {
        "input_ids": input_ids.to(device),
        "attention_mask": torch.ones_like(input_ids).to(device),
        "pixel_values": torch.randn(1, 3, size, size).to(device, dtype),
    }
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    runs = {
        "ours": lambda: model.generate(**inputs, **options, output_modality_weights=True),
        "plain": lambda: model.generate(**inputs, **options),
    }
    ours, plain = (run().sequences for run in runs.values())
    if dtype == torch.float32 and not torch.equal(ours, plain):  # in half precision, rounding can change a token
        raise AssertionError("the read-out has changed the tokens: the comparison would be unfair.")
    seconds = {name: value / new_tokens for name, value in time_interleaved(runs, device, repetitions).items()}
    print(", ".join(f"{name}: {1 / value:.1f} tokens/s" for name, value in seconds.items()))
    case = f"{preset}, {new_tokens} tokens after {input_ids.shape[1]}, {str(dtype).removeprefix('torch.')}"
    bar = GENERATE_BAR if preset == "small" else None
    return Row(case, "generate_with_readout", seconds["ours"], seconds["plain"], bar)


def make_runs(length: int, device: str, dtype: torch.dtype) -> dict[str, tuple[Callable, Callable]]:
    """Returns our run and the plain run, by metric."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(3)
    )
    log_priors = torch.randn(HEADS, NUM_MODALITIES, generator=generator).to(device).requires_grad_()
    direction = torch.randn(1, length, HEADS, HEAD_DIM, generator=generator).to(device, dtype)
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    ids[:, length // 8 : length // 8 + length // 2] = 1
    layer, options = Layer(), {"scaling": HEAD_DIM**-0.5}

    def attend(
        parts: AttentionParts, query: torch.Tensor, log_priors: torch.Tensor | None = None, num_layers: int = 1
    ) -> torch.Tensor:
        parts.weights.clear()
        if isinstance(parts, RowParts):
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

    form = partial(AttentionParts, ids, NUM_MODALITIES)
    if not is_cuda(device):
        runs = find_runs(ids)
        assert runs is not None
        form = partial(RunParts, ids, NUM_MODALITIES, runs=runs)
    reading = form(counts=visible_counts(None, ids, length, NUM_MODALITIES))
    learning = form()
    guiding = form(guidance=0.5)
    decoding = RowParts(ids, NUM_MODALITIES, counts=visible_counts(None, ids, 1, NUM_MODALITIES), keeps_rows=True)
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
