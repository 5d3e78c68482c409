"""Out-of-memory errors that name the rows of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

ADVICE = (
    "Decrease `per_device_train_batch_size` (with more `gradient_accumulation_steps`), or skip large rows with "
    "`max_length` and `max_image_tokens`, or set `gradient_checkpointing`."
)


@contextmanager
def naming_rows(inputs: Mapping[str, Any]) -> Iterator[None]:
    """
    A context in which errors about missing memory, on the device or on the CPU, name the rows of a batch. The type of
    the error stays the same.

    Args:
        inputs (`Mapping`):
            Batch of [`~toolbox.data.VisionLanguageCollator`]. Of other batches, the error names the shapes.
    """
    sizes = getattr(inputs, "row_sizes", None)
    shapes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error):
            rows = f"The batch has {len(sizes)} rows: {'; '.join(map(str, sizes))}" if sizes else f"The batch: {shapes}"
            # One argument, by which Accelerate recognises the error.
            error.args = (f"{error}\n{rows}. {ADVICE}",)
        raise


class MemoryErrorsNameRows:
    """Mixin for `Trainer`: errors about missing memory, in training and evaluation, name the rows of the batch."""

    def training_step(self, model, inputs, *args: Any, **kwargs: Any):
        with naming_rows(inputs):
            return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def prediction_step(self, model, inputs, *args: Any, **kwargs: Any):
        with naming_rows(inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
