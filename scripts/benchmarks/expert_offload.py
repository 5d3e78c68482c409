"""
Compares paged experts with Accelerate's offload and with resident experts, in decoding.

    python scripts/benchmarks/expert_offload.py --json

A Qwen3-MoE of Transformers (hidden size 512, 4 layers of 64 experts of width 512, 4 per token; float32, on a GPU
bfloat16; much smaller with `--quick`). A device map puts its experts, stored as stacks, on disk, and everything else on
the device. On a GPU, a second device map puts them in host memory. The page cache is warm, so the speed of the disk
does not matter.

Routing: the weights are random, and the embedding is large compared with the rest of the residual stream, so the
experts of a token depend mostly on the token. The tokens are the words of the README in order, which repeat as words in
English do. `even tokens` are drawn uniformly from the vocabulary instead. They choose all experts equally often, which
is the worst case for caches.

- `bytes_per_token_vs_chosen`: bytes read per decoded token if all slots are empty before it, compared with the bytes of
  the experts that a token chooses (4 in each layer)
- `decode_vs_resident`, `decode_vs_accelerate`: seconds per token, with slots for 25, 50 and 75 % of the experts
- `prefill_bytes_isolated_vs_joint`, `decode_...`: bytes read while our model processes a prompt of 64 image tokens and
  16 text tokens, and then decodes 16 text tokens. Both arrangements have the same number of experts

The hit rate and the tokens per second at each budget are printed, and drawn with `--figure`.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import MIN_REPETITIONS, Row, is_cuda, parse_arguments, report, time_interleaved
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.paging import page_experts, unpage_experts

README = Path(__file__).resolve().parents[2] / "README.md"


@dataclass(frozen=True)
class Size:
    """Sizes of the model, and the number of tokens per timed run."""

    vocabulary: int = 2048
    hidden: int = 512
    width: int = 512
    experts: int = 64
    chosen: int = 4
    layers: int = 4
    heads: int = 8
    steps: int = 32

    def expert_bytes(self, dtype: torch.dtype) -> int:
        return 3 * self.hidden * self.width * dtype.itemsize

    def config(self, **changes: object) -> dict:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "moe_intermediate_size": self.width,
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "head_dim": self.hidden // self.heads,
            "initializer_range": 0.05,
        } | changes


# For `--quick`; the times are not meaningful.
QUICK = Size(vocabulary=128, hidden=32, width=16, experts=8, chosen=1, layers=2, heads=4, steps=2)
BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
COMPARED = (1 / 4, 1 / 2, 3 / 4)  # with resident experts and with Accelerate
BARS = {"resident": 1.3, "accelerate": 0.5}  # for words of a text, with slots for half of the experts
IMAGE = 64  # tokens
TEXT, EVEN = "words of a text", "even tokens"


def token_streams(vocabulary: int) -> dict[str, list[int]]:
    """Returns tokens by kind: numbers of the README's words and punctuation marks in order, and uniform random ones."""
    numbers: dict[str, int] = {}
    text = [numbers.setdefault(word, len(numbers)) for word in re.findall(r"\w+|[^\w\s]", README.read_text().lower())]
    even = torch.randint(vocabulary, (4096,), generator=torch.Generator().manual_seed(0)).tolist()
    return {TEXT: [number % vocabulary for number in text], EVEN: even}


def main() -> None:
    drawn = {"type": Path, "help": "path to a PNG file for a plot of hit rate and speed over the budget"}
    arguments = parse_arguments(__doc__, figure=drawn)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device, repetitions = arguments.device, arguments.repetitions
    size = QUICK if arguments.quick else Size()
    dtype = torch.bfloat16 if is_cuda(device) else torch.float32
    streams = token_streams(size.vocabulary)
    rows = []
    for place in ("disk", "cpu") if is_cuda(device) else ("disk",):
        with tempfile.TemporaryDirectory() as folder:
            resident, accelerate, paged = make_models(folder, size, device, dtype, place)
            if place == "disk":
                rows.append(compare_bytes(paged, size, streams[TEXT], dtype))
            rows += compare_decoding(resident, accelerate, paged, size, streams, place, device, repetitions)
            del resident, accelerate
            if place == "disk":
                budgets = compare_budgets(paged, size, streams, device, BUDGETS[1::2] if arguments.quick else BUDGETS)
            del paged
    if arguments.figure:
        draw(budgets, arguments.figure)
    rows += compare_groups(size, streams[TEXT], device)
    report("expert_offload", arguments, rows)


