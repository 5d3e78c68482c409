"""
Compares cross-layer expert pools with separate experts in every layer, after training on equally many tokens.

    python scripts/benchmarks/expert_pools.py --json

The four layers of the tiny preset have four routed experts each. With pools, two pairs of layers share five experts
each, which is 62.5 % of the parameters of the experts. Both models are trained on the built-in scenes with the same
settings and seeds. `validation_loss` is the language modeling loss (nats per token of the answer) on held-out
arrangements; `ratio` is with pools / without pools.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness import Row, is_cuda, make_parser, report
from transformers import TrainingArguments, set_seed

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.demo import conversations, scenes
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer, from_scratch

PRESET = Path(__file__).resolve().parents[2] / "configuration/models/tiny.json"
BATCH, VALIDATION = 64, 1000
QUICK_STEPS, QUICK_BATCH, QUICK_VALIDATION = 2, 8, 16
POOLS = {"expert_pool": [0, 0, 1, 1], "num_experts": 5, "expert_groups": "hybrid"}


def main() -> None:
    arguments = parse_arguments()
    recipe = Recipe(arguments.steps, arguments.batch_size, not is_cuda(arguments.device))
    train = scenes("train", arguments.steps * arguments.batch_size, cell_size=16)
    validation = scenes("validation", arguments.validation, cell_size=16)
    base, processor = from_scratch(str(PRESET), train, vocab_size=512)
    pooled = copy.deepcopy(base.config)
    pooled.text_config = type(pooled.text_config).from_dict(pooled.text_config.to_dict() | POOLS)
    configs = {"with pools": pooled, "without": base.config}
    for name, config in configs.items():
        model = SparseMoeVlmForConditionalGeneration(config)
        pools, layers = model.model.language_model.expert_pools, model.model.language_model.layers
        routed = [pools, *(layer.mlp.experts for layer in layers if layer.mlp.experts is not None)]
        count = sum(parameter.numel() for module in routed for parameter in module.parameters())
        print(f"{name}: {config.num_parameters():,} parameters, {count:,} of them the routed experts'")

    rows = []
    for seed in range(arguments.seeds):
        losses = {
            name: train_and_evaluate(config, processor, train, validation, seed, recipe)
            for name, config in configs.items()
        }
        case = f"seed {seed}, {arguments.steps} steps of batch {arguments.batch_size}"
        rows.append(Row(case, "validation_loss", losses["with pools"], losses["without"]))
    means = [sum(values) / len(rows) for values in ([row.ours for row in rows], [row.peer for row in rows])]
    rows.append(Row(f"mean of {len(rows)} seeds", "validation_loss", *means))
    report("expert_pools", arguments, rows)


@dataclass(frozen=True)
class Recipe:
    """The settings of the training."""

    steps: int
    batch_size: int
    use_cpu: bool


def parse_arguments() -> argparse.Namespace:
    steps = {"type": int, "default": 400, "help": f"training steps of batch {BATCH}"}
    arguments = make_parser(
        __doc__, steps=steps, seeds={"type": int, "default": 3, "help": "number of seeds"}
    ).parse_args()
    arguments.batch_size, arguments.validation = BATCH, VALIDATION
    if arguments.quick:
        arguments.steps, arguments.seeds = QUICK_STEPS, 1
        arguments.batch_size, arguments.validation = QUICK_BATCH, QUICK_VALIDATION
    return arguments


def train_and_evaluate(config, processor, train, validation, seed: int, recipe: Recipe) -> float:
    set_seed(seed)
    model = SparseMoeVlmForConditionalGeneration(copy.deepcopy(config))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SparseMoeTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=recipe.steps,
                use_cpu=recipe.use_cpu,
                disable_tqdm=True,
                per_device_train_batch_size=recipe.batch_size,
                per_device_eval_batch_size=100,
                learning_rate=2e-3,
                lr_scheduler_type="cosine",
                warmup_steps=min(100, recipe.steps // 4),
                adam_beta2=0.98,
                seed=seed,
                remove_unused_columns=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                dataloader_pin_memory=False,
            ),
            data_collator=VisionLanguageCollator(processor),
            train_dataset=conversations(train),
            eval_dataset=conversations(validation),
        )
        trainer.train()
        model.config.text_config.output_router_logits = False  # only the language modeling loss
        return trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    main()
