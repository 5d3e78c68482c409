"""Fine-tuning with LoRA from a recipe. A trained model learns a drawing style and is scored before and after."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel, get_peft_model

from ..data import VisionLanguageCollator
from ..demo import conversations
from ..demo.scenes import load_new_style
from ..evaluation import exact_match, generate_answers
from ..training.models import from_checkpoint
from ..training.processes import save_and_part, start_run
from ..training.trainer import SparseMoeTrainer
from ..training.training_settings import compute_router_losses
from .config import num_adapter_parameters
from .recipes import LoraRecipe
from .selection import expert_lora_config

SPLIT_TITLES = {"test_style": "the new style", "test": "the original style"}


class LoraRun:
    """
    A fine-tuning run. The constructor makes the data of a recipe and adds adapters to its model. Call `train` before
    `evaluate`. The methods print their results as text.

    Args:
        recipe ([`~toolbox.expert_lora.recipes.LoraRecipe`]):
            Recipe of the run.
        output_dir (`Path`):
            Folder to write to.
        resume (`bool`, *optional*, defaults to `False`):
            Whether to resume from the last complete checkpoint in `output_dir`.

    Raises:
        ValueError: If a value of the recipe is invalid, or if there is no checkpoint to resume from.
        OSError: If the model cannot be read, or if `output_dir` cannot be written to.
    """

    def __init__(self, recipe: LoraRecipe, output_dir: Path, resume: bool = False) -> None:
        self.recipe, self.output_dir = recipe, output_dir
        hidden = {"label_names": ["labels"]}  # `Trainer` cannot find them in the signature of a model with adapters
        self.arguments, self.checkpoint = start_run(output_dir, resume, **hidden, **recipe.training)
        self.data = load_new_style(**recipe.data)
        model, self.processor = from_checkpoint(recipe.model)
        compute_router_losses(model)
        self.num_parameters = model.num_parameters()
        self.model = get_peft_model(model, expert_lora_config(model, **recipe.lora))
        self.num_trained = num_adapter_parameters(self.model)
        self.metrics: dict[str, Any] = {}

    @property
    def adapter_dir(self) -> Path:
        """Folder of the trained adapter."""
        return self.output_dir / "adapter"

    def print_size(self) -> None:
        """Prints the number of parameters that are trained."""
        if self.arguments.process_index == 0:
            share = f"{self.num_trained / self.num_parameters:.1%} of the model's {self.num_parameters:,}"
            print(f"Trains {self.num_trained:,} parameters, {share}.")

    def train(self) -> bool:
        """
        Trains the adapter and saves it.

        Returns:
            `bool`: Whether this process does the rest. Only the main process does.
        """
        start = time.time()
        trainer = SparseMoeTrainer(
            model=self.model,
            args=self.arguments,
            data_collator=VisionLanguageCollator(self.processor),
            train_dataset=conversations(self.data["train"]),
            processing_class=self.processor,
        )
        trainer.train(resume_from_checkpoint=self.checkpoint)
        self.metrics = {
            "num_parameters": self.num_parameters,
            "num_trained_parameters": self.num_trained,
            "training_seconds": round(time.time() - start, 1),
        }
        trainer.processing_class = None  # not saved with the adapter, because the model has its processor
        if not save_and_part(trainer, self.adapter_dir):
            return False
        if self.arguments.world_size > 1:  # this process may have only a part of the trained model
            base = from_checkpoint(self.recipe.model)[0]
            self.model = PeftModel.from_pretrained(base, self.adapter_dir).to(self.arguments.device)
        return True

    def evaluate(self) -> dict[str, Any]:
        """
        Scores the model without and with the adapter, prints the scores and writes `metrics.json`.

        Returns:
            `dict[str, Any]`: `num_parameters`, `num_trained_parameters`, `training_seconds` and, for each split, the
            exact match in percent `before` and `after`.
        """
        with self.model.disable_adapter():
            before = {split: self._score(self.data[split]) for split in SPLIT_TITLES}
        after = {split: self._score(self.data[split]) for split in SPLIT_TITLES}
        self.metrics |= {split: {"before": before[split], "after": after[split]} for split in SPLIT_TITLES}
        (self.output_dir / "metrics.json").write_text(json.dumps(self.metrics, indent=2))
        print(f"\n{'Exact match in percent, held-out scenes in':<48}{'before':>8}{'after':>8}")
        for split, title in SPLIT_TITLES.items():
            print(f"{title:<48}{before[split]:>8.1f}{after[split]:>8.1f}")
        return self.metrics

    def print_how_to_load(self) -> None:
        """Prints the Python code that loads the adapter."""
        has_experts = bool(self.model.active_peft_config.target_parameters)
        texts = {"output_dir": self.output_dir, "adapter_dir": self.adapter_dir, "model": self.recipe.model}
        print(HOW_TO_LOAD.format(**texts, **(FACTORED if has_experts else dict.fromkeys(FACTORED, ""))))

    def _score(self, rows: Dataset) -> float:
        return exact_match(generate_answers(self.model, self.processor, conversations(rows)), rows["answer"])


HOW_TO_LOAD = """
Wrote the adapter and the metrics to {output_dir}.
Load it:

    from peft import PeftModel
    from transformers import AutoModelForImageTextToText
    {imported}
    model = AutoModelForImageTextToText.from_pretrained("{model}", trust_remote_code=True)
    model = PeftModel.from_pretrained(model, "{adapter_dir}"){factored}"""
FACTORED = {
    "imported": "from modeling_sparse_moe_vlm.toolbox.expert_lora import factor_expert_lora\n    ",
    "factored": "\n    factor_expert_lora(model)  # optional: runs the adapter faster",
}
