"""Stages of a training run: their values, folders and progress."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ...checks import check
from .checkpoints import last_whole_checkpoint
from .parts import describe_parts, train_parts


@dataclass(frozen=True)
class Stage:
    """
    A stage of a run.

    Args:
        name (`str`):
            Its name. Empty if the recipe has no stages.
        training (`dict`):
            Arguments of [`~transformers.TrainingArguments`].
        parts (`dict`):
            As in [`~toolbox.training.train_parts`].
        data (`dict`):
            The section `data`.
    """

    name: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def stages_of(
    stages: Sequence[Mapping[str, Any]],
    training: Mapping[str, Any],
    parts: Mapping[str, Any],
    data: Mapping[str, Any],
) -> list[Stage]:
    """
    Returns the stages of a recipe with all values: `training` and `data` of a stage override values of the recipe, and
    `parts` of a stage replace those of the recipe. A recipe without stages has one stage without a name.
    """
    if not stages:
        return [Stage("", dict(training), dict(parts), dict(data))]
    return [
        Stage(
            stage["name"],
            {**training, **stage.get("training", {})},
            dict(stage.get("parts", parts)),
            {**data, **stage.get("data", {})},
        )
        for stage in stages
    ]


def describe_stage(model: PreTrainedModel, stage: Stage, arguments: TrainingArguments) -> str:
    """
    Describes what trains in a stage, as [`~toolbox.training.describe_parts`] does. The model stays as it is.

    Raises:
        ValueError: If the model does not have one of the parts, or if nothing would train. The message names the stage.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        train_parts(model, stage.parts, arguments)
        return describe_parts(model, stage.parts, arguments.learning_rate)
    except ValueError as error:
        check(not stage.name, f"{error} (in the stage {stage.name!r})")
        raise
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


class StageFolders:
    """
    The folders of the stages of a run. `checkpoints/NAME` has the checkpoints of a stage, `stages/NAME` has the model
    after each stage except the last one, and `stages/NAME.json` has the metrics of the stage.

    Args:
        output_dir (`Path`):
            Folder of the run.
        stages (`Sequence[Stage]`):
            The stages.
    """

    def __init__(self, output_dir: Path, stages: Sequence[Stage]) -> None:
        self.output_dir, self.stages = output_dir, stages

    def checkpoints(self, number: int) -> Path:
        """Returns the folder of the checkpoints of a stage."""
        return self.output_dir / "checkpoints" / self.stages[number].name

    def model(self, number: int) -> Path:
        """Returns the folder of the model after a stage."""
        return self.output_dir / "stages" / self.stages[number].name

    def num_finished(self) -> int:
        """Returns the number of stages, before the last one, after which the model was saved."""
        last = len(self.stages) - 1
        return next((number for number in range(last) if not self.model(number).is_dir()), last)

    def find_checkpoint(self, number: int, arguments: TrainingArguments) -> str | None:
        """
        Finds the checkpoint from which to resume a stage.

        Raises:
            ValueError: If there is none, and no stage before is finished.
        """
        try:
            return last_whole_checkpoint(arguments)
        except ValueError:
            if number == 0:
                raise
            return None

    def clear(self) -> None:
        """Removes the models after stages of an earlier run, from which a resumed run would continue."""
        if self.stages[0].name:
            shutil.rmtree(self.output_dir / "stages", ignore_errors=True)

    def resume_note(self, number: int, checkpoint: str | None) -> str | None:
        """Returns a sentence about where a resumed run continues, or `None` for other runs."""
        if number == 0 and (checkpoint is None or not self.stages[0].name):
            return None
        where = "its start" if checkpoint is None else checkpoint
        return f"The training resumes in the stage {self.stages[number].name} from {where}."

    def title(self, number: int) -> str:
        """Returns the title of a stage for progress messages."""
        return f"Stage {self.stages[number].name} ({number + 1} of {len(self.stages)})"

    def begin(self, number: int) -> None:
        """Removes checkpoints of an earlier run of a stage."""
        if self.stages[number].name:
            shutil.rmtree(self.checkpoints(number), ignore_errors=True)

    def write_metrics(self, number: int, trainer: Trainer, output: TrainOutput, seconds: float) -> None:
        """Writes the metrics of a stage after its training. Runs without stages have none."""
        if not self.stages[number].name or not trainer.is_world_process_zero():
            return
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        metrics = {
            "steps": output.global_step,
            "training_seconds": round(seconds, 1),
            "train_loss": output.training_loss,
            "num_trained_parameters": sum(parameter.numel() for parameter in trained),
        }
        evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        if evaluations:
            metrics["eval_loss"] = evaluations[-1]["eval_loss"]
        path = self.output_dir / "stages" / f"{self.stages[number].name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(metrics, indent=2), encoding="utf-8")

    def read_metrics(self) -> dict[str, Any]:
        """Returns the metrics of the stages that are finished, by name."""
        paths = {stage.name: self.output_dir / "stages" / f"{stage.name}.json" for stage in self.stages}
        return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}
