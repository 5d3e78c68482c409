"""
Trains a model, saves it, evaluates it and draws what it does.

    python scripts/train.py                                        # the main job: configuration/training/demo.yaml
    python scripts/train.py --set training.max_steps=200           # with another value
    python scripts/train.py --resume                               # goes on where an interrupted run stopped
    accelerate launch --config_file configuration/accelerate/ddp.yaml --num_processes 8 scripts/train.py

Writes to the output folder: the model (folder `model`), `metrics.json`, `answers.png` and `expert_load.png`.
A model of another class than ours gets no model card and no picture of its experts.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from transformers import TrainingArguments, set_seed

from modeling_sparse_moe_vlm import SparseMoeVlmConfig
from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.demo import conversations, load_scenes
from modeling_sparse_moe_vlm.toolbox.demo.drawings import draw_answers, draw_expert_load
from modeling_sparse_moe_vlm.toolbox.evaluation import BlindBaseline, blind_baseline, exact_match, generate_answers
from modeling_sparse_moe_vlm.toolbox.hub import write_model_card
from modeling_sparse_moe_vlm.toolbox.routing import expert_load
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer, from_checkpoint, from_scratch
from modeling_sparse_moe_vlm.toolbox.training.processes import save_and_part, silence_others
from modeling_sparse_moe_vlm.toolbox.training.recipes import find_model, load_recipe

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    arguments = parse_arguments()
    recipe = load_recipe(arguments.recipe, arguments.set)
    model_path = find_model(recipe.model, ROOT)
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    training_arguments = TrainingArguments(
        output_dir=str(output_dir / "checkpoints"), remove_unused_columns=False, **recipe.training
    )
    silence_others(training_arguments)
    set_seed(training_arguments.seed)

    data = load_scenes(**recipe.data)
    if model_path.endswith(".json"):
        model, processor = from_scratch(model_path, data["train"], **recipe.tokenizer)
    else:
        model, processor = from_checkpoint(model_path)
    is_ours = model.config.model_type == SparseMoeVlmConfig.model_type
    if training_arguments.process_index == 0:
        print(describe(model, is_ours))
        print_resizing(model, data["train"][0]["image"])

    start = time.time()
    collator = VisionLanguageCollator(processor)
    trainer = SparseMoeTrainer(
        model=model,
        args=training_arguments,
        data_collator=collator,
        train_dataset=conversations(data["train"]),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    metrics: dict = {"training_seconds": round(time.time() - start, 1)}
    # At once, so that nothing is lost when a later step fails.
    model_dir = output_dir / "model"
    if not save_and_part(trainer, model_dir):
        return
    if training_arguments.world_size > 1:  # of the trained one, this process may hold but a part
        model = from_checkpoint(str(model_dir))[0].to(training_arguments.device)

    heldout = [split for split in ("test", "test_style") if split in data]
    answers = {split: generate_answers(model, processor, conversations(data[split])) for split in heldout}
    metrics |= {split: score(data["train"], data[split], answers[split]) for split in heldout}
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
    if is_ours:
        write_model_card(
            model_dir, template=ROOT / "model_card.md", config=model.config, metrics=metrics, recipe=recipe
        )
    print_scores(metrics, heldout)
    print_examples(data["train"], data["test"], answers["test"])

    shown = random.Random(0).sample(range(len(data["test"])), k=min(12, len(data["test"])))
    draw_answers([data["test"][i] for i in shown], [answers["test"][i] for i in shown], output_dir / "answers.png")
    rows = conversations(data["test"].select(range(min(256, len(data["test"])))))
    batches = [collator([rows[i] for i in range(j, min(j + 64, len(rows)))]) for j in range(0, len(rows), 64)]
    load = expert_load(model.eval(), batches) if is_ours else {}
    if load:
        draw_expert_load(load, output_dir / "expert_load.png")
    else:
        print("No picture of the load of the experts: the model has no routed experts of ours.")
    print_how_to_load(model_dir, output_dir)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(ROOT / "configuration/training/demo.yaml"), help="YAML file")
    parser.add_argument("--output-dir", default=str(ROOT / "outputs/demo"), help="where everything is written")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    return parser.parse_args()


def describe(model, is_ours: bool) -> str:
    if not is_ours:
        return f"{type(model).__name__} with {model.num_parameters():,} parameters."
    config = model.config
    active = ", ".join(
        f"{config.num_active_parameters(modality):,} active per {modality} token"
        for modality in config.text_config.modalities
    )
    return f"Model with {config.num_parameters():,} parameters ({active})."


def print_resizing(model, picture) -> None:
    side = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    if isinstance(side, int) and picture.size != (side, side):
        width, height = picture.size
        print(f"Note: pictures of {width}×{height} pixels are resized to the {side}×{side} of the model.")


def score(train, test, answers: list[str]) -> dict[str, dict[str, float]]:
    """Exact match in percent, by kind of question and overall, beside what the question alone gives away."""
    scores = blind_baseline(train, test)
    kinds = test["kind"]
    for kind, row in scores.items():
        chosen = [i for i in range(len(answers)) if kind in ("overall", kinds[i])]
        references = test["answer"]
        row["model"] = exact_match([answers[i] for i in chosen], [references[i] for i in chosen])
    return scores


def print_scores(metrics: dict, splits: list[str]) -> None:
    titles = {"test": "held-out arrangements", "test_style": "held-out drawing style (never seen in training)"}
    for split in splits:
        print(f"\nExact match in percent, {titles[split]}:")
        print(f"{'kind of question':<20}{'model':>8}{'blind':>8}{'most frequent answer':>22}")
        for kind, row in sorted(metrics[split].items(), key=lambda item: item[0] == "overall"):
            print(f"{kind:<20}{row['model']:>8.1f}{row['blind']:>8.1f}{row['most_frequent_answer']:>22.1f}")


def print_examples(train, test, answers: list[str], count: int = 12) -> None:
    blind = BlindBaseline(train)
    print("\nQuestions from held-out arrangements (blind: the best guess from the question alone):")
    print(f"{'question':<56}{'right answer':<28}{'model':<28}{'blind':<20}{'most frequent'}")
    for i in range(min(count, len(test))):
        row = test[i]
        guess = blind.answer(row["question"], row["kind"])
        print(
            f"{row['question']:<56.55}{row['answer']:<28.27}{answers[i]:<28.27}{guess:<20.19}{blind.most_frequent:.19}"
        )


def print_how_to_load(model_dir: Path, output_dir: Path) -> None:
    print(
        f"""
Wrote the model, the metrics and the pictures to {output_dir}.
Ask it about a new picture:

    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained("{model_dir}", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained("{model_dir}", trust_remote_code=True)
    content = [{{"type": "image", "path": "PICTURE.png"}}, {{"type": "text", "text": "Can you see the cat?"}}]
    inputs = processor.apply_chat_template(
        [{{"role": "user", "content": content}}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=32)
    print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
    )


if __name__ == "__main__":
    main()
