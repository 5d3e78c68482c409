"""
Measures whether α predicts how much a trained model depends on the image: how much does the probability of an answer
change without its image, and does α correlate with this change?

    python scripts/benchmarks/modality_ablation.py --model outputs/demo/model

For held-out scenes, the log-probability of the right answer is measured with its image, with the image of another scene
(`swapped`), with a blank image (`blank`), and with the image's keys masked (`masked`). α is taken from the pass with
the right image, for the tokens that predict the answer, and averaged over layers and heads. The script prints
Spearman's ρ of α and the loss of log-probability, with a 95 % bootstrap interval, over all scenes and by the number of
objects in them. Then it prints how steering changes the answers to swapped images.

With `--json`, `ours` of a row is ρ, or null if it is not defined (with a single scene). There is no peer.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harness import MODEL_OPTION, find_demo, make_parser, print_json
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
    print(f"\nSpearman's ρ of α and the log-probability that the right answer loses, {len(measured)} held-out scenes")
    print(f"{'image':<10}{'weight':<12}{'objects':<9}{'scenes':>7}{'mean loss':>11}{'ρ':>8}   95 % interval")
    for row in rows:
        print(
            f"{row['ablation']:<10}{row['weight']:<12}{row['objects']:<9}{row['examples']:>7}{row['mean_loss']:>11.2f}"
            f"{row['rho']:>8.2f}   {row['low']:.2f} to {row['high']:.2f}"
        )

    steered = steer(model, processor, data.select(range(min(arguments.steered, len(data)))))
    print("\nAnswers to swapped images, in percent")
    print(f"{'steering':<42}{'right for the true image':>28}{'as without steering':>21}")
    for row in steered:
        print(f"{row['steering']:<42}{row['original']:>28.1f}{row['same']:>21.1f}")
    if arguments.json:
        print_json("modality_ablation", arguments.device, [as_comparison(row) for row in rows], steering=steered)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        model=MODEL_OPTION,
        examples={"type": int, "default": 1000, "help": "number of held-out questions"},
        steered={"type": int, "default": 500, "help": "number of questions to answer with steering"},
        cell_size={"type": int, "default": 16, "help": "pixels per cell of a scene; use the value of the training"},
    )
    arguments = parser.parse_args()
    find_demo(parser, arguments)
    if arguments.quick:
        arguments.examples, arguments.steered = min(arguments.examples, 100), min(arguments.steered, 50)
    if arguments.model is None:
        arguments.examples, arguments.steered = min(arguments.examples, 10), min(arguments.steered, 2)
    return arguments


def load(checkpoint: str | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads the model and processor of a checkpoint, or creates random ones from the tiny preset."""
    if checkpoint is None:
        return from_scratch(str(PRESET), scenes("train", 50, cell_size=16), vocab_size=512)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    return model, AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)


def as_comparison(row: dict) -> dict:
    """Returns a correlation in the format that all benchmarks report."""
    rho, low, high = (None if math.isnan(row[name]) else row[name] for name in ("rho", "low", "high"))
    case = f"{row['ablation']} image, {row['objects']} objects"
    comparison = {"case": case, "metric": f"spearman_{row['weight']}", "ours": rho, "peer": None, "ratio": None}
    own = {"low": low, "high": high, "examples": row["examples"], "mean_loss": row["mean_loss"]}
    return comparison | {"bar": None, "holds": True} | own


@torch.no_grad()
def measure(model, processor, data) -> Iterator[dict[str, float]]:
    """Yields α, the count-free α, and the log-probability that the answer loses in each ablation, for every example."""
    collator = VisionLanguageCollator(processor)
    rows = [to_messages(row) for row in data]
    for start in tqdm(range(0, len(rows), BATCH_SIZE), desc="Measuring", unit="batch"):
        batch = {name: value.to(model.device) for name, value in collator(rows[start : start + BATCH_SIZE]).items()}
        labels = batch.pop("labels")
        outputs = model(**batch, output_modality_weights=True)
        with_image = log_probability(outputs.logits, labels)
        without = {
            "swapped": batch | {"pixel_values": batch["pixel_values"].roll(1, dims=0)},
            "blank": batch | {"pixel_values": batch["pixel_values"].amax().expand_as(batch["pixel_values"])},
            "masked": batch | {"attention_mask": batch["attention_mask"] * (batch["mm_token_type_ids"] != 1)},
        }
        lost = {name: with_image - log_probability(model(**inputs).logits, labels) for name, inputs in without.items()}
        # Each token predicts the next one.
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
    """Returns the log-probabilities of the answers, `(B,)`."""
    log_probabilities = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    targets = labels[:, 1:]
    chosen = log_probabilities.gather(2, targets.clamp(min=0)[..., None]).squeeze(2)
    return (chosen * (targets != -100)).sum(dim=1)


def spearman(first: pd.Series, second: pd.Series) -> tuple[float, float, float]:
    """Returns Spearman's ρ and the 2.5th and 97.5th percentiles of its bootstrap; NaN if an input is constant."""
    if first.nunique() < 2 or second.nunique() < 2:
        return math.nan, math.nan, math.nan

    def rho(indices: np.ndarray) -> float:
        ranks = [pd.Series(values.to_numpy()[indices]).rank() for values in (first, second)]
        with np.errstate(invalid="ignore"):  # a sample may contain the same scene many times
            return float(np.corrcoef(*ranks)[0, 1])

    generator = np.random.default_rng(0)
    draws = [rho(generator.integers(0, len(first), len(first))) for _ in range(BOOTSTRAP_SAMPLES)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return rho(np.arange(len(first))), float(low), float(high)


def steer(model, processor, data) -> list[dict]:
    """Asks each question with the image of the next one, and returns how steering changes the answers."""
    images = data["image"][:]
    swapped = [dict(row, image=images[(i + 1) % len(images)]) for i, row in enumerate(data)]
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
