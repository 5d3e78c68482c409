"""A trainer callback that measures recall and median rank at every evaluation of a retrieval model."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ...checks import check
from ..data.retrieval import read_pair
from ..evaluation.retrieval import rank_rows
from .sampled_metrics import SampledMetrics


class RetrievalMetrics(SampledMetrics):
    """
    A callback that measures retrieval during evaluation, in any trainer of a retrieval model: `Trainer` and its
    subclasses, or [`~toolbox.training.SparseMoeTrainer`]. At every evaluation, the model embeds the images and captions
    of the same sample of rows. The figures of [`~toolbox.evaluation.evaluate_retrieval`] are added to the metrics of
    the evaluation, such as `eval_text_to_image/recall@1`, so they are logged, and `metric_for_best_model`,
    `load_best_model_at_end` and `EarlyStoppingCallback` can use them.

    The fewer rows are sampled, the fewer candidates there are, and the higher is the recall. Compare only figures of
    the same number of rows.

    Several processes share the rows, and all of them get the same figures. If the parts of the model are spread over
    processes (FSDP2, expert and tensor parallelism), all processes embed all rows. Training is not affected: the modes
    of the modules are restored. With several evaluation datasets, the figures are measured once per evaluation.
    Evaluations with another `metric_key_prefix` than `"eval"`, such as `"test"`, are not measured.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of the model.
        rows (`Sequence[Mapping]` or `Dataset`):
            Rows with a length, in the form that [`~toolbox.data.RetrievalCollator`] takes, such as those of
            [`~toolbox.data.load_pairs`].
        num_samples (`int`, *optional*, defaults to 1000):
            Number of rows to sample. If there are not more rows, all of them are used.
        batch_size (`int`, *optional*, defaults to 64):
            Number of texts or images per batch in each process.
        embedding_size (`int`, *optional*):
            Number of components of the embeddings. Defaults to all.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sample.

    Attributes:
        sample (`list[int]`): Numbers of the sampled rows, in ascending order.

    Raises:
        TypeError: If the rows have no length, such as a stream.
        ValueError: If `num_samples` or `batch_size` is less than 1, if there are no rows, or if a row is malformed.
            Raised when the trainer is created or starts to train if a median rank chooses the best model and
            `greater_is_better` is not `False`.

    Example:

    ```python
    >>> from transformers import Trainer
    >>> from modeling_sparse_moe_vlm.toolbox.training import RetrievalMetrics

    >>> trainer = Trainer(model, arguments, …, callbacks=[RetrievalMetrics(processor, rows)])
    ```
    """

    def __init__(
        self,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        rows: Any,
        num_samples: int = 1000,
        batch_size: int = 64,
        embedding_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rows, num_samples, batch_size, seed)
        self.processor, self.embedding_size = processor, embedding_size
        for number in self.sample:
            read_pair(rows[number], number)  # finds malformed rows before the training

    def on_init_end(self, args, state, control, **kwargs):
        """Called by `Trainer` at the end of its initialization."""
        super().on_init_end(args, state, control, **kwargs)
        check_direction(args)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Called by `Trainer` before training."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        check_direction(args)

    def measure(self, args, state, model):
        """See [`SampledMetrics.measure`]."""
        # Images of datasets are decoded when a row is read.
        is_dataset = isinstance(self.rows, Dataset)
        rows = self.rows.select(self.sample) if is_dataset else [self.rows[number] for number in self.sample]
        return rank_rows(model, self.processor, rows, self.batch_size, self.embedding_size, share=True).figures()


def check_direction(args: Any) -> None:
    """
    Checks that the smallest median rank is the best.

    Args:
        args (`TrainingArguments`):
            Arguments of the trainer.

    Raises:
        ValueError: If a median rank chooses the best model, and `greater_is_better` is not `False`.
    """
    name = args.metric_for_best_model
    check(
        name is None or not name.endswith("median_rank") or args.greater_is_better is False,
        f"the best model has the smallest {name!r}: set `greater_is_better=False` in the training arguments.",
    )
