"""
Compares the speed of the decoder with Transformers' Qwen3-VL-MoE text model and with a dense model.

    python scripts/benchmarks/throughput.py --json

The models have the same sizes, the same backends (SDPA, grouped_mm), and equally many parameters, both in total and
active per token. They run in turn:

- `joint`: the same architecture as the peer, with the peer's weights, so that the outputs are compared first
- `hybrid`: our default, in which one of the k experts of a token is always on for its modality; half of the tokens are
  image tokens

`dense_floor` is a dense decoder with as many parameters as the others use per token. A training step is forward and
backward: the optimizer's step is the same for all models and would only bring the ratios closer to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from harness import Row, is_cuda, parse_arguments, report, time_interleaved
from transformers import DynamicCache
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

from modeling_sparse_moe_vlm import SparseMoeVlmTextConfig, SparseMoeVlmTextModel
from modeling_sparse_moe_vlm.cache_name import CACHE_NAME

PEER, FLOOR = "qwen3_vl_moe", "dense"
HEAD_DIM = 64
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Size:
    """Sizes of the decoders, and numbers of tokens."""

    hidden: int = 1024
    width: int = 512
    experts: int = 32
    top_k: int = 4
    layers: int = 4
    vocabulary: int = 8192
    prompt: int = 1024
    train_batch: tuple[int, int] = (4, 256)


# For `--quick`; the figures are not meaningful.
QUICK = Size(hidden=128, width=64, experts=8, layers=2, vocabulary=256, prompt=64, train_batch=(2, 32))


def main() -> None:
    arguments = parse_arguments(__doc__)
    size = QUICK if arguments.quick else Size()
    dtype = torch.bfloat16 if is_cuda(arguments.device) else torch.float32
    models = {name: model.to(arguments.device).eval() for name, model in build(size).items()}
    check_equal(models["joint"], models[PEER], arguments.device)  # in float32: rounding can change a token's experts
    models = {name: model.to(dtype) for name, model in models.items()}

    prompt, train_batch = size.prompt, size.train_batch
    rows: list[Row] = []
    for metric, case, make_run in (
        ("prefill", f"1 × {prompt} tokens", lambda model: prefill(model, prompt, arguments.device)),
        ("decode", f"1 token after {prompt}", lambda model: decode(model, prompt, arguments.device)),
        ("train_step", "{} × {} tokens".format(*train_batch), lambda m: train(m, train_batch, arguments.device)),
    ):
        seconds = time_interleaved(
            {name: make_run(model) for name, model in models.items()}, arguments.device, arguments.repetitions
        )
        for ours in ("joint", "hybrid"):
            label = f"{ours}, {case}, {str(dtype).removeprefix('torch.')}"
            rows.append(Row(label, f"{metric}_vs_{PEER}", seconds[ours], seconds[PEER], bar=1.0))
            rows.append(Row(label, f"{metric}_vs_dense_floor", seconds[ours], seconds[FLOOR]))
    report("throughput", arguments, rows)


def build(size: Size) -> dict[str, torch.nn.Module]:
    """Creates the models, by name."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // HEAD_DIM,
        "num_key_value_heads": size.hidden // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
    }
    experts = {"num_experts": size.experts, "num_experts_per_tok": size.top_k, "moe_intermediate_size": size.width}
    peer_rope = ROPE | {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
    peer = Qwen3VLMoeTextModel._from_config(
        Qwen3VLMoeTextConfig(**sizes, **experts, rope_parameters=peer_rope), experts_implementation="grouped_mm"
    )
    joint = ours(**sizes, **experts, expert_groups="joint")
    joint.load_state_dict(peer.state_dict())
    # Two experts become always-on experts, so that the totals agree. They replace one of the k experts of a token.
    fewer = experts | {"num_experts": size.experts - 2, "num_experts_per_tok": size.top_k - 1}
    hybrid = ours(**sizes, **fewer, expert_groups="hybrid")
    dense_width, dense_layers = size.top_k * size.width, list(range(size.layers))
    dense = ours(**sizes, **experts, intermediate_size=dense_width, mlp_only_layers=dense_layers)
    return {"joint": joint, "hybrid": hybrid, PEER: peer, FLOOR: dense}


def ours(**config) -> SparseMoeVlmTextModel:
    return SparseMoeVlmTextModel._from_config(
        SparseMoeVlmTextConfig(**config, rope_parameters=ROPE), experts_implementation="grouped_mm"
    )


def inputs(model: torch.nn.Module, batch_size: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Returns token ids and, for our models, modality ids: the first half is an image, the rest text."""
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(0, model.config.vocab_size, (batch_size, length), generator=generator).to(device)
    }
    if isinstance(model, SparseMoeVlmTextModel):
        batch["mm_token_type_ids"] = (torch.arange(length, device=device) < length // 2).long().repeat(batch_size, 1)
    return batch


@torch.no_grad()
def check_equal(joint: torch.nn.Module, peer: torch.nn.Module, device: str) -> None:
    """Checks that the joint arrangement has the outputs of the peer with the same weights."""
    ours, theirs = (model(**inputs(model, 2, 32, device)).last_hidden_state.float() for model in (joint, peer))
    if not torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4):
        raise AssertionError(f"outputs differ by {(ours - theirs).abs().max():.1e}: the comparison would be unfair.")


def prefill(model: torch.nn.Module, length: int, device: str):
    batch = inputs(model, 1, length, device)

    @torch.no_grad()
    def run():
        model(**batch, use_cache=True)

    return run


def decode(model: torch.nn.Module, length: int, device: str):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs(model, 1, length, device), **{CACHE_NAME: cache})
    token = {name: value[:, -1:] for name, value in inputs(model, 1, length, device).items()}

    @torch.no_grad()
    def run():
        model(**token, **{CACHE_NAME: cache})
        cache.crop(-1)

    return run


def train(model: torch.nn.Module, shape: tuple[int, int], device: str):
    batch = inputs(model, *shape, device)
    model.train()

    def run():
        model(**batch, use_cache=False).last_hidden_state.square().mean().backward()
        model.zero_grad()

    return run


if __name__ == "__main__":
    main()
