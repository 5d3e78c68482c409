"""Streams of rows, which several workers and processes share, and endless batches of them for training."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import get_worker_info

from .reading import RawRow, RowReader
from .repeated_rows import RepeatedRow

# Files of these types contain no images, so it costs little if each worker reads all rows and uses some of them.
_TEXT_FILES = (".jsonl", ".json", ".csv")


class RowStream(IterableDataset):
    """
    A stream of rows. A row is validated and its images are decoded when it leaves the stream, after shuffling. Rows
    that are passed over, because another worker reads them or because training resumes after them, cost no more than
    reading their text.

    `shuffle` and `shard` return a stream of the same kind. `map`, `filter`, `take` and all other methods return an
    `IterableDataset` of validated rows.

    Args:
        rows (`IterableDataset`):
            The validated rows.
        raw (`IterableDataset`):
            The same rows, as dicts with a `RawRow` as `raw`.
        reader (`RowReader`):
            Reads raw rows.
        is_text (`bool`):
            Whether the rows come from text files.
    """

    def __init__(self, rows: IterableDataset, raw: IterableDataset, reader: RowReader, is_text: bool) -> None:
        super().__init__(rows._ex_iterable, info=rows.info.copy(), split=rows.split)
        self.raw, self.reader, self.is_text = raw, reader, is_text

    def shuffle(self, seed: int | None = None, generator: Any = None, **kwargs: Any) -> RowStream:
        """
        Shuffles the shards, and the rows with a buffer of `buffer_size` rows, as `IterableDataset.shuffle` does. All
        processes and resumed runs must read the rows in the same order, so the default of `seed` is 0.
        """
        seed = 0 if seed is None and generator is None else seed
        arguments = {"seed": seed, "generator": generator, **kwargs}
        return RowStream(super().shuffle(**arguments), self.raw.shuffle(**arguments), self.reader, self.is_text)

    def shard(self, *args: Any, **kwargs: Any) -> RowStream:
        """Returns some of the shards, as `IterableDataset.shard` does."""
        return RowStream(super().shard(*args, **kwargs), self.raw.shard(*args, **kwargs), self.reader, self.is_text)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which changes the order of a shuffled stream."""
        super().set_epoch(epoch)
        self.raw.set_epoch(epoch)

    def state_dict(self) -> dict:
        """Returns the position in the stream. Rows in a shuffle buffer are lost, as in `IterableDataset`."""
        return self.raw.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues at a position."""
        self.raw.load_state_dict(state_dict)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the good rows. In a worker of a `DataLoader`, yields this worker's share of them."""
        worker = get_worker_info()
        if worker is None:
            rows = raw_rows_of(self.raw)
        elif self.splits_shards(worker.num_workers):
            rows = (item["raw"] for item in self.raw)  # the worker's shards
        else:
            rows = itertools.islice(raw_rows_of(self.raw), worker.id, None, worker.num_workers)
        for raw in rows:
            if (row := self.reader.read(raw)) is not None:
                yield row
        if worker is None:
            self.reader.skipped.warn()

    def splits_shards(self, number: int) -> bool:
        """Whether `number` readers read different shards, instead of different rows of all shards."""
        return not self.is_text and self.num_shards >= number


def raw_rows_of(raw: IterableDataset) -> Iterator[RawRow]:
    """Yields the raw rows of all shards, also in a worker."""
    for batch in raw.iter(batch_size=1):  # unlike `iter(raw)`, this does not divide the shards among workers
        yield batch["raw"][0]


