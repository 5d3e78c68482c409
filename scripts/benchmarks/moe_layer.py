"""
Compares one sparse block with the block of Transformers' Qwen3-VL-MoE, in its fastest experts implementation.

    python scripts/benchmarks/moe_layer.py --json

On a GPU: 128 experts, hidden size 2048, width 768, 8 experts per token, 4,096 tokens, bfloat16. On the CPU: 32 experts,
hidden size 1024, width 512, 4 experts per token, 512 tokens, float32. `--quick` is much smaller. Our block runs with
`grouped_mm`, the default implementation of our models:

- `joint`: the same architecture with the peer's weights, so that the outputs are compared first
- `isolated`: half of the experts serve text and half images; half of the tokens are image tokens

The peer runs with every implementation that is available here. Those that need another package or GPU are skipped, and
their names are printed. `forward` is without gradients, `train_step` is forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Row, is_cuda, parse_arguments, report, time_interleaved
from torch import nn
from transformers import Qwen3VLMoeTextConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from modeling_sparse_moe_vlm import SparseMoeVlmTextConfig
from modeling_sparse_moe_vlm.experts import SparseMoeVlmSparseMoeBlock
from modeling_sparse_moe_vlm.routing import RoutingPlanner

OURS = ("joint", "isolated")
BAR = 1.0


@dataclass(frozen=True)
class Size:
    """Sizes of the block, and the number of tokens."""

    hidden: int
    width: int
    experts: int
    top_k: int
    tokens: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.experts}×{self.hidden}×{self.width} top-{self.top_k}, {self.tokens} tokens, {dtype}"

    def config(self) -> dict[str, int]:
        return {
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.width,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
        }


CPU = Size(hidden=1024, width=512, experts=32, top_k=4, tokens=512)
GPU = Size(hidden=2048, width=768, experts=128, top_k=8, tokens=4096, dtype=torch.bfloat16)
QUICK = Size(hidden=64, width=32, experts=8, top_k=2, tokens=64)


def main() -> None:
    arguments = parse_arguments(__doc__)
    device = arguments.device
    size = QUICK if arguments.quick else GPU if is_cuda(device) else CPU
    blocks, peers = build(size, device)
    hidden_states = torch.randn(1, size.tokens, size.hidden, generator=torch.Generator().manual_seed(1))
    hidden_states = hidden_states.to(device, size.dtype)
    check_equal(blocks["joint"], peers["grouped_mm"], hidden_states)

    usable = {name: peer for name, peer in peers.items() if is_usable(name, peer, hidden_states)}
    rows = []
    for metric, make_run in (("forward", forward), ("train_step", train_step)):
        runs = {name: make_run(block, hidden_states) for name, block in {**blocks, **usable}.items()}
        seconds = time_interleaved(runs, device, arguments.repetitions)
        best = min(usable, key=lambda name: seconds[name])
        print(f"{metric}: " + ", ".join(f"{name} {1000 * value:.3f} ms" for name, value in seconds.items()))
        for name in OURS:
            rows.append(Row(f"{name}, {size}, peer {best}", f"{metric}_vs_best", seconds[name], seconds[best], BAR))
    report("moe_layer", arguments, rows)


def build(size: Size, device: str) -> tuple[dict[str, Callable], dict[str, nn.Module]]:
    """Creates our blocks, by arrangement, and the peer's blocks, by implementation."""
    torch.manual_seed(0)
    config = Qwen3VLMoeTextConfig(**size.config())
    peers: dict[str, nn.Module] = {}
    for name in (
        "grouped_mm",
        *(other for other in ALL_EXPERTS_FUNCTIONS.valid_keys() if other != "grouped_mm"),
        "eager",
    ):
        own = copy.deepcopy(config)
        own._experts_implementation = name
        with torch.device("meta"):
            peers[name] = Qwen3VLMoeTextSparseMoeBlock(own)
    first = peers["grouped_mm"].to_empty(device="cpu")
    for parameter in first.parameters():
        nn.init.normal_(parameter, std=0.02)
    first.to(device, size.dtype)
    for peer in peers.values():
        peer.load_state_dict(first.state_dict(), assign=True)  # one copy of the weights for all
    return {name: Ours(size, name, device, first) for name in OURS}, peers


class Ours(nn.Module):
    """Our block, with the routing planned once, as the decoder does for all its layers."""

    def __init__(self, size: Size, arrangement: str, device: str, peer: nn.Module):
        super().__init__()
        num_experts = size.experts if arrangement == "joint" else size.experts // 2
        sizes = size.config() | {"num_experts": num_experts, "expert_groups": arrangement}
        config = SparseMoeVlmTextConfig(**sizes)
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            self.block = SparseMoeVlmSparseMoeBlock(config, layer_idx=0)
        if arrangement == "joint":
            self.block.load_state_dict(peer.state_dict(), assign=True)
        else:
            self.block.to_empty(device="cpu")
            for parameter in self.block.parameters():
                nn.init.normal_(parameter, std=0.02)
            self.block.to(device, size.dtype)
        is_image = (torch.arange(size.tokens, device=device) < size.tokens // 2).long()[None]
        self.plan = RoutingPlanner(config)(is_image, torch.device(device))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.block(hidden_states, self.plan)


def output_of(block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    output = block(hidden_states)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def check_equal(joint: nn.Module, peer: nn.Module, hidden_states: torch.Tensor) -> None:
    """
    Checks that the joint arrangement has the outputs of the peer with the same weights. In bfloat16, router logits are
    often equal, and both choices are right: three quarters of the tokens must agree.
    """
    ours, theirs = (output_of(block, hidden_states).float() for block in (joint, peer))
    differences = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).flatten()
    tolerance, share = (1e-5, 1.0) if hidden_states.dtype == torch.float32 else (2e-2, 0.75)
    if not differences.quantile(share) < tolerance:
        raise AssertionError(f"outputs differ by up to {differences.max():.1e}: the comparison would be unfair.")


def is_usable(name: str, peer: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether forward and backward of an implementation run here. Prints the reason if they do not."""
    try:
        train_step(peer, hidden_states)()
    except Exception as error:
        print(f"{name} is not available here: {str(error).splitlines()[0] if str(error) else repr(error)}")
        return False
    return True


def forward(block: nn.Module, hidden_states: torch.Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        block(hidden_states)

    return run


def train_step(block: nn.Module, hidden_states: torch.Tensor) -> Callable[[], None]:
    inputs = hidden_states.clone().requires_grad_()

    def run() -> None:
        block.zero_grad(set_to_none=True)
        inputs.grad = None
        output_of(block, inputs).square().mean().backward()

    return run


if __name__ == "__main__":
    main()
