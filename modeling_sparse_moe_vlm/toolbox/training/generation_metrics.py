"""A trainer callback that generates answers at every evaluation and adds their scores to its metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from ...checks import check
from ...parallel_plans import is_one_of_several_processes
from ..data.rows import row_name
from ..evaluation import generate_answers, references_of, score_answers
from ..evaluation_mode import is_spread
from .sampled_metrics import SampledMetrics


class GenerationMetrics(SampledMetrics):
    """
    A callback that measures generated answers during evaluation, in any trainer: `Trainer`, TRL's `SFTTrainer` and so
    on, or [`~toolbox.training.SparseMoeTrainer`]. At every evaluation, the model answers the questions of the same
    sample of rows. The scores are added to the metrics of the evaluation as `eval_<metric>`, so they are logged, and
    `metric_for_best_model`, `load_best_model_at_end` and `EarlyStoppingCallback` can use them. No logits are kept.

    The answers are written to `<output_dir>/generated_answers/step-<step>.jsonl`. Training is not affected: the states
    of the random number generators and the modes of the modules are restored.

    Several processes share the rows, and all of them get the same scores. If the parts of the model are spread over
    processes (FSDP2, expert and tensor parallelism), all processes generate together. They share the rows only if the
    processes can run the same modules: without tensor parallelism, and if either all rows or no rows have images.

    With several evaluation datasets, the answers are generated once per evaluation. Evaluations with another
    `metric_key_prefix` than `"eval"`, such as `"test"`, do not generate answers.

    Args:
        processor (`ProcessorMixin`):
            Processor of the model.
        rows (`Sequence[dict]` or `Dataset`):
            Rows with a length, in the form that [`~toolbox.data.VisionLanguageCollator`] takes. If the last message is
            a turn of the assistant, it is not shown to the model. The right answers are those of
            [`~toolbox.evaluation.references_of`].
        metrics (`Sequence[str]`, *optional*, defaults to `["exact_match"]`):
            Names of metrics (see [`~toolbox.evaluation.score_answers`]).
        num_samples (`int`, *optional*, defaults to 200):
            Number of rows to sample. If there are not more rows, all of them are used.
        batch_size (`int`, *optional*, defaults to 16):
            Number of rows per batch in each process.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sample, and of the generation if `do_sample=True`.
        generate_kwargs:
            Additional arguments of `model.generate` (see [`~toolbox.evaluation.generate_answers`]).

    Attributes:
        sample (`list[int]`): Numbers of the sampled rows, in ascending order.
        answers (`list[str]`): Answers of the last evaluation, one for each sampled row.

    Raises:
        TypeError: If the rows have no length, such as a stream.
        ValueError: If `num_samples` or `batch_size` is less than 1, if there are no rows, if a row has no right answer,
            or if a metric is unknown.

    Example:

    ```python
    >>> from transformers import Trainer
    >>> from modeling_sparse_moe_vlm.toolbox.training import GenerationMetrics

    >>> trainer = Trainer(model, arguments, …, callbacks=[GenerationMetrics(processor, rows, ["exact_match", "anls"])])
    ```
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        rows: Any,
        metrics: Sequence[str] = ("exact_match",),
        num_samples: int = 200,
        batch_size: int = 16,
        seed: int = 0,
        **generate_kwargs: Any,
    ) -> None:
        super().__init__(rows, num_samples, batch_size, seed)
        self.processor, self.metrics, self.generate_kwargs = processor, list(metrics), generate_kwargs
        self.answers: list[str] = []
        self._names: list[str] = []
        self._references: list[list[str]] = []
        has_images = set()
        for number in self.sample:
            row = rows[number]
            name = row_name(row, number)
            check(
                bool(row.get("references")) or any(turn["role"] == "assistant" for turn in row["messages"][-1:]),
                f"{name}: the row has no references, and its last message is not from the assistant. Add one of them: "
                "it is the right answer.",
            )
            self._references.append(references_of(row))
            self._names.append(name)
            has_images.add(_has_image(row))
        self._is_uniform = len(has_images) == 1
        # Finds unknown metrics and rows without right answers before the training.
        score_answers(self.metrics, [references[0] for references in self._references], self._references)

    def measure(self, args, state, model):
        """See [`SampledMetrics.measure`]."""
        self.answers = self._generate(model)
        if state.is_world_process_zero:
            self._write(Path(args.output_dir) / "generated_answers" / f"step-{state.global_step}.jsonl")
        return score_answers(self.metrics, self.answers, self._references)

    def _generate(self, model: PreTrainedModel) -> list[str]:
        """Returns the answers to all sampled rows, in all processes."""
        num_shares, share = 1, 0
        options = dict(self.generate_kwargs)
        if is_one_of_several_processes():
            world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
            if is_spread(model):
                options["synced_gpus"] = True
            if not is_spread(model) or (self._is_uniform and _tp_size(model) == 1):
                num_shares, share = world_size, rank
        positions = list(range(share, len(self.sample), num_shares))
        # All processes generate the same number of batches; the last row is repeated where a process has fewer rows.
        missing = -(-len(self.sample) // num_shares) - len(positions)
        padded = positions + [positions[-1] if positions else 0] * missing
        device = model.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            answers = generate_answers(
                model,
                self.processor,
                [self.rows[self.sample[position]] for position in padded],
                batch_size=self.batch_size,
                **options,
            )
        if num_shares == 1:
            return answers
        gathered: list[Any] = [None] * num_shares
        torch.distributed.all_gather_object(gathered, answers[: len(positions)])
        return [gathered[position % num_shares][position // num_shares] for position in range(len(self.sample))]

    def _write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as lines:
            for name, answer, references in zip(self._names, self.answers, self._references, strict=True):
                line = {"row": name, "answer": answer, "references": references}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def _has_image(row: dict[str, Any]) -> bool:
    """Whether a row has an image or a video, in the columns `images` and `videos` or in a message."""
    contents = [message["content"] for message in row["messages"]]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return bool(row.get("images") or row.get("videos")) or any(part.get("type") in ("image", "video") for part in parts)


def _tp_size(model: nn.Module) -> int:
    return getattr(getattr(getattr(model, "config", None), "distributed_config", None), "tp_size", 1)