class _EndlessRows:
    """
    The raw rows of epoch after epoch, with their position. Rows that are passed over are neither validated nor decoded.
    """

    def __init__(self, raw: IterableDataset) -> None:
        self.raw = copy.deepcopy(raw)  # workers share the epoch of a dataset
        self.position = 0
        self.length: int | None = None  # of an epoch, once it is known
        self._ahead: deque[RawRow] = deque()
        # A function, not a method: its iterator must end as soon as this object is no longer used, without the garbage
        # collector. It can own threads, and the collector may run in a thread that they wait for.
        self._rows = _epochs(self.raw, 0)

    def move_to(self, position: int) -> None:
        """Passes over the rows before a position, at or after the current one. Reads at most two epochs of them."""
        while self.position < position:
            if self.length is not None and position // self.length > self.position // self.length:
                epoch = position // self.length
                self._ahead.clear()
                self._rows, self.position = _epochs(self.raw, epoch), epoch * self.length
            else:
                self.next()

    def next(self) -> RawRow:
        self.position += 1
        if self._ahead:
            return self._ahead.popleft()
        item = next(self._rows)
        while isinstance(item, int):
            self.length, item = item, next(self._rows)
        return item

    def put_back(self, rows: list[RawRow]) -> None:
        """Puts the last rows back."""
        self._ahead.extendleft(reversed(rows))
        self.position -= len(rows)


def _epochs(raw: IterableDataset, first: int) -> Iterator[RawRow | int]:
    """Yields the rows of epoch after epoch, and after each epoch their number."""
    for epoch in itertools.count(first):
        raw.set_epoch(epoch)
        number = 0
        for row in raw_rows_of(raw):
            number += 1
            yield row
        if number == 0:
            raise ValueError("the data has no rows: there is nothing to train on.")
        yield number


@dataclass
class StreamBatches(torch.utils.data.IterableDataset):
    """
    The endless batches of a stream that one process trains on. A batch is made of `batch_size` consecutive raw rows, so
    its position in the data does not depend on which rows are bad, and a resumed run continues at the right row without
    reading the images of earlier rows. If a row is bad, its batch has one row less. If all of its rows are bad, the
    batch is the next good row as a `RepeatedRow`.

    The batches of all processes are consecutive, too: without shards (see [`RowStream.splits_shards`]), the batches of
    `num_processes` processes are the parts of the batches of one process, with any number of workers.

    Args:
        stream (`RowStream`):
            The stream.
        batch_size (`int`):
            Number of rows in the batch of a process.
        process (`int`):
            Number of this process.
        num_processes (`int`):
            Number of processes that train on different batches.
        num_skipped (`int`, *optional*, defaults to 0):
            Number of batches at the start that are not read, because training resumes after them. They are `None`.
    """

    stream: RowStream
    batch_size: int
    process: int
    num_processes: int
    num_skipped: int = 0

    def __iter__(self) -> Iterator[list[dict[str, Any]] | None]:
        worker = get_worker_info()
        number, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        num_readers = self.num_processes * num_workers
        if self.stream.splits_shards(num_readers):
            reader = number * self.num_processes + self.process
            rows, step, start = self.stream.raw.shard(num_readers, reader, contiguous=False), 1, 0
        else:
            rows, step, start = self.stream.raw, num_readers, number * self.num_processes + self.process
        endless = _EndlessRows(rows)
        for count in itertools.count():
            if count * num_workers + number < self.num_skipped:
                yield None
                continue
            endless.move_to((count * step + start) * self.batch_size)
            yield self._batch(endless)

    def _batch(self, rows: _EndlessRows) -> list[dict[str, Any]]:
        reader = self.stream.reader
        batch = [row for _ in range(self.batch_size) if (row := reader.read(rows.next())) is not None]
        following: list[RawRow] = []
        while not batch:
            if rows.length is not None and len(following) > rows.length:
                raise ValueError(f"no row of the data can be used: {reader.skipped.summary()}")
            following.append(rows.next())
            if (row := reader.read(following[-1])) is not None:
                batch.append(RepeatedRow(row))
        rows.put_back(following)
        return batch


@dataclass
class StreamCollator:
    """
    Collates the batches of a stream.

    Args:
        collator (`Callable`):
            Makes a batch of rows.
    """

    collator: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, rows: list[dict[str, Any]] | None) -> Any:
        """Returns the batch, or an empty dict for a batch that is not read."""
        return {} if rows is None else self.collator(rows)


def is_text_file(name: str) -> bool:
    """Whether a part of the data is a text file, which contains paths of images and not images."""
    return Path(name).suffix.lower() in _TEXT_FILES
