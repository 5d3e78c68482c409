"""A training run: turns a recipe into a folder with the model, its model card, its scores and figures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import set_seed

from ...checks import check
from ..expert_modules import our_experts_config
from ..hub import write_model_card
from ..hub.results import add_figures_to_card
from ..model_size import describe_size
from .how_to_load import how_to_ask
from .models import from_checkpoint, from_scratch, is_language_model
from .own_callbacks import check_evaluation, check_questions_about_scenes
from .own_data import check_own_data, has_evaluation, is_own
from .own_evaluation import RETRIEVAL
from .own_report import OwnReport
from .processes import make_arguments, part, save_complete, start_processes
from .processor_options import set_processor_options
from .recipes import Recipe, find_model
from .run_data import OwnRows, SceneCaptions, ScenesData, new_skipped_rows
from .scenes_report import ScenesReport, resizing_note
from .stage_training import train_stage
from .stages import StageFolders, describe_stage, stages_of
from .trainer import SparseMoeTrainer
from .training_settings import compute_router_losses

CAPTIONING = "captioning"


class TrainingRun:
    """
    A training run, which loads the data of a recipe and its model. Call the methods in the order `train`, `evaluate`,
    `draw`. They print their results.

    Args:
        recipe ([`~toolbox.training.recipes.Recipe`]):
            The recipe.
        output_dir (`Path`):
            Folder for all outputs.
        resume (`bool`, *optional*, defaults to `False`):
            Whether to resume from the last complete checkpoint in the output folder, in the stage where the run
            stopped.

    Raises:
        ValueError: If a value of the recipe is invalid, or if there is no checkpoint to resume from.
        OSError: If the model or the data cannot be read, or if the folder cannot be written to.
    """

    def __init__(self, recipe: Recipe, output_dir: Path, resume: bool = False) -> None:
        self.recipe, self.output_dir = recipe, output_dir
        model_path = find_model(recipe.model)
        check(
            recipe.dtype is None or not model_path.endswith(".json"),
            f"`dtype` of the recipe is for a checkpoint, but `model` is the configuration {recipe.model}: a model from "
            "scratch has float32 weights.",
        )
        self.stages = stages_of(recipe.stages, recipe.training, recipe.parts, recipe.data)
        self.folders = StageFolders(output_dir, self.stages)
        self.is_own = is_own(recipe.data)
        self.stage_arguments = [
            make_arguments(self.folders.checkpoints(number), **stage.training)
            for number, stage in enumerate(self.stages)
        ]
        for stage, arguments in zip(self.stages, self.stage_arguments, strict=True):
            if self.is_own:
                check_own_data(stage.data, arguments.max_steps)
                check_evaluation(recipe.evaluation, arguments, has_evaluation(stage.data))
            elif recipe.task in (CAPTIONING, RETRIEVAL):
                check_evaluation(recipe.evaluation, arguments, has_rows=True)
            else:
                check_questions_about_scenes(recipe, arguments)
        self.first = self.folders.num_finished() if resume else 0
        self.checkpoint = self.folders.find_checkpoint(self.first, self.stage_arguments[self.first]) if resume else None
        self.arguments = self.stage_arguments[self.first]
        start_processes(output_dir, self.arguments)
        self.skipped = new_skipped_rows(output_dir, resume) if self.is_own else None
        self.data = self._load_data(self.first)
        if self.first > 0:
            self._load_model(str(self.folders.model(self.first - 1)))
        elif model_path.endswith(".json"):
            self.model, self.processor = self._create(model_path)
        else:
            check(
                not recipe.config,
                f"`config` of the recipe is for a model from scratch, but `model` is the checkpoint {recipe.model}.",
            )
            self._load_model(model_path)
        set_processor_options(self.processor, recipe.processor)
        self.data.use(self.processor)
        experts = our_experts_config(self.model.config)
        self.is_upcycled = bool(getattr(experts, "start", None))  # the configuration then names the base model
        self.base_model = None if Path(model_path).exists() else model_path
        self.collator = self.data.collator(self.processor, self.model)
        self.plan = [
            describe_stage(self.model, stage, arguments)
            for stage, arguments in zip(self.stages, self.stage_arguments, strict=True)
        ]
        self.report = self._make_report()
        self.metrics: dict[str, Any] = {}

    @property
    def model_dir(self) -> Path:
        """Folder of the trained model."""
        return self.output_dir / "model"

    def print_model(self) -> None:
        """
        Prints the size of the model, what trains in each stage and, if the model resizes the scenes, their new size.
        """
        if self.arguments.process_index != 0:
            return
        print(describe_size(self.model))
        for stage, parts in zip(self.stages, self.plan, strict=True):
            print(f"\nStage {stage.name}:\n{parts}" if stage.name else parts)
        has_one_tile = getattr(self.processor, "max_tiles", 1) == 1
        size = (
            self.data.splits["train"][0]["image"].size if isinstance(self.data, ScenesData) and has_one_tile else None
        )
        if size is not None and (note := resizing_note(self.model, size)):
            print(note)
        if note := self.folders.resume_note(self.first, self.checkpoint):
            print(f"\n{note}")

    def train(self) -> bool:
        """
        Trains the model in all stages and saves it. Writes the recipe, with all overrides, to `recipe.yaml` before
        that.

        Returns:
            `bool`: Whether this process does the remaining steps. Only the first process does.
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
            is_last = number == len(self.stages) - 1
            # Save at once, so that nothing is lost if a later step fails.
            save_complete(trainer, self.model_dir if is_last else self.folders.model(number))
            if not is_last:
                del trainer
        self.metrics["training_seconds"] = round(time.time() - start, 1)
        if self.stages[0].name and is_first:
            self.metrics["stages"] = self.folders.read_metrics()
        if not part(trainer):
            return False
        if self.arguments.world_size > 1:  # this process may have only a part of the trained model
            path = str(self.model_dir)
            self.model = self._load(path)[0].to(self.arguments.device)
        return True

    def evaluate(self) -> dict[str, Any]:
        """
        Scores the answers to the held-out questions, and writes `metrics.json` and the model card.

        Returns:
            `dict[str, Any]`: `training_seconds`, the metrics of the `stages` if the recipe has any, and the scores: of
            own data `eval`; of the built-in data those of [`~toolbox.evaluation.by_kind.score_by_kind`] by split.
        """
        self.metrics |= self.report.evaluate(self.model, self.processor)
        (self.output_dir / "metrics.json").write_text(json.dumps(self.metrics, indent=2))
        write_model_card(
            self.model_dir,
            config=self.model.config,
            metrics=self.metrics,
            recipe=self.recipe,
            base_model=None if self.is_upcycled else self.base_model,
        )
        self.report.add_to_card(self.model_dir)
        self.report.print_scores()
        return self.metrics

    def draw(self) -> None:
        """
        Writes an image to ask about. Of the built-in data, also writes figures (see
        [`~toolbox.training.scenes_report.ScenesReport.draw`]), which the model card then shows.
        """
        add_figures_to_card(self.model_dir, self.report.draw(self.model, self.collator))

    def print_how_to_load(self) -> None:
        """Prints a command and example code that ask the trained model a question, and the number of skipped rows."""
        if isinstance(self.report, OwnReport):
            question, image = self.report.example()
            what = "the model and the metrics"
        else:
            question, image = self.report.data["test"][0]["question"], self.output_dir / "scene.png"
            what = "the model, the metrics and the figures"
        ask = how_to_ask(self.model_dir, question, image, is_language_model(self.model.config))
        about = "" if image is None else " about an image"
        print(f"\nWrote {what} to {self.output_dir}.\nAsk the model{about}:\n\n{ask}")
        if self.skipped is not None and (summary := self.skipped.summary()):
            print(f"\n{summary}")

    def _load_data(self, number: int) -> ScenesData | OwnRows:
        data = self.stages[number].data
        if self.is_own:
            return OwnRows(data, self.skipped)
        return SceneCaptions(data) if self.recipe.task == CAPTIONING else ScenesData(data)

    def _create(self, path: str) -> tuple[Any, Any]:
        """Returns a new model and its processor."""
        return from_scratch(path, self.data.examples, **self.recipe.tokenizer, config_fields=self.recipe.config)

    def _load(self, path: str) -> tuple[Any, Any]:
        """Returns the model of a checkpoint and its processor."""
        return from_checkpoint(path, language_models=self.is_own, dtype=self.recipe.dtype or "float32")

    def _load_model(self, path: str) -> None:
        self.model, self.processor = self._load(path)
        compute_router_losses(self.model)

    def _enter(self, number: int) -> None:
        """Loads the model after the stage before, as a resumed run does, and the data if they differ."""
        self.arguments = self.stage_arguments[number]
        set_seed(self.arguments.seed)
        self._load_model(str(self.folders.model(number - 1)))
        if self.stages[number].data != self.stages[number - 1].data:
            self.data = self._load_data(number)
            self.data.use(self.processor)
            self.collator = self.data.collator(self.processor, self.model)
            self.report = self._make_report()

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
            train_dataset=self.data.train,
            eval_dataset=self.data.eval,
            processing_class=self.processor,
            callbacks=self.report.callbacks(arguments, self.processor),
        )

    def _make_report(self) -> ScenesReport | OwnReport:
        if isinstance(self.data, ScenesData):
            return ScenesReport(self.data.splits, self.output_dir)
        return OwnReport(self.data, self.output_dir, self.recipe.task, self.recipe.evaluation)
