"""
Compares continued training of a dense vision-language model with continued training after upcycling.

    python scripts/benchmarks/upcycling.py --json

A small LLaVA is trained from scratch on the built-in data. Training then continues with three models, on the same
batches and with the same learning rates: the dense model; the model upcycled with `isolated` experts that start as
copies; and the model upcycled with `hybrid` experts, where the always-on experts are the dense blocks and the routed
experts start at zero (`residual`). The data contains two tasks: `knowledge` (names, groups and keywords of almost 1,900
emoji; two thirds of a batch) and `relations` (positions of objects in scenes of 24 emoji). Drawings and arrangements
are held out: see upcycling_tasks.py.

An answer is correct if each of its tokens, including the end token, is the most likely one given the correct tokens
before it, that is, if greedy decoding generates exactly this answer. The learning rate is constant after the warm-up,
so every point of a run has the same result as a run of that length. Runs are compared at an equal budget: the total
that the cheaper of the two runs has spent in tokens, in FLOPs of matrix products (counted, forward and backward) or in
seconds of training on one core. The value of the other run at this budget is interpolated between two evaluations.
`ours` is the upcycled model and `peer` the dense model, averaged over the seeds. `low` and `high` are the bounds of the
95 % confidence interval of their difference (paired Student's t, one pair per seed).
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import make_parser, print_json
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig, set_seed
from upcycling_tasks import IGNORED, IMAGE_SIZE, Collator, Example, Knowledge, Relations, Task, batches

from modeling_sparse_moe_vlm.toolbox.demo import train_tokenizer
from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle

PATCH_SIZE = 16
VISION = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4}
DECODER = {
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "initializer_range": 0.1,  # the usual 0.02 is for wider models; a small model learns slowly with it
}
DENSE = "dense"
# A token needs the FLOPs of two dense feed-forward blocks: two experts of the dense width, or one expert of this width
# and two of half the width.
ARMS: dict[str, dict[str, Any]] = {
    "copy isolated": {"start": "copy", "expert_groups": "isolated"},
    "residual hybrid": {
        "start": "residual",
        "expert_groups": "hybrid",
        "moe_intermediate_size": DECODER["intermediate_size"] // 2,
    },
}
ROUTING = {"num_experts": 8, "num_experts_per_tok": 2, "output_router_logits": True}
WARMUP_STEPS = 40
EVALUATION_BATCH = 256
MAX_START_DIFFERENCE = 1e-5
# The report compares the tasks and, separately, one kind of question.
PARTS = ("knowledge", "knowledge: name", "relations")
BUDGETS = ("tokens", "flops", "seconds")
METRICS = {"accuracy": "held-out accuracy, percent", "cross_entropy": "held-out cross-entropy, nats per token"}
# 97.5th percentiles of Student's t distribution, starting with 2 seeds.
T_PERCENTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# Batches by task and kind of question.
HeldOut = Mapping[str, Mapping[str, Sequence[dict[str, torch.Tensor]]]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the training and of the evaluation."""

    seeds: int
    pretraining_steps: int
    steps: int
    num_knowledge: int  # questions in a batch
    num_relations: int
    evaluations: int
    num_held_out: int  # questions of each task
    num_scenes: int
    num_emoji: int | None
    vocab_size: int
    learning_rate: float = 2e-3


FULL = Sizes(
    seeds=3,
    pretraining_steps=900,
    steps=600,
    num_knowledge=48,
    num_relations=24,
    evaluations=5,
    num_held_out=1200,
    num_scenes=20_000,
    num_emoji=None,
    vocab_size=1024,
)
QUICK = Sizes(
    seeds=2,
    pretraining_steps=6,
    steps=4,
    num_knowledge=8,
    num_relations=4,
    evaluations=2,
    num_held_out=30,
    num_scenes=220,
    num_emoji=40,
    vocab_size=512,
)


class Counts(NamedTuple):
    """The counts from which the scores of answers are computed."""

    answers: int
    right: int
    tokens: int
    nats: float


@dataclass(frozen=True)
class Score:
    accuracy: float  # percent
    cross_entropy: float  # nats per token of the answers

    @classmethod
    def of(cls, counts: Sequence[Counts]) -> Score:
        answers, right, tokens, nats = map(sum, zip(*counts, strict=True))
        return cls(100 * right / answers, nats / tokens)