def make_models(folder: str, size: Size, device: str, dtype: torch.dtype, place: str) -> list[PreTrainedModel]:
    """Creates the model three times: resident, and twice with its experts on disk or in host memory (`place`)."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**size.config())).to(dtype).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    # Both ways of offloading read experts that are stored as stacks directly from the files.
    model.save_pretrained(folder, save_original_format=False)
    os.sync()  # otherwise, the system would still write during the measurement
    main = torch.empty(0, device=device).device
    execution = "cpu" if main.type == "cpu" else main.index  # Accelerate names GPUs by number
    places = {"lm_head": execution} | {f"model.{name}": execution for name in ("embed_tokens", "norm", "rotary_emb")}
    for layer in range(size.layers):
        for name in ("self_attn", "mlp.gate", "input_layernorm", "post_attention_layernorm"):
            places[f"model.layers.{layer}.{name}"] = execution
        places[f"model.layers.{layer}.mlp.experts"] = place
    offloaded = [Qwen3MoeForCausalLM.from_pretrained(folder, dtype=dtype, device_map=places) for _ in range(2)]
    return [model.to(device), *offloaded]


@torch.no_grad()
def decode(model: PreTrainedModel, tokens: Iterator[int], steps: int) -> None:
    cache = {}
    for token in itertools.islice(tokens, steps):
        output = model(torch.tensor([[token]], device=model.device), use_cache=True, **cache)
        # Transformers 5.24 renames the cache.
        name = "past_key_values" if "past_key_values" in output else "cache"
        cache = {name: output[name]}


def decoding(model: PreTrainedModel, tokens: list[int], steps: int) -> Callable[[], None]:
    """Returns a function that decodes tokens. Each call resumes where the last one stopped."""
    stream = itertools.cycle(tokens)
    return lambda: decode(model, stream, steps)


def compare_bytes(model: PreTrainedModel, size: Size, tokens: list[int], dtype: torch.dtype) -> Row:
    """Counts the bytes read per token, with empty slots before every token."""
    read = []
    with page_experts(model, size.experts // 2) as pager:
        for token in tokens[: size.steps]:
            pager.reset()
            decode(model, iter([token]), 1)
            read.append(pager.total("decode").bytes)
    chosen = size.layers * size.chosen * size.expert_bytes(dtype)
    return Row("slots empty before every token", "bytes_per_token_vs_chosen", sum(read) / size.steps, chosen, 1.1)


def compare_decoding(
    resident: PreTrainedModel,
    accelerate: PreTrainedModel,
    paged: PreTrainedModel,
    size: Size,
    streams: dict[str, list[int]],
    place: str,
    device: str,
    repetitions: int,
) -> list[Row]:
    """Compares the seconds per token with resident experts and with Accelerate's offload."""
    rows = []
    for kind, tokens in streams.items():
        for budget in COMPARED:
            models = {"resident": resident, "accelerate": accelerate, "paged": paged}
            runs = {name: decoding(model, tokens, size.steps) for name, model in models.items()}
            with page_experts(paged, int(budget * size.experts)) as pager:
                seconds = time_interleaved(runs, device, repetitions)
                hit_rate = pager.total("decode").hit_rate
            case = f"{kind}, {place}, {budget:.0%} in slots, hit rate {hit_rate:.0%}"
            for peer, bar in BARS.items():
                bar = bar if (kind, budget) == (TEXT, 1 / 2) else None
                ours = seconds["paged"] / size.steps
                rows.append(Row(case, f"decode_vs_{peer}", ours, seconds[peer] / size.steps, bar))
    return rows


def compare_budgets(
    model: PreTrainedModel, size: Size, streams: dict[str, list[int]], device: str, budgets: tuple[float, ...]
) -> dict[str, list[list[float]]]:
    """Returns, by kind of tokens, rows of: share of experts in slots, hit rate, bytes per token, tokens per second."""
    table: dict[str, list[list[float]]] = {}
    print(f"{'tokens':<18}{'experts in slots':>17}{'hit rate':>10}{'MB per token':>14}{'tokens/s':>10}")
    for kind, tokens in streams.items():
        for budget in budgets:
            with page_experts(model, max(size.chosen, int(budget * size.experts))) as pager:
                run = decoding(model, tokens, size.steps)
                seconds = time_interleaved({"paged": run}, device, MIN_REPETITIONS)["paged"]
                counts = pager.total("decode")
            bytes_per_token = counts.bytes / (counts.hits + counts.misses) * size.layers * size.chosen
            row = [budget, counts.hit_rate, bytes_per_token, size.steps / seconds]
            table.setdefault(kind, []).append(row)
            print(f"{kind:<18}{budget:>17.0%}{row[1]:>10.0%}{row[2] / 1e6:>14.1f}{row[3]:>10.0f}")
    return table


def draw(budgets: dict[str, list[list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    from modeling_sparse_moe_vlm.toolbox.demo.drawings import save_figure

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
def compare_groups(size: Size, text: list[int], device: str) -> list[Row]:
    """Compares the bytes read by phase and group, in our model with 16 experts per layer and slots for half of them."""
    totals: dict[str, Counter] = {}
    print(f"\n{'groups':<12}{'phase':<10}{'group':<10}{'MB read':>10}{'hit rate':>10}")
    for arrangement in ("joint", "isolated"):
        torch.manual_seed(0)
        decoder = size.config(num_experts=16, num_experts_per_tok=2, expert_groups=arrangement)
        vision = {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 4, "vision_use_head": False}
        vision |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = SparseMoeVlmConfig(text_config=decoder, vision_config=vision, image_token_id=3)
        model = SparseMoeVlmForConditionalGeneration(config).to(device).eval()
        tokens = [4 + token % (size.vocabulary - 4) for token in text[:16]]
        ids = torch.tensor([tokens[:8] + [3] * IMAGE + tokens[8:]], device=device)
        pager = page_experts(model, 8 if arrangement == "joint" else 4)
        model.generate(
            input_ids=ids,
            mm_token_type_ids=(ids == 3).long(),
            pixel_values=torch.randn(1, 3, 64, 64).to(device),
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
    case = f"{IMAGE} image tokens, 16 of text, 16 decoded"
    return [
        Row(case, f"{phase}_bytes_isolated_vs_joint", totals["isolated"][phase], totals["joint"][phase])
        for phase in ("prefill", "decode")
    ]


if __name__ == "__main__":
    main()
