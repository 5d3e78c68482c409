"""A training run: turns a recipe into a folder with the model, its model card, its scores and figures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from ..data import VisionLanguageCollator
from ..demo import conversations, load_scenes
from ..evaluation import generate_answers
from ..evaluation.by_kind import SPLIT_TITLES, example_answers, score_by_kind, score_table
from ..evaluation.metrics.exact_match.exact_match import is_right
from ..expert_modules import our_experts_config
from ..extras import check_installed
from ..hub import write_model_card
from ..model_size import describe_size
from ..routing import expert_load
from .models import from_checkpoint, from_scratch
from .parts import describe_parts, train_parts
from .processes import save_and_part, start_run
from .recipes import Recipe, find_model
from .trainer import SparseMoeTrainer
from .training_settings import compute_router_losses

NUM_DRAWN_ANSWERS = 12
NUM_ROUTED_ROWS = 256
ROUTED_BATCH = 64


class TrainingRun:
    """
    A training run, which generates the data of a recipe and creates its model. Call the methods in the order `train`,
    `evaluate`, `draw`. They print their results.

    Args:
        recipe ([`~toolbox.training.recipes.Recipe`]):
            The recipe.
        output_dir (`Path`):
            Folder for all outputs.
        resume (`bool`, *optional*, defaults to `False`):
            Whether to resume from the last complete checkpoint in the output folder.

    Raises:
        ValueError: If a value of the recipe is invalid, or if there is no checkpoint to resume from.
        OSError: If the model cannot be read, or if the folder cannot be written to.
    """

    def __init__(self, recipe: Recipe, output_dir: Path, resume: bool = False) -> None:
        self.recipe, self.output_dir = recipe, output_dir
        model_path = find_model(recipe.model)
        self.arguments, self.checkpoint = start_run(output_dir, resume, **recipe.training)
        self.data = load_scenes(**recipe.data)
        if model_path.endswith(".json"):
            self.model, self.processor = from_scratch(model_path, self.data["train"], **recipe.tokenizer)
        else:
            self.model, self.processor = from_checkpoint(model_path)
            compute_router_losses(self.model)
        self.optimizer = train_parts(self.model, recipe.parts, self.arguments)
        experts = our_experts_config(self.model.config)
        self.is_upcycled = bool(getattr(experts, "start", None))  # the configuration then names the base model
        self.base_model = None if Path(model_path).exists() else model_path
        self.collator = VisionLanguageCollator(self.processor)
        self.heldout = [split for split in SPLIT_TITLES if split in self.data]
        self.metrics: dict[str, Any] = {}
        self.answers: dict[str, list[str]] = {}

    @property
    def model_dir(self) -> Path:
        """Folder of the trained model."""
        return self.output_dir / "model"

    def print_model(self) -> None:
        """Prints the size of the model, what trains and, if the model resizes the images, their new size."""
        if self.arguments.process_index == 0:
            print(describe_size(self.model))
            print(describe_parts(self.model, self.recipe.parts, self.arguments.learning_rate))
            if note := resizing_note(self.model, self.data["train"][0]["image"].size):
                print(note)

    def train(self) -> bool:
        """
        Trains the model and saves it. Writes the recipe, with all overrides, to `recipe.yaml` before that.

        Returns:
            `bool`: Whether this process does the remaining steps. Only the first process does.
        """
        if self.arguments.process_index == 0:
            (self.output_dir / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
        start = time.time()
        trainer = SparseMoeTrainer(
            model=self.model,
            args=self.arguments,
            data_collator=self.collator,
            train_dataset=conversations(self.data["train"]),
            processing_class=self.processor,
            optimizer_cls_and_kwargs=self.optimizer,
        )
        trainer.train(resume_from_checkpoint=self.checkpoint)
        self.metrics["training_seconds"] = round(time.time() - start, 1)
        # Save at once, so that nothing is lost if a later step fails.
        if not save_and_part(trainer, self.model_dir):
            return False
        if self.arguments.world_size > 1:  # this process may have only a part of the trained model
            self.model = from_checkpoint(str(self.model_dir))[0].to(self.arguments.device)
        return True

    def evaluate(self) -> dict[str, Any]:
        """
        Scores the answers to the held-out questions, and writes `metrics.json` and the model card.

        Returns:
            `dict[str, Any]`: `training_seconds`, and the scores of [`~toolbox.evaluation.by_kind.score_by_kind`] by
            split.
        """
        for split in self.heldout:
            rows = self.data[split]
            self.answers[split] = generate_answers(self.model, self.processor, conversations(rows))
            self.metrics[split] = score_by_kind(self.data["train"], rows, self.answers[split])
        (self.output_dir / "metrics.json").write_text(json.dumps(self.metrics, indent=2))
        write_model_card(
            self.model_dir,
            config=self.model.config,
            metrics=self.metrics,
            recipe=self.recipe,
            base_model=None if self.is_upcycled else self.base_model,
        )
        for split in self.heldout:
            print(f"\nExact match in percent, {SPLIT_TITLES[split]}:\n{score_table(self.metrics[split])}")
        print("\nQuestions from held-out arrangements (blind: the best guess from the question alone):")
        print(example_answers(self.data["train"], self.data["test"], self.answers["test"]))
        return self.metrics

    def draw(self) -> None:
        """
        Writes `scene.png` (an image to ask about). If matplotlib is installed, also writes `answers.png` and
        `expert_load.png` (the load of the experts).
        """
        test, answers = self.data["test"], self.answers["test"]
        test[0]["image"].save(self.output_dir / "scene.png")
        try:
            check_installed("matplotlib", "report", "Drawing `answers.png` and `expert_load.png`")
        except ValueError as error:
            print(error)
            return
        from ..demo import drawings

        is_correct = [is_right(answer, row) for answer, row in zip(answers, test["answer"], strict=True)]
        shown = drawings.some_of_each(is_correct, NUM_DRAWN_ANSWERS)
        num_wrong = sum(not is_correct[i] for i in shown)
        drawings.draw_answers(
            [test[i] for i in shown],
            [answers[i] for i in shown],
            self.output_dir / "answers.png",
            title=f"{sum(is_correct)} of {len(test)} held-out questions answered correctly. "
            f"Shown: {len(shown) - num_wrong} correct and {num_wrong} wrong answers.",
        )
        rows = conversations(test.select(range(min(NUM_ROUTED_ROWS, len(test)))))
        batches = DataLoader(rows, batch_size=ROUTED_BATCH, collate_fn=self.collator)
        has_groups = our_experts_config(self.model.config) is not None
        load = expert_load(self.model.eval(), batches) if has_groups else {}
        if load:
            drawings.draw_expert_load(load, self.output_dir / "expert_load.png")
        else:
            print("`expert_load.png` is not written: the model has no routed experts of this package.")

    def print_how_to_load(self) -> None:
        """Prints a command and example code that ask the trained model a question."""
        question = self.data["test"][0]["question"]
        print(HOW_TO_LOAD.format(output_dir=self.output_dir, model_dir=self.model_dir, question=question))


def resizing_note(model, size: tuple[int, int]) -> str | None:
    """
    Returns a note if a model resizes images of a given size.

    Args:
        model (`PreTrainedModel`):
            The model.
        size (`tuple[int, int]`):
            Width and height of an image.

    Returns:
        `str`: The note, or `None` if the image has the size of the model or the model accepts any size.
    """
    side = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    if not isinstance(side, int) or size == (side, side):
        return None
    return f"Note: images of {size[0]}×{size[1]} pixels are resized to the {side}×{side} of the model."


HOW_TO_LOAD = """
Wrote the model, the metrics and the figures to {output_dir}.
Ask the model about an image:

    sparse-moe-vlm generate --model {model_dir} --image {output_dir}/scene.png --question "{question}"

Or in Python, without this package:

    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained("{model_dir}", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained("{model_dir}", trust_remote_code=True)
    content = [{{"type": "image", "path": "{output_dir}/scene.png"}}, {{"type": "text", "text": "{question}"}}]
    inputs = processor.apply_chat_template(
        [{{"role": "user", "content": content}}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=32)
    print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
