"""A `Trainer` whose resumed runs equal uninterrupted ones, in memory and streaming."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import gather_object, send_to_device
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import ProcessorMixin, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import seed_worker

from ...configuration_sparse_moe_vlm import SparseMoeVlmConfig
from ..data import VisionLanguageCollator
from ..data.reading import Rows
from ..data.repeated_rows import CollatorForTraining
from ..data.stream import RowStream, StreamBatches, StreamCollator
from ..expert_modules import our_experts_config
from .checkpoint_weights import load_renamed
from .checkpoints import last_whole_checkpoint


class ResumableTrainer(Trainer):
    """
    A `Trainer` whose resumed runs equal uninterrupted ones.

    - `train(resume_from_checkpoint=True)` resumes from the newest complete checkpoint.
    - The weights of a checkpoint are loaded for every model, also where checkpoints have other names for tensors. The
      same holds for `load_best_model_at_end`.
    - A stream of [`~toolbox.data.load_rows`] continues at the row where the checkpoint was saved, in any epoch, without
      reading the images of earlier rows. Its epochs follow one another without a gap. Every process reads its own part
      of each batch.
    - Checkpoints contain what was summed up since the last log, so the logged losses are the same as well. `train_loss`
      is the mean loss of all steps, those before the checkpoint included.
    - No row trains twice in an epoch because others are bad: a batch without good rows has no weight. (Models whose
      loss does not take the number of targets train on its [`~toolbox.data.repeated_rows.RepeatedRow`].)
    - After training, a warning counts the bad rows that were skipped in all workers and processes.

    Callbacks can take part with the methods `log_state()`, which returns what is logged next as tensors, numbers and
    containers of them, and `load_log_state(state)`.
    """

    data_collator: Callable

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        handler, options = self.accelerator.ddp_handler, checkpointing_options(self.args)
        if self.args.ddp_find_unused_parameters is None and handler is not None and not options.get("use_reentrant"):
            # By default, `Trainer` sets this to `False` with activation checkpointing. The parameters of the vision
            # encoder are unused if a process has no image.
            handler.find_unused_parameters = True
        if self.accelerator.dataloader_config.dispatch_batches is None:
            # By default, Accelerate splits the batches of an iterable dataset by the numbers of their rows. This is
            # wrong for images, whose number differs between rows.
            self.accelerator.dataloader_config.dispatch_batches = False
        self._stream_batches: StreamBatches | None = None
        self._first_step_of_loss: int | None = None  # `None`: the step at which this call starts
        self.add_callback(_StartAndEnd(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """
        Trains the model, as `Trainer.train` does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Path to a checkpoint, or `True` to resume from the newest complete checkpoint in `args.output_dir`.
            *args: Further positional arguments of `Trainer.train`.
            **kwargs: Further keyword arguments of `Trainer.train`.

        Returns:
            `TrainOutput`: The result of `Trainer.train`.

        Raises:
            ValueError: If there is no complete checkpoint to resume from.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args)
        self._first_step_of_loss = None
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled or not load_renamed(self.model if model is None else model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.is_fsdp_enabled or best is None or not load_renamed(self.model, best):
            super()._load_best_model()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs figures. Corrects `train_loss`, which `Trainer` divides by the number of steps since the resume."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self._start_of_loss(), 0.001)
        super().log(logs, *args, **kwargs)

    def _start_of_loss(self) -> int:
        """Returns the number of steps whose losses are unknown: those before a checkpoint of `Trainer`."""
        return self._initial_global_step if self._first_step_of_loss is None else self._first_step_of_loss

    def get_train_dataloader(self) -> DataLoader:
        """Returns the batches of this process."""
        if not isinstance(self.train_dataset, RowStream):
            collator = self.data_collator
            self.data_collator = self._collator_for_training(collator)
            try:
                return super().get_train_dataloader()
            finally:
                self.data_collator = collator
        arguments = self.args
        process, num_processes = self._place_in_batch()
        batch_size = self._train_batch_size // (num_processes if self.accelerator.split_batches else 1)
        self._stream_batches = StreamBatches(self.train_dataset, batch_size, process, num_processes)
        return DataLoaderShard(
            self._stream_batches,
            device=self.accelerator.device,
            batch_size=None,
            collate_fn=StreamCollator(self._collator_for_training(self.data_collator)),
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            worker_init_fn=partial(
                seed_worker, num_workers=arguments.dataloader_num_workers, rank=arguments.process_index
            ),
        )

    def _collator_for_training(self, collator: Callable) -> Callable:
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(collator, VisionLanguageCollator):
            wanted = bool(collator.blank_images) or self._needs_blank_images(collator, model)
            if wanted != collator.adds_blank_images:
                collator = copy(collator)
                collator.blank_images = wanted
        # Otherwise, the loss is a mean over the targets of a batch, which would be NaN for a batch without targets.
        if not self.model_accepts_loss_kwargs and self.compute_loss_func is None:
            return collator
        return CollatorForTraining(collator, marks_padding=our_experts_config(model.config) is not None)

    def _needs_blank_images(self, collator: VisionLanguageCollator, model: Any) -> bool:
        """Whether all processes have to run the vision encoder: they only have parts of its tensors."""
        is_sharded = self.is_fsdp_enabled or any(isinstance(module, FSDPModule) for module in model.modules())
        reads_images = isinstance(collator.processor, ProcessorMixin)
        encodes_one_itself = model.config.model_type == SparseMoeVlmConfig.model_type
        return self.args.world_size > 1 and is_sharded and reads_images and not encodes_one_itself

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        number = super()._get_num_items_in_batch(batch_samples, device)
        # Without good rows in the batches of all processes, the loss is 0, and not 0 / 0.
        return number.clamp(min=1) if torch.is_tensor(number) else number

    def _get_dataloader(self, dataset, *args: Any, **kwargs: Any) -> DataLoader:
        """Evaluates a stream in all processes with equally many batches. They wait for each other after each batch."""
        return super()._get_dataloader(
            _Undivided(dataset) if isinstance(dataset, RowStream) else dataset, *args, **kwargs
        )

    def _place_in_batch(self) -> tuple[int, int]:
        """Returns which part of each batch this process gets, and the number of parts."""
        # Accelerate knows which processes share a part (tensor parallelism).
        sampler = self.accelerator.prepare_data_loader(DataLoader(range(1))).batch_sampler  # type: ignore[arg-type]
        return getattr(sampler, "process_index", 0), getattr(sampler, "num_processes", 1)

    # ------------------------------------------------------------------------------------------ what is logged next

    @property
    def _log_file(self) -> str:
        return f"log_state_{self.args.process_index}.pt"

    def _save_rng_state(self, output_dir: str) -> None:
        """Also saves what was summed up since the last log. `Trainer` writes `trainer_state.json` after these files."""
        super()._save_rng_state(output_dir)
        torch.save(self.log_state(), Path(output_dir) / self._log_file)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        path = None if checkpoint is None else Path(checkpoint) / self._log_file
        if path is not None and path.exists():  # not in checkpoints of `Trainer`
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.load_log_state(send_to_device(state, self.args.device))

    def log_state(self) -> dict[str, Any]:
        """Returns what was summed up since the last log, the sum of all losses, and the rows that were skipped."""
        return {
            "loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "first_step_of_loss": self._start_of_loss(),
            "step_of_last_log": self._globalstep_last_logged,
            "callbacks": {name: callback.log_state() for name, callback in self._logging_callbacks().items()},
            "skipped_rows": [] if (rows := self._skipped_rows()) is None else rows.entries(),
        }

    def load_log_state(self, state: dict[str, Any]) -> None:
        """Continues with the sums of [`log_state`]."""
        self._tr_loss += state["loss"]
        self._globalstep_last_logged = state["step_of_last_log"]
        if "total_loss" in state:  # not in checkpoints of earlier releases
            self._total_loss_scalar += state["total_loss"]
            self._first_step_of_loss = state["first_step_of_loss"]
        for name, callback in self._logging_callbacks().items():
            if name in state["callbacks"]:
                callback.load_log_state(state["callbacks"][name])
        for entry in state["skipped_rows"]:
            if (rows := self._skipped_rows()) is not None:
                rows.add_entry(entry)

    def _logging_callbacks(self) -> dict[str, Any]:
        callbacks = self.callback_handler.callbacks
        return {type(callback).__name__: callback for callback in callbacks if hasattr(callback, "load_log_state")}

    def _skipped_rows(self):
        return self.train_dataset.reader.skipped if isinstance(self.train_dataset, RowStream | Rows) else None


def checkpointing_options(arguments: TrainingArguments) -> dict[str, Any]:
    """Returns the options of activation checkpointing. Transformers renamed the field in version 5.24."""
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    return next((options for name in names if (options := getattr(arguments, name, None))), {})


class _Undivided(torch.utils.data.IterableDataset):
    """A stream that Accelerate divides by rows, because it does not know its shards, which can have unequal sizes."""

    def __init__(self, stream: RowStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.stream)


class _StartAndEnd(TrainerCallback):
    """Tells the stream where to start, and warns of skipped rows at the end."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if (batches := self.trainer._stream_batches) is not None:
            steps = 0 if args.ignore_data_skip else state.global_step
            batches.num_skipped = steps * args.gradient_accumulation_steps

    def on_train_end(self, args, state, control, **kwargs):
        skipped = self.trainer._skipped_rows()
        if skipped is not None:
            for entry in gather_object(skipped.entries()):
                skipped.add_entry(entry)
            skipped.warn_of_new()
