"""
Does α mean something? On a trained model: how much does an answer's probability change without its picture, and does α
tell?

    python scripts/benchmarks/modality_ablation.py --model outputs/demo/model

For held-out scenes, the log-probability of the right answer is measured with its picture, with another scene's
(`swapped`), with a blank one (`blank`), and with the picture's keys masked (`masked`). α is that of the tokens that
predict the answer, averaged over layers and heads, from the pass with the picture. Printed is Spearman's ρ of α with
the loss of log-probability, with a 95 % bootstrap interval, over all scenes and by the number of objects in them; then,
for swapped pictures, how steering changes the answers.

With `--json`, a row's `ours` is ρ, null where it is not defined (one scene alone); there is no peer.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harness import make_parser, print_json
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin, set_seed

from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.demo import scenes, to_messages
from modeling_sparse_moe_vlm.toolbox.evaluation import exact_match, generate_answers
from modeling_sparse_moe_vlm.toolbox.training import from_scratch

ABLATIONS = ("swapped", "blank", "masked")
STEERING = (
    {},
    {"modality_priors": {"image": 0.25}},
    {"modality_priors": {"image": 4.0}},
    {"modality_guidance": 0.5},
    {"modality_guidance": 2.0},
)
BATCH_SIZE = 50
BOOTSTRAP_SAMPLES = 1000
DEMO = "outputs/demo/model"
PRESET = Path(__file__).resolve().parents[2] / "configuration/models/tiny.json"


def main() -> None:
    arguments = parse_arguments()
    set_seed(0)
    model, processor = load(arguments.model)
    model = model.to(arguments.device).eval()
    data = scenes("test", arguments.examples, cell_size=arguments.cell_size)
    measured = pd.DataFrame(list(measure(model, processor, data)))
    measured["objects"] = [sum(name != "" for name in scene) for scene in data["scene"]]

    rows = []
    for ablation in ABLATIONS:
        for weight in ("alpha", "count_free"):
            for objects, part in [("all", measured), *measured.groupby("objects")]:
                rho, low, high = spearman(part[weight], part[ablation])
                rows.append({"ablation": ablation, "weight": weight, "objects": str(objects), "examples": len(part)})
                rows[-1] |= {"rho": rho, "low": low, "high": high, "mean_loss": float(part[ablation].mean())}
    print(f"\nSpearman's ρ of α with the log-probability that the right answer loses, {len(measured)} held-out scenes")
    print(f"{'picture':<10}{'weight':<12}{'objects':<9}{'scenes':>7}{'mean loss':>11}{'ρ':>8}   95 % interval")
    for row in rows:
        print(
            f"{row['ablation']:<10}{row['weight']:<12}{row['objects']:<9}{row['examples']:>7}{row['mean_loss']:>11.2f}"
            f"{row['rho']:>8.2f}   {row['low']:.2f} to {row['high']:.2f}"
        )

    steered = steer(model, processor, data.select(range(min(arguments.steered, len(data)))))
    print("\nAnswers to swapped pictures, in percent")
    print(f"{'steering':<42}{'right for the true picture':>28}{'as without steering':>21}")
    for row in steered:
        print(f"{row['steering']:<42}{row['original']:>28.1f}{row['same']:>21.1f}")
    if arguments.json:
        print_json("modality_ablation", arguments.device, [as_comparison(row) for row in rows], steering=steered)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        model={"default": DEMO, "help": "checkpoint (default: %(default)s)"},
        examples={"type": int, "default": 1000, "help": "number of held-out questions"},
        steered={"type": int, "default": 500, "help": "number of questions that are answered with steering"},
        cell_size={"type": int, "default": 16, "help": "pixels per cell of a scene, as in training"},
    )
    arguments = parser.parse_args()
    if arguments.model == DEMO and not Path(DEMO).exists():
        if not arguments.quick:
            parser.error(f"there is no {DEMO} yet: run `make demo`, or name a checkpoint with --model")
        print(f"There is no {DEMO}: the model is a random one, and the figures mean nothing.", file=sys.stderr)
        arguments.model = None
    if arguments.quick:
        arguments.examples, arguments.steered = min(arguments.examples, 100), min(arguments.steered, 50)
    if arguments.model is None:
        arguments.examples, arguments.steered = min(arguments.examples, 10), min(arguments.steered, 2)
    return arguments


def load(checkpoint: str | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A checkpoint's model and processor, or random ones of the tiny preset."""
    if checkpoint is None:
        return from_scratch(str(PRESET), scenes("train", 50, cell_size=16), vocab_size=512)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    return model, AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)


