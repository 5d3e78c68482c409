"""Fine-tuning with LoRA from a recipe. A trained model is scored before and after."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import set_seed

from ..data import VisionLanguageCollator
from ..demo import conversations
from ..demo.scenes import load_new_style
from ..evaluation import exact_match, generate_answers
from ..hub import write_model_card
from ..training.models import from_checkpoint, is_language_model
from ..training.own_callbacks import check_evaluation, check_questions_about_scenes
from ..training.own_data import check_own_data, has_evaluation, is_own
from ..training.own_report import OwnReport
from ..training.parts import train_parts
from ..training.processes import make_arguments, save_and_part, save_complete, start_processes
from ..training.run_data import OwnRows, new_skipped_rows
from ..training.stage_training import train_stage
from ..training.stages import StageFolders, describe_stage, stages_of
from ..training.trainer import SparseMoeTrainer
from ..training.training_settings import compute_router_losses
from .config import num_adapter_parameters
from .dense_models import lora_config_of
from .recipes import LoraRecipe

SPLIT_TITLES = {"test_style": "the new style", "test": "the original style"}


class LoraRun:
    """
    A fine-tuning run. The constructor loads the data of a recipe and adds adapters to its model. Call `train` before
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
        OSError: If the model or the data cannot be read, or if `output_dir` cannot be written to.
    """

    def __init__(self, recipe: LoraRecipe, output_dir: Path, resume: bool = False) -> None:
        self.recipe, self.output_dir = recipe, output_dir
        self.is_own = is_own(recipe.data)
        self.stages = stages_of(recipe.stages, recipe.training, recipe.parts, recipe.data)
        self.folders = StageFolders(output_dir, self.stages)
        hidden = {"label_names": ["labels"]}  # `Trainer` cannot find them in the signature of a model with adapters
        self.stage_arguments = [
            make_arguments(self.folders.checkpoints(number), **hidden, **stage.training)
            for number, stage in enumerate(self.stages)
        ]
        if self.is_own:
            for stage, arguments in zip(self.stages, self.stage_arguments, strict=True):
                check_own_data(stage.data, arguments.max_steps)
                check_evaluation(recipe.evaluation, arguments, has_evaluation(stage.data))
        else:
            for arguments in self.stage_arguments:
                check_questions_about_scenes(recipe, arguments)
        self.first = self.folders.num_finished() if resume else 0
        self.checkpoint = self.folders.find_checkpoint(self.first, self.stage_arguments[self.first]) if resume else None
        self.arguments = self.stage_arguments[self.first]
        start_processes(output_dir, self.arguments)
        self.skipped = new_skipped_rows(output_dir, resume) if self.is_own else None
        base, self.processor = self._load_base()
        self.num_parameters = base.num_parameters()
        self._load_data(self.first, base)
        self.model: PeftModel = self._with_adapters(self.first, base)
        self.num_trained = num_adapter_parameters(self.model)
        self.plan = [
            describe_stage(self.model, stage, arguments)
            for stage, arguments in zip(self.stages, self.stage_arguments, strict=True)
        ]
        if recipe.parts and not recipe.stages:
            train_parts(self.model, recipe.parts, self.arguments)
            self.num_trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.metrics: dict[str, Any] = {}

    @property
    def adapter_dir(self) -> Path:
        """Folder of the trained adapter."""
        return self.output_dir / "adapter"

    def print_size(self) -> None:
        """
        Prints the number of parameters of the adapters and, if the recipe has `parts` or `stages`, what trains of each
        part, by stage.
        """
        if self.arguments.process_index != 0:
            return
        share = f"{self.num_trained / self.num_parameters:.1%} of the model's {self.num_parameters:,}"
        print(f"Trains {self.num_trained:,} parameters, {share}.")
        for stage, parts in zip(self.stages, self.plan, strict=True):
            if stage.name:
                print(f"\nStage {stage.name}:\n{parts}")
            elif stage.parts:
                print(parts)
        if note := self.folders.resume_note(self.first, self.checkpoint):
            print(f"\n{note}")

    def train(self) -> bool:
        """
        Trains the adapter in all stages and saves it. Writes the recipe, with all overrides, to `recipe.yaml` before
        that.

        Returns:
            `bool`: Whether this process does the rest. Only the main process does.
        """
        is_first = self.arguments.process_index == 0
        if is_first:
            (self.output_dir / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
            if self.first == 0 and self.checkpoint is None:
                self.folders.clear()
        start = time.time()
        for number in range(self.first, len(self.stages)):
            if number > self.first:
                self._enter(number)
            trainer = self._train_stage(number)
            trainer.processing_class = None  # not saved with the adapter, because the model has its processor
            if number < len(self.stages) - 1:
                save_complete(trainer, self.folders.model(number))
        self.metrics = {
            "num_parameters": self.num_parameters,
            "num_trained_parameters": self.num_trained,
            "training_seconds": round(time.time() - start, 1),
        }
        if self.stages[0].name and is_first:
            self.metrics["stages"] = self.folders.read_metrics()
        if not save_and_part(trainer, self.adapter_dir):
            return False
        if self.arguments.world_size > 1:  # this process may have only a part of the trained model
            base = self._load_base()[0]
            self.model = PeftModel.from_pretrained(base, self.adapter_dir).to(self.arguments.device)
        return True

    def evaluate(self) -> dict[str, Any]:
        """
        Scores the model without and with the adapter, prints the scores and writes `metrics.json`.

        Returns:
            `dict[str, Any]`: `num_parameters`, `num_trained_parameters`, `training_seconds` and the scores `before` and
            `after`: of own data for each metric of `eval`; of the built-in data the exact match in percent of each
            split.
        """
        if self.own_report is not None:
            with self.model.disable_adapter():
                before = self.own_report.evaluate(self.model, self.processor).get("eval", {})
            after = self.own_report.evaluate(self.model, self.processor).get("eval", {})
            if after:
                self.metrics["eval"] = {name: {"before": before[name], "after": after[name]} for name in after}
            title, rows = "Scores on the rows for evaluation", {name: (before[name], after[name]) for name in after}
        else:
            with self.model.disable_adapter():
                before = {split: self._score(self.scenes[split]) for split in SPLIT_TITLES}
            after = {split: self._score(self.scenes[split]) for split in SPLIT_TITLES}
            self.metrics |= {split: {"before": before[split], "after": after[split]} for split in SPLIT_TITLES}
            title = "Exact match in percent, held-out scenes in"
            rows = {name: (before[split], after[split]) for split, name in SPLIT_TITLES.items()}
        (self.output_dir / "metrics.json").write_text(json.dumps(self.metrics, indent=2))
        write_model_card(self.adapter_dir)
        if self.own_report is not None:
            self.own_report.add_to_card(self.adapter_dir)
        if not rows:
            print("\nThe model is not evaluated: name rows for evaluation with `data.eval` or `data.eval_split`.")
            return self.metrics
        print(f"\n{title:<48}{'before':>8}{'after':>8}")
        for name, (old, new) in rows.items():
            print(f"{name:<48}{old:>8.1f}{new:>8.1f}")
        return self.metrics

    def print_how_to_load(self) -> None:
        """Prints the Python code that loads the adapter, and the number of skipped rows."""
        has_experts = bool(self.model.active_peft_config.target_parameters)
        auto_class = "AutoModelForCausalLM" if is_language_model(self.model.config) else "AutoModelForImageTextToText"
        texts = {
            "output_dir": self.output_dir,
            "adapter_dir": self.adapter_dir,
            "model": self.recipe.model,
            "auto_class": auto_class,
        }
        print(HOW_TO_LOAD.format(**texts, **(FACTORED if has_experts else dict.fromkeys(FACTORED, ""))))
        if self.skipped is not None and (summary := self.skipped.summary()):
            print(f"\n{summary}")

    def _load_base(self) -> tuple[Any, Any]:
        """Returns the model without adapters, and its processor."""
        model, processor = from_checkpoint(self.recipe.model, language_models=self.is_own)
        compute_router_losses(model)
        return model, processor

    def _load_data(self, number: int, base: Any) -> None:
        """Loads the data of a stage. Packing runs the model to check that it supports packed rows."""
        data = self.stages[number].data
        self.collator, self.own_report = VisionLanguageCollator(self.processor), None
        if self.skipped is None:
            self.scenes = load_new_style(**data)
            return
        self.own = OwnRows(data, self.skipped)
        self.own.use(self.processor)
        self.collator = self.own.collator(self.processor, base)
        self.own_report = OwnReport(self.own, self.output_dir, self.recipe.task, self.recipe.evaluation)

    def _with_adapters(self, number: int, base: Any) -> Any:
        """Returns the model with adapters: new ones in the first stage, then those of the stage before."""
        model = get_peft_model(base, lora_config_of(base, self.recipe.lora))
        if number > 0:
            model.load_adapter(str(self.folders.model(number - 1)), "default", is_trainable=True)
        return model

    def _enter(self, number: int) -> None:
        """Loads the adapters after the stage before, as a resumed run does, and the data if they differ."""
        self.arguments = self.stage_arguments[number]
        set_seed(self.arguments.seed)
        base = self._load_base()[0]
        if self.stages[number].data != self.stages[number - 1].data:
            self._load_data(number, base)
        self.model = self._with_adapters(number, base)

    def _train_stage(self, number: int) -> SparseMoeTrainer:
        arguments = self.stage_arguments[number]
        return train_stage(
            self.folders,
            number,
            self.stages[number],
            arguments,
            self.checkpoint if number == self.first else None,
            self.model,
            data_collator=self.collator,
            train_dataset=self.own.train if self.is_own else conversations(self.scenes["train"]),
            eval_dataset=self.own.eval if self.is_own else None,
            processing_class=self.processor,
            callbacks=[] if self.own_report is None else self.own_report.callbacks(arguments, self.processor),
        )

    def _score(self, rows: Dataset) -> float:
        return exact_match(generate_answers(self.model, self.processor, conversations(rows)), rows["answer"])


HOW_TO_LOAD = """
Wrote the adapter and the metrics to {output_dir}.
Load it:

    from peft import PeftModel
    from transformers import {auto_class}
{imported}
    model = {auto_class}.from_pretrained("{model}", trust_remote_code=True)
    model = PeftModel.from_pretrained(model, "{adapter_dir}"){factored}"""
FACTORED = {
    "imported": "    from modeling_sparse_moe_vlm.toolbox.expert_lora import factor_expert_lora\n",
    "factored": "\n    factor_expert_lora(model)  # optional: runs the adapter faster",
}
