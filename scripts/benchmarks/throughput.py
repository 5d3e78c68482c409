"""
Speed of the decoder against Transformers' own Qwen3-VL-MoE text model and against a dense model.

    python scripts/benchmarks/throughput.py --json

Same sizes, same backends (SDPA, grouped_mm), equal parameters in total and per token, in turn:

- `joint`: the very same architecture, with the peer's weights, so that outputs are first compared;
- `hybrid`: our default, with one of the k experts of a token always on for its modality, half of the tokens image
  tokens.

The dense floor is a dense decoder with as many parameters as the others use per token. A train step is forward and
backward; the optimizer's part is the same for all and would only dilute the ratio.
"""

from __future__ import annotations

import torch
from harness import Row, parse_arguments, report, time_interleaved
from transformers import DynamicCache
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

from modeling_sparse_moe_vlm import SparseMoeVlmTextConfig, SparseMoeVlmTextModel
from modeling_sparse_moe_vlm.cache_name import CACHE_NAME

PEER, FLOOR = "qwen3_vl_moe", "dense"
NUM_EXPERTS, TOP_K, WIDTH, HIDDEN, HEADS = 32, 4, 512, 1024, 16
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def main() -> None:
    arguments = parse_arguments(__doc__)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    models = {name: model.to(arguments.device, dtype).eval() for name, model in build(num_layers=4).items()}
    check_equal(models["joint"], models[PEER], arguments.device)

    prompt, train_batch = (256, (2, 128)) if arguments.quick else (1024, (4, 256))
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
    report("throughput", arguments.device, rows, arguments.json)


def build(num_layers: int) -> dict[str, torch.nn.Module]:
    """The models, all with the sizes above."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 8192,
        "hidden_size": HIDDEN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 4096,
    }
    experts = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": WIDTH}
    peer_rope = ROPE | {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
    peer = Qwen3VLMoeTextModel._from_config(
        Qwen3VLMoeTextConfig(**sizes, **experts, rope_parameters=peer_rope), experts_implementation="grouped_mm"
    )
    joint = ours(**sizes, **experts, expert_groups="joint")
    joint.load_state_dict(peer.state_dict())
    # Two of the experts become the always-on ones, so totals agree, and one slot of a token is theirs.
    fewer = {"num_experts": NUM_EXPERTS - 2, "num_experts_per_tok": TOP_K - 1, "moe_intermediate_size": WIDTH}
    hybrid = ours(**sizes, **fewer, expert_groups="hybrid")
    dense = ours(**sizes, **experts, intermediate_size=TOP_K * WIDTH, mlp_only_layers=list(range(num_layers)))
    return {"joint": joint, "hybrid": hybrid, PEER: peer, FLOOR: dense}


def ours(**config) -> SparseMoeVlmTextModel:
    return SparseMoeVlmTextModel._from_config(
        SparseMoeVlmTextConfig(**config, rope_parameters=ROPE), experts_implementation="grouped_mm"
    )


def inputs(model: torch.nn.Module, batch_size: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """Token ids and, for our models, modality ids: first half image, then text."""
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(0, 8192, (batch_size, length), generator=generator).to(device)}
    if isinstance(model, SparseMoeVlmTextModel):
        batch["mm_token_type_ids"] = (torch.arange(length, device=device) < length // 2).long().repeat(batch_size, 1)
    return batch


@torch.no_grad()
def check_equal(joint: torch.nn.Module, peer: torch.nn.Module, device: str) -> None:
    """With the same weights the joint arrangement is the peer, so both do the same work."""
    ours, theirs = (model(**inputs(model, 2, 32, device)).last_hidden_state.float() for model in (joint, peer))
    tolerance = 1e-4 if next(peer.parameters()).dtype == torch.float32 else 5e-2
    if not torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance):
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
