"""
Teaches a trained model a drawing style that it has not seen, with LoRA on its experts.

    python scripts/finetune_lora.py                                               # all experts
    python scripts/finetune_lora.py --recipe configuration/lora/attention.yaml    # or image_experts, all
    python scripts/finetune_lora.py --set lora.r=4 --set training.max_steps=50    # with other values
    python scripts/finetune_lora.py --resume                                      # goes on with an interrupted run
    accelerate launch --config_file configuration/accelerate/ddp.yaml --num_processes 8 scripts/finetune_lora.py

Writes to the output folder: the adapter, as PEFT loads it (folder `adapter`), and `metrics.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import TrainingArguments, set_seed

from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.demo import conversations, scenes
from modeling_sparse_moe_vlm.toolbox.demo.emoji import HELD_OUT_STYLE, STYLES
from modeling_sparse_moe_vlm.toolbox.evaluation import exact_match, generate_answers
from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config, num_adapter_parameters
from modeling_sparse_moe_vlm.toolbox.expert_lora.recipes import LoraRecipe, load_lora_recipe
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer, from_checkpoint
from modeling_sparse_moe_vlm.toolbox.training.processes import save_and_part, silence_others
from modeling_sparse_moe_vlm.toolbox.training.recipes import find_model

ROOT = Path(__file__).resolve().parent.parent
TITLES = {"test_style": "the new style", "test": "the style that the model knew"}


def main() -> None:
    arguments = parse_arguments()
    recipe = load_lora_recipe(arguments.recipe, arguments.set)
    model_path = find_trained_model(arguments.model or recipe.model)
    output_dir = Path(arguments.output_dir or ROOT / "outputs/lora" / Path(arguments.recipe).stem)
    output_dir.mkdir(parents=True, exist_ok=True)
    training_arguments = TrainingArguments(
        output_dir=str(output_dir / "checkpoints"),
        remove_unused_columns=False,
        label_names=["labels"],  # which an adapter hides from Trainer
        **recipe.training,
    )
    silence_others(training_arguments)
    set_seed(training_arguments.seed)

    data = draw_scenes(recipe)
    model, processor = from_checkpoint(model_path)
    num_parameters = model.num_parameters()
    model = get_peft_model(model, expert_lora_config(model, **recipe.lora))
    num_trained = num_adapter_parameters(model)
    if training_arguments.process_index == 0:
        share = f"{num_trained / num_parameters:.1%} of the model's {num_parameters:,}"
        print(f"Trains {num_trained:,} parameters, {share}.")

    start = time.time()
    trainer = SparseMoeTrainer(
        model=model,
        args=training_arguments,
        data_collator=VisionLanguageCollator(processor),
        train_dataset=conversations(data["train"]),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    metrics: dict = {
        "num_parameters": num_parameters,
        "num_trained_parameters": num_trained,
        "training_seconds": round(time.time() - start, 1),
    }
    trainer.processing_class = None  # the model's own does, and is not saved with the adapter
    if not save_and_part(trainer, output_dir / "adapter"):
        return
    if training_arguments.world_size > 1:  # of the trained one, this process may hold but a part
        model = PeftModel.from_pretrained(from_checkpoint(model_path)[0], output_dir / "adapter")
        model.to(training_arguments.device)
    with model.disable_adapter():
        before = {split: score(model, processor, data[split]) for split in TITLES}
    after = {split: score(model, processor, data[split]) for split in TITLES}
    metrics |= {split: {"before": before[split], "after": after[split]} for split in TITLES}
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))

    print(f"\n{'Exact match in percent, held-out scenes in':<48}{'before':>8}{'after':>8}")
    for split, title in TITLES.items():
        print(f"{title:<48}{before[split]:>8.1f}{after[split]:>8.1f}")
    print_how_to_load(model_path, output_dir, has_experts=bool(model.active_peft_config.target_parameters))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(ROOT / "configuration/lora/experts.yaml"), help="YAML file")
    parser.add_argument("--model", help="trained model: a folder or a name on the Hub, instead of the recipe's")
    parser.add_argument("--output-dir", help="where everything is written; outputs/lora/<recipe> by default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    return parser.parse_args()


def find_trained_model(name: str) -> str:
    try:
        return find_model(name, ROOT)
    except FileNotFoundError as error:
        raise SystemExit(
            f"There is no trained model {name!r} yet: `make demo` (or `python scripts/train.py`) trains one in some "
            "minutes. With `--model` another is taken."
        ) from error


def draw_scenes(recipe: LoraRecipe) -> dict[str, Dataset]:
    """Scenes to train on, in the new style, and held-out ones in both."""
    options = {"num_train": 10_000, "num_heldout": 500, "held_out_style": HELD_OUT_STYLE} | recipe.data
    numbers = {name: options.pop(name) for name in ("num_train", "num_heldout")}
    # Drawings for training are in all styles but the held-out one.
    known = next(style for style in STYLES if style != options["held_out_style"])
    return {
        "train": scenes("train", numbers["num_train"], **options | {"held_out_style": known}),
        **{split: scenes(split, numbers["num_heldout"], **options) for split in TITLES},
    }


def score(model, processor, rows: Dataset) -> float:
    return exact_match(generate_answers(model, processor, conversations(rows)), rows["answer"])


def print_how_to_load(model_path: str, output_dir: Path, has_experts: bool) -> None:
    factored = "\n    factor_expert_lora(model)  # not needed, but fast" if has_experts else ""
    imported = "from modeling_sparse_moe_vlm.toolbox.expert_lora import factor_expert_lora\n    " if factored else ""
    print(
        f"""
Wrote the adapter and the metrics to {output_dir}.
Load it:

    from peft import PeftModel
    from transformers import AutoModelForImageTextToText
    {imported}
    model = AutoModelForImageTextToText.from_pretrained("{model_path}", trust_remote_code=True)
    model = PeftModel.from_pretrained(model, "{output_dir / "adapter"}"){factored}"""
    )


if __name__ == "__main__":
    main()
