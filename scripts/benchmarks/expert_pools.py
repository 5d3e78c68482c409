"""
Cross-layer expert pools against experts of one's own, at equal training tokens.

    python scripts/benchmarks/expert_pools.py --json

The tiny preset's four layers have four routed experts each; with pools, two pairs of layers share five each, 62.5 % of
the experts' parameters. Both are trained alike on the built-in scenes, with the same seeds. `validation_loss` is the
language loss (nats per token of the answer) on held-out arrangements; `ratio` is with pools / without.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

from harness import Row, report
from transformers import TrainingArguments, set_seed

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.demo import conversations, scenes
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer, from_scratch

PRESET = Path(__file__).resolve().parents[2] / "configuration/models/tiny.json"
POOLS = {"expert_pool": [0, 0, 1, 1], "num_experts": 5, "expert_groups": "hybrid"}


def main() -> None:
    arguments = parse_arguments()
    train = scenes("train", arguments.steps * 64, cell_size=16)
    validation = scenes("validation", 1000, cell_size=16)
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
            name: train_and_evaluate(config, processor, train, validation, seed, arguments.steps)
            for name, config in configs.items()
        }
        case = f"seed {seed}, {arguments.steps} steps of batch 64"
        rows.append(Row(case, "validation_loss", losses["with pools"], losses["without"]))
    means = [sum(values) / len(rows) for values in ([row.ours for row in rows], [row.peer for row in rows])]
    rows.append(Row(f"mean of {len(rows)} seeds", "validation_loss", *means))
    report("expert_pools", "cpu", rows, arguments.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--steps", type=int, default=400, help="training steps of batch 64")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="20 steps of one seed, within a minute")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.seeds = 20, 1
    return arguments


def train_and_evaluate(config, processor, train, validation, seed: int, steps: int) -> float:
    set_seed(seed)
    model = SparseMoeVlmForConditionalGeneration(copy.deepcopy(config))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SparseMoeTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=64,
                per_device_eval_batch_size=100,
                learning_rate=2e-3,
                lr_scheduler_type="cosine",
                warmup_steps=min(100, steps // 4),
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
        model.config.text_config.output_router_logits = False  # the language loss alone
        return trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    main()
