"""
Paging of experts against Accelerate's own offload and against resident experts, at decoding.

    python scripts/benchmarks/expert_offload.py --json

A Qwen3-MoE of Transformers' (hidden size 512, 4 layers of 64 experts of width 512, 4 per token, float32). One device
map puts its experts, stored as stacks, on disk, and everything else on the device. The page cache is warm, so that the
disk itself does not matter.

Routing: weights are random, and the embedding is large beside the rest of the stream, so that the experts of a token
depend mostly on the token. Tokens are the words of the README in order, which repeat as English words do. `even` tokens
are drawn evenly from the vocabulary instead, which spreads the choices evenly: the worst case for a cache.

- `bytes_per_token_vs_chosen`: bytes read per decoded token when no slot holds an expert before it, against the bytes of
  the experts that a token chooses (4 in each layer).
- `decode_vs_resident`, `decode_vs_accelerate`: seconds per token, with slots for half of the experts.
- `prefill_bytes_isolated_vs_joint`, `decode_...`: bytes read where our model, with the same number of experts, reads a
  picture of 64 tokens among 16 of text, then decodes 16 tokens of text.

Hit rate and tokens/s against the budget are printed, and drawn with `--picture`.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from harness import MIN_REPETITIONS, Row, parse_arguments, report, time_interleaved
from matplotlib.figure import Figure
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.demo.drawings import save_figure
from modeling_sparse_moe_vlm.toolbox.paging import page_experts, unpage_experts

README = Path(__file__).resolve().parents[2] / "README.md"
VOCABULARY = 2048
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.05,
}
EXPERTS, LAYERS, CHOSEN = SIZES["num_experts"], SIZES["num_hidden_layers"], SIZES["num_experts_per_tok"]
STEPS = 32  # tokens per timed run
BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)


PICTURE = 64  # tokens
TEXT = "words of a text"


def words() -> list[int]:
    """Numbers of the README's words and signs in order."""
    numbers: dict[str, int] = {}
    text = [numbers.setdefault(word, len(numbers)) for word in re.findall(r"\w+|[^\w\s]", README.read_text().lower())]
    return [number % VOCABULARY for number in text]


KINDS = {
    TEXT: words(),
    "even tokens": torch.randint(VOCABULARY, (4096,), generator=torch.Generator().manual_seed(0)).tolist(),
}