def as_comparison(row: dict) -> dict:
    """A correlation in the form that all benchmarks report in."""
    rho, low, high = (None if math.isnan(row[name]) else row[name] for name in ("rho", "low", "high"))
    case = f"{row['ablation']} picture, {row['objects']} objects"
    comparison = {"case": case, "metric": f"spearman_{row['weight']}", "ours": rho, "peer": None, "ratio": None}
    own = {"low": low, "high": high, "examples": row["examples"], "mean_loss": row["mean_loss"]}
    return comparison | {"bar": None, "holds": True} | own


@torch.no_grad()
def measure(model, processor, data) -> Iterator[dict[str, float]]:
    """For every example, α, the count-free α, and the log-probability that the answer loses by each ablation."""
    collator = VisionLanguageCollator(processor)
    rows = [to_messages(row) for row in data]
    for start in tqdm(range(0, len(rows), BATCH_SIZE), desc="Measuring", unit="batch"):
        batch = {name: value.to(model.device) for name, value in collator(rows[start : start + BATCH_SIZE]).items()}
        labels = batch.pop("labels")
        outputs = model(**batch, output_modality_weights=True)
        with_picture = log_probability(outputs.logits, labels)
        without = {
            "swapped": batch | {"pixel_values": batch["pixel_values"].roll(1, dims=0)},
            "blank": batch | {"pixel_values": batch["pixel_values"].amax().expand_as(batch["pixel_values"])},
            "masked": batch | {"attention_mask": batch["attention_mask"] * (batch["mm_token_type_ids"] != 1)},
        }
        lost = {
            name: with_picture - log_probability(model(**inputs).logits, labels) for name, inputs in without.items()
        }
        # The token before an answer's token predicts it.
        predicts = (labels != -100).roll(-1, dims=1)
        predicts[:, -1] = False
        image = 1
        alphas = {
            name: torch.stack(weights)[..., image].mean(dim=(0, 2))  # over layers and heads: (B, T)
            for name, weights in (
                ("alpha", outputs.modality_weights),
                ("count_free", outputs.count_free_modality_weights),
            )
        }
        for row in range(len(labels)):
            yield {name: alpha[row, predicts[row]].mean().item() for name, alpha in alphas.items()} | {
                name: values[row].item() for name, values in lost.items()
            }


def log_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the answers, `(B,)`."""
    log_probabilities = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    targets = labels[:, 1:]
    chosen = log_probabilities.gather(2, targets.clamp(min=0)[..., None]).squeeze(2)
    return (chosen * (targets != -100)).sum(dim=1)


def spearman(first: pd.Series, second: pd.Series) -> tuple[float, float, float]:
    """Spearman's ρ, and the 2.5th and 97.5th percentiles of its bootstrap distribution; NaN where one is constant."""
    if first.nunique() < 2 or second.nunique() < 2:
        return math.nan, math.nan, math.nan

    def rho(indices: np.ndarray) -> float:
        ranks = [pd.Series(values.to_numpy()[indices]).rank() for values in (first, second)]
        with np.errstate(invalid="ignore"):  # a draw of the same scene again and again
            return float(np.corrcoef(*ranks)[0, 1])

    generator = np.random.default_rng(0)
    draws = [rho(generator.integers(0, len(first), len(first))) for _ in range(BOOTSTRAP_SAMPLES)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return rho(np.arange(len(first))), float(low), float(high)


def steer(model, processor, data) -> list[dict]:
    """Each question with the next one's picture: how the answers change with steering."""
    pictures = data["image"][:]
    swapped = [dict(row, image=pictures[(i + 1) % len(pictures)]) for i, row in enumerate(data)]
    conversation = [to_messages(row) for row in swapped]
    plain, rows = None, []
    for steering in STEERING:
        answers = generate_answers(model, processor, conversation, **steering)
        plain = plain or answers
        same = 100 * sum(a == b for a, b in zip(answers, plain, strict=True)) / len(answers)
        name = ", ".join(f"{key}={value}" for key, value in steering.items()) or "none"
        rows.append({"steering": name, "original": exact_match(answers, data["answer"]), "same": same})
    return rows


if __name__ == "__main__":
    main()
