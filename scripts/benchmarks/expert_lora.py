"""
Compares factored LoRA on experts with PEFT's implementation and with no adapter.

    python scripts/benchmarks/expert_lora.py --json

Four layers of Transformers' Qwen3-VL-MoE experts (hidden 1024, width 512, 32 experts, top-4, rank 8, float32; much
smaller with `--quick`), with uniformly random routing. `ours` is the factored adapter. The metric names the peer:

- `decode_vs_adapter_free`: decodes 16 tokens one by one; the peer is the same layers without an adapter
- `decode_vs_peft`: decodes one token; the peer is PEFT's layers
- `train_step_vs_adapter_free`: forward and backward over 512 tokens; the peer is the same layers without an adapter,
  with trained weights
- `train_step_vs_frozen`: the peer has frozen weights, so that its step only passes gradients on
- `train_step_vs_peft`: the peer is PEFT's layers
- `forward_vs_peft`: forward over these 512 tokens without gradients; the peer is PEFT's layers
- `extra_memory_vs_peft`, `forward_extra_memory_vs_peft`: peak memory (bytes) of the training step and of the forward,
  minus the peak memory of the same layers without an adapter and with frozen weights. Each variant runs in its own
  process

`--size large` is one layer of 128 experts (hidden 2048, width 768, top-8, rank 16, 4,096 tokens, bfloat16), for GPUs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import harness
import torch
from harness import Row, peak_memory, report, time_interleaved
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

from modeling_sparse_moe_vlm.toolbox.expert_lora import factor_expert_lora

VARIANTS = ("factored", "peft", "frozen", "trained")
DECODED = 16  # tokens per timed run
BARS = {
    "decode_vs_adapter_free": 1.15,
    "train_step_vs_adapter_free": 1.15,
    "train_step_vs_peft": 1 / 3,
    "extra_memory_vs_peft": 1 / 4,
}


@dataclass(frozen=True)
class Size:
    """Sizes of the experts, and the number of tokens of a training step."""

    hidden: int = 1024
    width: int = 512
    experts: int = 32
    top_k: int = 4
    layers: int = 4
    rank: int = 8
    tokens: int = 512
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.layers}×{self.experts}×{self.hidden}×{self.width} r{self.rank} {self.dtype}"


SIZES = {
    "tiny": Size(hidden=128, width=64, experts=8, layers=2, tokens=64),  # for `--quick`; the figures are not meaningful
    "small": Size(hidden=512, width=256, layers=2),
    "default": Size(),
    # The size of https://github.com/huggingface/peft/pull/3577: 2.56 ms and 1.30 GB on its author's H100.
    "large": Size(hidden=2048, width=768, experts=128, top_k=8, layers=1, rank=16, tokens=4096, dtype="bfloat16"),
}


class Layers(nn.Module):
    """A stack of experts layers. The routing is an argument of `forward`."""

    def __init__(self, size: Size, implementation: str):
        super().__init__()
        config = Qwen3VLMoeTextConfig(
            hidden_size=size.hidden,
            moe_intermediate_size=size.width,
            num_experts=size.experts,
            num_experts_per_tok=size.top_k,
        )
        config._experts_implementation = implementation
        self.layers = nn.ModuleList(Qwen3VLMoeTextExperts(config) for _ in range(size.layers))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = hidden_states + layer(hidden_states, index, weights)
        return hidden_states


def main() -> None:
    arguments = parse_arguments()
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments)))
        return
    size = SIZES[arguments.size]
    rows = []
    only_grouped = arguments.quick or arguments.size == "large"  # other implementations take minutes at such sizes
    for implementation in ("grouped_mm",) if only_grouped else ("grouped_mm", "batched_mm", "eager"):
        models = make_all(size, implementation, arguments.device)
        case = f"{size} {implementation}"
        for peer, peers, steps in (("adapter_free", "frozen", DECODED), ("peft", "peft", 1)):
            decoding = {name: decoder(models[name], size, steps, arguments.device) for name in ("factored", peers)}
            seconds = time_interleaved(decoding, arguments.device, arguments.repetitions)
            seconds = {name: total / steps for name, total in seconds.items()}
            rows += compare(case, "decode", seconds, {peer: peers})
        if implementation == "batched_mm":  # it copies an expert per token, so it is only for decoding
            continue
        seconds = time_interleaved(
            {name: trainer(model, size, arguments.device) for name, model in models.items()},
            arguments.device,
            arguments.repetitions,
        )
        rows += compare(case, "train_step", seconds, {"adapter_free": "trained", "frozen": "frozen", "peft": "peft"})
        forwards = {name: forward(models[name], size, arguments.device) for name in ("factored", "peft")}
        seconds = time_interleaved(forwards, arguments.device, arguments.repetitions)
        rows += compare(case, "forward", seconds, {"peft": "peft"})
        del models, forwards
    memory = {name: memory_in_process(name, arguments) for name in ("factored", "peft", "frozen")}
    for what, metric in (("train_step", "extra_memory_vs_peft"), ("forward", "forward_extra_memory_vs_peft")):
        ours, peer = (memory[name][what] - memory["frozen"][what] for name in ("factored", "peft"))
        rows.append(Row(f"{size} grouped_mm", metric, ours, peer, BARS.get(metric)))
    report("expert_lora", arguments, rows)


def compare(case: str, what: str, seconds: dict[str, float], peers: dict[str, str]) -> list[Row]:
    return [
        Row(case, f"{what}_vs_{name}", seconds["factored"], seconds[peer], BARS.get(f"{what}_vs_{name}"))
        for name, peer in peers.items()
    ]


def make_all(size: Size, implementation: str, device: str) -> dict[str, nn.Module]:
    """Creates all variants. They share their weights, except `trained`, which has its own."""
    shared, own = (make_layers(size, implementation, device) for _ in range(2))
    return {name: make(name, size, implementation, device, own if name == "trained" else shared) for name in VARIANTS}


def make_layers(size: Size, implementation: str, device: str) -> Layers:
    torch.manual_seed(0)
    return Layers(size, implementation).to(device, getattr(torch, size.dtype))


def make(variant: str, size: Size, implementation: str, device: str, base: Layers) -> nn.Module:
    if variant in ("frozen", "trained"):
        return base.requires_grad_(variant == "trained")
    with torch.device("meta"):
        model = Layers(size, implementation)
    model.load_state_dict(base.state_dict(), assign=True)
    targets = [f"layers.{layer}.{stack}" for layer in range(size.layers) for stack in ("gate_up_proj", "down_proj")]
    model = get_peft_model(model, LoraConfig(r=size.rank, target_parameters=targets), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return factor_expert_lora(model) if variant == "factored" else model


def draw_tokens(num_tokens: int, size: Size, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws tokens, uniformly random experts for each of them, and the weights of these experts."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_tokens, size.hidden, generator=generator).to(device, getattr(torch, size.dtype))
    index = torch.rand(num_tokens, size.experts, generator=generator).topk(size.top_k).indices.to(device)
    return hidden, index, torch.full((num_tokens, size.top_k), 1 / size.top_k, device=device, dtype=hidden.dtype)


def decoder(model: nn.Module, size: Size, steps: int, device: str) -> Callable[[], None]:
    """Returns a function that decodes tokens one by one, without gradients."""
    tokens = list(zip(*(tensor.split(1) for tensor in draw_tokens(steps, size, device))))

    @torch.no_grad()
    def decode() -> None:
        for token in tokens:
            model(*token)

    return decode


def trainer(model: nn.Module, size: Size, device: str) -> Callable[[], None]:
    """Returns a function that runs a forward and a backward pass."""
    hidden, index, weights = draw_tokens(size.tokens, size, device)
    hidden.requires_grad_()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        hidden.grad = None
        model(hidden, index, weights).square().mean().backward()

    return step


def forward(model: nn.Module, size: Size, device: str) -> Callable[[], None]:
    """Returns a function that runs a forward pass without gradients, over as many tokens as a training step."""
    tokens = draw_tokens(size.tokens, size, device)

    @torch.no_grad()
    def run() -> None:
        model(*tokens)

    return run


def memory_in_process(variant: str, arguments: argparse.Namespace) -> dict[str, int]:
    command = [sys.executable, __file__, "--memory-of", variant, "--size", arguments.size, "--device", arguments.device]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure_memory(arguments: argparse.Namespace) -> dict[str, int]:
    """Measures the peak memory of a variant, in bytes, in forward passes and in training steps."""
    size = SIZES[arguments.size]
    base = make_layers(size, "grouped_mm", arguments.device)
    model = make(arguments.memory_of, size, "grouped_mm", arguments.device, base)
    measured = {}
    for what, make_run in (("forward", forward), ("train_step", trainer)):
        run = make_run(model, size, arguments.device)
        measured[what] = peak_memory(lambda run=run: [run() for _ in range(3)], arguments.device)
    return measured


def parse_arguments() -> argparse.Namespace:
    arguments = harness.parse_arguments(
        __doc__,
        repetitions=9,
        size={"choices": SIZES, "help": "sizes of the experts"},
        memory_of={"choices": VARIANTS, "help": argparse.SUPPRESS},
    )
    arguments.size = arguments.size or ("tiny" if arguments.quick else "default")
    return arguments


if __name__ == "__main__":
    main()
