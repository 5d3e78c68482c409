"""A base class for trainer callbacks that measure a sample of rows at every evaluation."""

from __future__ import annotations

import random
from typing import Any

from ...checks import check
from ..trainer_figures import FiguresCallback


class SampledMetrics(FiguresCallback):
    """
    Base class of callbacks that measure the same sample of rows at every evaluation of any trainer. The figures are
    added to the metrics of the evaluation as `eval_<name>`. With several evaluation datasets, they are measured once
    per evaluation. Evaluations with another `metric_key_prefix` than `"eval"`, such as `"test"`, are not measured.

    Subclasses override `measure`.

    Args:
        rows (`Sequence[dict]` or `Dataset`):
            Rows with a length.
        num_samples (`int`):
            Number of rows to sample. If there are not more rows, all of them are used.
        batch_size (`int`):
            Number of rows per batch in each process.
        seed (`int`):
            Seed of the sample.

    Attributes:
        sample (`list[int]`): Numbers of the sampled rows, in ascending order.

    Raises:
        TypeError: If the rows have no length, such as a stream.
        ValueError: If `num_samples` or `batch_size` is less than 1, or if there are no rows.
    """

    def __init__(self, rows: Any, num_samples: int, batch_size: int, seed: int) -> None:
        super().__init__()
        if not hasattr(rows, "__len__"):
            raise TypeError(
                "`rows` must have a length, so that every evaluation can use the same rows: for a stream, pass "
                "`list(rows.take(200))`."
            )
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            check(value >= 1, f"`{name}` must be at least 1, got {value}.")
        check(len(rows) > 0, "`rows` has no rows to evaluate.")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.sample = sorted(random.Random(seed).sample(range(len(rows)), min(num_samples, len(rows))))
        self._prefix: str | None = None

    def measure(self, args: Any, state: Any, model: Any) -> dict[str, float]:
        """
        Measures the sample. Called in all processes.

        Args:
            args (`TrainingArguments`):
                Arguments of the trainer.
            state (`TrainerState`):
                State of the trainer.
            model (`nn.Module`):
                Model of the trainer.

        Returns:
            `dict[str, float]`: The figures by name, without a prefix.
        """
        raise NotImplementedError

    def evaluation_figures(self, args, state, model, processing_class, prefix):
        """See [`FiguresCallback.evaluation_figures`]."""
        if prefix != "eval" and not prefix.startswith("eval_"):
            return {}
        if prefix != "eval":  # one of several datasets
            self._prefix = self._prefix or prefix
            if prefix != self._prefix:
                return {}
        return {f"eval_{name}": value for name, value in self.measure(args, state, model).items()}