@dataclass(frozen=True)
class Point:
    """The costs of a run up to a step, and the scores of its model at this step, by task and kind of question."""

    step: int
    tokens: float
    flops: float
    seconds: float
    scores: dict[str, Score]


class Run:
    """A training run of a model, and its costs."""

    def __init__(self, model: Any, batch: dict[str, torch.Tensor]):
        self.model = model
        self.flops_per_token = flops_per_token(model, batch)
        self.points: list[Point] = []
        self._optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
        self._tokens = 0
        self._seconds = 0.0

    def step(self, batch: dict[str, torch.Tensor], learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        start = clock(self.model.device)
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._seconds += clock(self.model.device) - start
        self._tokens += int(batch["attention_mask"].sum())

    def evaluate(self, step: int, held_out: HeldOut) -> None:
        self.model.eval()
        scores: dict[str, Score] = {}
        for task, kinds in held_out.items():
            counts = {kind: [count(self.model, batch) for batch in batches] for kind, batches in kinds.items()}
            scores[task] = Score.of([each for of_kind in counts.values() for each in of_kind])
            scores |= {f"{task}: {kind}": Score.of(of_kind) for kind, of_kind in counts.items()}
        self.points.append(Point(step, self._tokens, self._tokens * self.flops_per_token, self._seconds, scores))


def clock(device: torch.device) -> float:
    """Returns a time in seconds: the CPU time of this process, or the clock once the work of a GPU has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    sizes = QUICK if arguments.quick else FULL
    if arguments.seeds is not None:
        sizes = replace(sizes, seeds=arguments.seeds)

    knowledge = Knowledge(sizes.num_emoji)
    first, further = (Relations(sizes.num_scenes, seed) for seed in range(2))
    tokenizer = train_tokenizer([*knowledge.texts(), *first.texts()], sizes.vocab_size)
    collator = Collator(tokenizer, image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2, device=arguments.device)
    held_out = {
        name: held_out_batches(task, sizes.num_held_out, collator)
        for name, task in (("knowledge", knowledge), ("relations", first))
    }
    shares: dict[Task, int] = {knowledge: sizes.num_knowledge}
    by_seed: list[dict[str, Run]] = []
    starts: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for seed in range(sizes.seeds):
        set_seed(seed)
        dense = make_dense(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>")).to(arguments.device)
        data = batches(shares | {first: sizes.num_relations}, collator, sizes.pretraining_steps, f"first/{seed}")
        train({DENSE: dense}, data, sizes.pretraining_steps, sizes.learning_rate)
        models = {DENSE: dense}
        for arm, fields in ARMS.items():
            models[arm] = upcycle(dense, seed=seed, **ROUTING, **fields)
            starts[arm].append(start_difference(models[arm], dense, held_out["knowledge"]["name"][0]))
        data = batches(shares | {further: sizes.num_relations}, collator, sizes.steps, f"further/{seed}")
        by_seed.append(train(models, data, sizes.steps, sizes.learning_rate, held_out, sizes.evaluations))

    rows = [
        *start_rows(starts),
        *cost_rows(by_seed),
        *(row for arm in ARMS for part in PARTS for metric in METRICS for row in compare(by_seed, arm, part, metric)),
    ]
    show(rows, by_seed, sizes, len(knowledge.names))
    if arguments.quick:
        print("\nThese are the sizes of a quick test: the figures are not meaningful.")
    if arguments.json:
        print_json("upcycling", arguments.device, rows, sizes=asdict(sizes), curves=curves(by_seed))


def parse_arguments() -> argparse.Namespace:
    seeds = {"type": int, "choices": range(1, len(T_PERCENTILES) + 2), "help": "number of seeds"}
    return make_parser(__doc__, seeds=seeds).parse_args()


def make_dense(vocab_size: int, image_token_id: int) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, vision_use_head=False, **VISION),
        text_config=LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=True, **DECODER),
        image_token_index=image_token_id,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def train(
    models: Mapping[str, Any],
    data: Iterable[dict[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
    held_out: HeldOut | None = None,
    evaluations: int = 0,
) -> dict[str, Run]:
    """
    Trains models on the same batches. The models take turns, so that changes in the speed of the machine affect all of
    them equally.

    Args:
        models (`Mapping[str, PreTrainedModel]`): The models by name. They are changed in place.
        data (`Iterable[dict[str, torch.Tensor]]`): One batch for each of the `steps`.
        learning_rate (`float`): The learning rate after the warm-up.
        held_out (`HeldOut`, *optional*): Data for evaluations: one before the first step, and `evaluations` at equal
            intervals.
    """
    due = {steps * number // evaluations for number in range(1, evaluations + 1)} if evaluations else set()
    runs: dict[str, Run] = {}
    for step, batch in enumerate(tqdm(data, total=steps, desc="Training " + ", ".join(models), unit="step"), start=1):
        if step == 1:
            runs = {name: Run(model, batch) for name, model in models.items()}
        for run in runs.values():
            if step == 1 and held_out is not None:
                run.evaluate(0, held_out)
            run.step(batch, learning_rate * min(1.0, step / WARMUP_STEPS))
            if step in due and held_out is not None:
                run.evaluate(step, held_out)
    return runs


def flops_per_token(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Returns the FLOPs of the matrix products of a training step, per token that is not padding."""
    # The eager implementations, because the counter does not support the fused operations of the CPU.
    counted = copy.deepcopy(model).train()
    counted.set_attn_implementation({"text_config": "eager", "vision_config": "eager"})
    counted.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        counted(**batch).loss.backward()
    return counter.get_total_flops() / int(batch["attention_mask"].sum())


def held_out_batches(task: Task, number: int, collator: Collator) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Returns batches of about `number` held-out questions of a task, by kind."""
    examples: dict[str, list[Example]] = {}
    for example in task.held_out(number):
        examples.setdefault(example.kind, []).append(example)
    return {
        kind: [collator(rows[i : i + EVALUATION_BATCH]) for i in range(0, len(rows), EVALUATION_BATCH)]
        for kind, rows in examples.items()
    }


@torch.no_grad()
def count(model: Any, batch: dict[str, torch.Tensor]) -> Counts:
    labels = batch["labels"][:, 1:]
    is_target = labels != IGNORED
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    is_right = ((logits.argmax(dim=-1) == labels) | ~is_target).all(dim=1)
    nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return Counts(len(labels), int(is_right.sum()), int(is_target.sum()), nats.item())


@torch.no_grad()
def start_difference(model: Any, dense: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Returns the norm of the difference of the logits, and the norm of the logits of the dense model."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ours, peer = (each.eval()(**inputs).logits[batch["attention_mask"].bool()] for each in (model, dense))
    return (ours - peer).norm().item(), peer.norm().item()


def at_budget(points: Sequence[Point], budget: str, spent: float, part: str, metric: str) -> float:
    """Returns a metric at the point where a run had spent a budget, interpolated linearly between two evaluations."""

    def value(point: Point) -> float:
        return getattr(point.scores[part], metric)

    for before, after in pairwise(points):
        low, high = getattr(before, budget), getattr(after, budget)
        if spent <= high:
            return value(before) + (value(after) - value(before)) * (spent - low) / (high - low)
    return value(points[-1])


def start_rows(starts: Mapping[str, Sequence[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Returns rows with the difference from the logits of the dense model before training, for the worst seed."""
    rows = []
    for arm, norms in starts.items():
        difference, norm = max(norms, key=lambda pair: pair[0] / pair[1])
        rows.append(row(f"{arm}, start", "logits_difference", difference, norm, bar=MAX_START_DIFFERENCE))
    return rows


def cost_rows(by_seed: Sequence[Mapping[str, Run]]) -> list[dict[str, Any]]:
    """Returns rows with the numbers of parameters, the FLOPs per token and the seconds per training step."""
    rows = []
    for arm in ARMS:
        for metric in ("parameters", "flops_per_token", "seconds_per_step"):
            ours, peer = (statistics.mean(cost(runs[name])[metric] for runs in by_seed) for name in (arm, DENSE))
            rows.append(row(arm, metric, ours, peer))
    return rows


def cost(run: Run) -> dict[str, float]:
    return {
        "parameters": run.model.num_parameters(),
        "flops_per_token": run.flops_per_token,
        "seconds_per_step": run.points[-1].seconds / run.points[-1].step,
    }


def compare(by_seed: Sequence[Mapping[str, Run]], arm: str, part: str, metric: str) -> list[dict[str, Any]]:
    """Compares an upcycled model with the dense model, at the start and at equal budgets."""
    rows = []
    for budget in (None, *BUDGETS):
        ours, peer = [], []
        for runs in by_seed:
            pair = runs[arm].points, runs[DENSE].points
            # At the start, no budget has been spent.
            spent = 0.0 if budget is None else min(getattr(points[-1], budget) for points in pair)
            for values, points in zip((ours, peer), pair, strict=True):
                values.append(at_budget(points, budget or "tokens", spent, part, metric))
        differences = [a - b for a, b in zip(ours, peer, strict=True)]
        case = f"{arm}, {part}, " + ("start" if budget is None else f"equal {budget}")
        low, high = interval(differences)
        rows.append(row(case, metric, statistics.mean(ours), statistics.mean(peer)))
        rows[-1] |= {"low": low, "high": high, "ours_by_seed": ours, "peer_by_seed": peer}
    return rows


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns the bounds of the 95 % confidence interval of the mean, or `None` for a single value."""
    if len(values) < 2:
        return None, None
    mean = statistics.mean(values)
    margin = T_PERCENTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return mean - margin, mean + margin


def row(case: str, metric: str, ours: float, peer: float, bar: float | None = None) -> dict[str, Any]:
    ratio = ours / peer if peer else None
    holds = bar is None or (ratio is not None and ratio <= bar)
    return {"case": case, "metric": metric, "ours": ours, "peer": peer, "ratio": ratio, "bar": bar, "holds": holds}


def curves(by_seed: Sequence[Mapping[str, Run]]) -> list[dict[str, Any]]:
    """Returns all evaluations of all runs."""
    return [
        {"seed": seed, "arm": arm} | asdict(point)
        for seed, runs in enumerate(by_seed)
        for arm, run in runs.items()
        for point in run.points
    ]


def show(rows: Sequence[dict[str, Any]], by_seed: Sequence[Mapping[str, Run]], sizes: Sizes, num_emoji: int) -> None:
    print(
        f"\n{sizes.seeds} seeds; {sizes.pretraining_steps} pretraining steps, {sizes.steps} further steps; "
        f"{sizes.num_knowledge} questions about {num_emoji} emoji and {sizes.num_relations} about scenes per batch"
    )
    print(f"\n{'model':<18}{'parameters':>12}{'MFLOP per token':>18}{'ms per step':>14}")
    for name in (DENSE, *ARMS):
        costs = [cost(runs[name]) for runs in by_seed]
        mean = {metric: statistics.mean(each[metric] for each in costs) for metric in costs[0]}
        print(
            f"{name:<18}{mean['parameters']:>12,.0f}{mean['flops_per_token'] / 1e6:>18.2f}"
            f"{1000 * mean['seconds_per_step']:>14.1f}"
        )
    for metric, words in METRICS.items():
        print(f"\n{words}, by further steps, mean of {sizes.seeds} seeds")
        points = {name: [runs[name].points for runs in by_seed] for name in (DENSE, *ARMS)}
        print(f"{'':<36}" + "".join(f"{point.step:>9}" for point in points[DENSE][0]))
        for part in PARTS:
            for name, of_seeds in points.items():
                means = [
                    statistics.mean(getattr(p.scores[part], metric) for p in at) for at in zip(*of_seeds, strict=True)
                ]
                print(f"{part:<18}{name:<18}" + "".join(f"{mean:>9.3f}" for mean in means))
    print("\nComparisons")
    print(f"{'case':<52}{'metric':<19}{'ours':>11}{'peer':>11}{'ratio':>10}   ours - peer, 95 % interval")
    for each in rows:
        ratio = "" if each["ratio"] is None else f"{each['ratio']:.3g}"
        bounds = "" if each.get("low") is None else f"   {each['low']:+.3f} to {each['high']:+.3f}"
        print(f"{each['case']:<52}{each['metric']:<19}{each['ours']:>11.4g}{each['peer']:>11.4g}{ratio:>10}{bounds}")


if __name__ == "__main__":
    main()
