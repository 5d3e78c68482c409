"""A base class for callbacks that add figures to the logs and the evaluation metrics of any trainer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler


class FiguresCallback(TrainerCallback):
    """
    Base class of callbacks that add figures to the logs of a trainer (`Trainer` and its subclasses, such as those of
    TRL), so that every other callback receives them: TensorBoard, W&B, trackio and so on.

    `Trainer` calls callbacks in the order of its list, in which those of integrations come first. Therefore, this
    callback moves itself to the front of the list when a trainer is created or starts to train or to evaluate. Figures
    of an evaluation are also added to its metrics, before early stopping and the choice of the best checkpoint.

    Subclasses override `training_figures`, `training_details` and `evaluation_figures`. The trainer calls them in all
    processes.
    """

    def __init__(self) -> None:
        self._evaluation: dict[str, float] = {}
        self._remover = _DetailsRemover()

    def training_figures(self, args: Any, model: Any) -> dict[str, float]:
        """
        Returns the figures that are added to a log of the training loss.

        Args:
            args (`TrainingArguments`):
                Arguments of the trainer.
            model (`nn.Module`):
                Model of the trainer.

        Returns:
            `dict[str, float]`: Figures by name.
        """
        return {}

    def training_details(self, args: Any) -> dict[str, float]:
        """
        Returns further figures of the same log. Integrations receive them, but they are neither printed nor stored in
        the trainer's state, because there can be thousands. Called after `training_figures`.

        Args:
            args (`TrainingArguments`):
                Arguments of the trainer.

        Returns:
            `dict[str, float]`: Figures by name.
        """
        return {}

    def evaluation_figures(
        self, args: Any, state: Any, model: Any, processing_class: Any, prefix: str
    ) -> dict[str, float]:
        """
        Returns the figures that are added to the metrics of an evaluation.

        Args:
            args (`TrainingArguments`):
                Arguments of the trainer.
            state (`TrainerState`):
                State of the trainer.
            model (`nn.Module`):
                Model of the trainer.
            processing_class (`ProcessorMixin`, *optional*):
                Processor of the trainer.
            prefix (`str`):
                Prefix of the metrics, such as `"eval"`, or `"eval_<name>"` with several evaluation datasets.

        Returns:
            `dict[str, float]`: Figures by their whole name, including the prefix.
        """
        return {}

    def on_init_end(self, args, state, control, **kwargs):
        """Called by `Trainer` at the end of its initialization."""
        self._go_first()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Called by `Trainer` before training."""
        self._go_first()

    def on_prediction_step(self, args, state, control, **kwargs):
        """Called by `Trainer` after every batch of an evaluation."""
        self._go_first()

    def on_log(self, args, state, control, logs=None, model=None, processing_class=None, **kwargs):
        """Called by `Trainer` in all processes, after it has appended the logs to the history."""
        logs = {} if logs is None else logs
        prefix = evaluation_prefix(logs)
        details: dict[str, float] = {}
        if "loss" in logs:
            figures = self.training_figures(args, model)
            details = self.training_details(args)
        elif prefix is not None:
            figures = self._evaluation = self.evaluation_figures(args, state, model, processing_class, prefix)
        else:
            return
        state.log_history[-1].update(figures)
        logs.update(figures | details)
        self._remover.names = list(details)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Called by `Trainer` after every evaluation. Some trainers log a copy of the metrics, so adds them again."""
        if metrics is not None:
            metrics.update(self._evaluation)
        self._evaluation = {}

    def _go_first(self) -> None:
        handler = _handler_of(self)
        if handler is None:
            return
        callbacks = [callback for callback in handler.callbacks if not isinstance(callback, _DetailsRemover)]
        first = [callback for callback in callbacks if isinstance(callback, FiguresCallback)]
        last = [callback for callback in callbacks if isinstance(callback, (PrinterCallback, ProgressCallback))]
        others = [callback for callback in callbacks if callback not in first and callback not in last]
        wanted = [*first, *others, *(callback._remover for callback in first), *last]
        if wanted != handler.callbacks:
            # A new list, because the handler is iterating over the present one.
            handler.callbacks = wanted


class _DetailsRemover(TrainerCallback):
    """Removes the details from a log before it is printed."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in self.names:
            logs.pop(name, None)
        self.names = []


def evaluation_prefix(logs: Mapping[str, Any]) -> str | None:
    """
    Returns the prefix of the metrics of an evaluation, which always contain a runtime.

    Args:
        logs (`Mapping[str, Any]`):
            Logs of a trainer.

    Returns:
        `str`, *optional*: The prefix, such as `"eval"`. `None` if these are not the logs of an evaluation.
    """
    prefixes = [name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")]
    return prefixes[0] if prefixes and prefixes != ["train"] else None


def _handler_of(callback: TrainerCallback) -> CallbackHandler | None:
    """
    Returns the handler that is calling a callback. `Trainer` does not pass it to callbacks, so it is searched for among
    the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and any(one is callback for one in handler.callbacks):
            return handler
        frame = frame.f_back
    return None