def main() -> None:
    drawn = {"type": Path, "help": "where to draw hit rate and speed against the budget (PNG)"}
    arguments = parse_arguments(__doc__, picture=drawn)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device, repetitions = arguments.device, MIN_REPETITIONS if arguments.quick else arguments.repetitions
    with tempfile.TemporaryDirectory() as folder:
        resident, accelerate, paged = make_models(folder, device)
        rows = [compare_bytes(paged)]
        for kind, tokens in KINDS.items():
            runs = {
                "resident": decoding(resident, tokens),
                "accelerate": decoding(accelerate, tokens),
                "paged": decoding(paged, tokens),
            }
            with page_experts(paged, EXPERTS // 2) as pager:
                seconds = time_interleaved(runs, device, repetitions)
                case = f"{kind}, hit rate {pager.total('decode').hit_rate:.0%}"
            for peer, bar in (("resident", 1.3), ("accelerate", 0.5)):
                bar = bar if kind == TEXT else None
                rows.append(Row(case, f"decode_vs_{peer}", seconds["paged"] / STEPS, seconds[peer] / STEPS, bar))
        del resident, accelerate
        budgets = compare_budgets(paged, device, BUDGETS[1::2] if arguments.quick else BUDGETS)
    if arguments.picture:
        draw(budgets, arguments.picture)
    rows += compare_groups()
    report("expert_offload", device, rows, arguments.json)


def make_models(folder: str, device: str) -> list[PreTrainedModel]:
    """The model three times: resident, and twice with experts on disk."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    # Stored as stacks, the experts are read where they lie, by both.
    model.save_pretrained(folder, save_original_format=False)
    os.sync()  # or the system would still be writing while time is taken
    places = {"lm_head": device} | {f"model.{name}": device for name in ("embed_tokens", "norm", "rotary_emb")}
    for layer in range(LAYERS):
        for name in ("self_attn", "mlp.gate", "input_layernorm", "post_attention_layernorm"):
            places[f"model.layers.{layer}.{name}"] = device
        places[f"model.layers.{layer}.mlp.experts"] = "disk"
    offloaded = [Qwen3MoeForCausalLM.from_pretrained(folder, device_map=places) for _ in range(2)]
    return [model.to(device), *offloaded]


@torch.no_grad()
def decode(model: PreTrainedModel, tokens: Iterator[int], steps: int = STEPS) -> None:
    cache = {}
    for token in itertools.islice(tokens, steps):
        output = model(torch.tensor([[token]], device=model.device), use_cache=True, **cache)
        # Transformers 5.24 renames it.
        name = "past_key_values" if "past_key_values" in output else "cache"
        cache = {name: output[name]}


def decoding(model: PreTrainedModel, tokens: list[int]) -> Callable[[], None]:
    """Each call goes on where the last one stopped."""
    stream = itertools.cycle(tokens)
    return lambda: decode(model, stream)


def compare_bytes(model: PreTrainedModel) -> Row:
    """Counted, with empty slots before every token."""
    experts = model.config.hidden_size * model.config.moe_intermediate_size * 3 * 4  # bytes of one
    read = []
    with page_experts(model, EXPERTS // 2) as pager:
        for token in KINDS[TEXT][:STEPS]:
            pager.reset()
            decode(model, iter([token]))
            read.append(pager.total("decode").bytes)
    chosen = LAYERS * CHOSEN * experts
    return Row("slots empty before every token", "bytes_per_token_vs_chosen", sum(read) / STEPS, chosen, 1.1)


def compare_budgets(model: PreTrainedModel, device: str, budgets: tuple[float, ...]) -> dict[str, list[list[float]]]:
    """By kind of tokens, rows of: share of the experts in slots, hit rate, bytes per token, tokens per second."""
    table: dict[str, list[list[float]]] = {}
    print(f"{'tokens':<18}{'experts in slots':>17}{'hit rate':>10}{'MB per token':>14}{'tokens/s':>10}")
    for kind, tokens in KINDS.items():
        for budget in budgets:
            with page_experts(model, int(budget * EXPERTS)) as pager:
                seconds = time_interleaved({"paged": decoding(model, tokens)}, device, MIN_REPETITIONS)["paged"]
                counts = pager.total("decode")
            bytes_per_token = counts.bytes / (counts.hits + counts.misses) * LAYERS * CHOSEN
            row = [budget, counts.hit_rate, bytes_per_token, STEPS / seconds]
            table.setdefault(kind, []).append(row)
            print(f"{kind:<18}{budget:>17.0%}{row[1]:>10.0%}{row[2] / 1e6:>14.1f}{row[3]:>10.0f}")
    return table


def draw(budgets: dict[str, list[list[float]]], path: Path) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    plots = figure.subplots(1, 2)
    for kind, rows in budgets.items():
        share, hit_rate, _, speed = zip(*rows)
        plots[0].plot(share, hit_rate, "o-", label=kind)
        plots[1].plot(share, speed, "o-", label=kind)
    for axes, label in zip(plots, ("hit rate", "tokens per second")):
        axes.set(xlabel="share of the experts in slots", ylabel=label, ylim=(0, None), xlim=(0, 1.03))
        axes.legend()
    save_figure(figure, path)


@torch.no_grad()
def compare_groups() -> list[Row]:
    """Bytes by phase and group, of our model with 16 experts per layer and slots for half of them."""
    totals: dict[str, Counter] = {}
    print(f"\n{'groups':<12}{'phase':<10}{'group':<10}{'MB read':>10}{'hit rate':>10}")
    for arrangement in ("joint", "isolated"):
        torch.manual_seed(0)
        text = SIZES | {"num_experts": 16, "num_experts_per_tok": 2, "expert_groups": arrangement}
        vision = {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 4, "vision_use_head": False}
        vision |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = SparseMoeVlmConfig(text_config=text, vision_config=vision, image_token_id=3)
        model = SparseMoeVlmForConditionalGeneration(config).eval()
        tokens = [token + 4 for token in KINDS[TEXT][:16]]
        ids = torch.tensor([tokens[:8] + [3] * PICTURE + tokens[8:]])
        pager = page_experts(model, 8 if arrangement == "joint" else 4)
        model.generate(
            input_ids=ids,
            mm_token_type_ids=(ids == 3).long(),
            pixel_values=torch.randn(1, 3, 64, 64),
            max_new_tokens=17,
            min_new_tokens=17,
            suppress_tokens=[3],
            do_sample=False,
        )
        totals[arrangement] = Counter()
        for phase, modules in pager.statistics().items():
            groups = {name.partition(".experts.")[2] or "joint" for name in modules}
            for group in sorted(groups):
                counts = [c for name, c in modules.items() if (name.partition(".experts.")[2] or "joint") == group]
                total = sum(counts[1:], counts[0])
                totals[arrangement][phase] += total.bytes
                print(f"{arrangement:<12}{phase:<10}{group:<10}{total.bytes / 1e6:>10.1f}{total.hit_rate:>10.0%}")
        unpage_experts(model)
    case = f"{PICTURE} image tokens, 16 of text, 16 decoded"
    return [
        Row(case, f"{phase}_bytes_isolated_vs_joint", totals["isolated"][phase], totals["joint"][phase])
        for phase in ("prefill", "decode")
    ]


if __name__ == "__main__":
    main()
