"""``StreamedExamples``: train rows that are read and tokenised as they come, shared between processes and workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import IterableDataset, get_worker_info

from lightning_peft.tasks.data.encoding.encode_table import CUT, ROWS
from lightning_peft.tasks.data.encoding.examples import Example
from lightning_peft.tasks.data.encoding.length_groups import group_by_length
from lightning_peft.tasks.data.reading.table_stream import StreamedRow, TableStream
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.data.reading.write_rows import in_parts

if TYPE_CHECKING:
    from lightning_peft.tasks.data.table_data import TableDataModule

BUFFER = 10_000  # rows that are shuffled together


def check_stream(data: TableDataModule) -> None:
    """Refuse early what cannot be streamed.

    Args:
        data: Whose train rows are to be.

    Raises:
        FileNotFoundError: If there is no train file.
        ValueError: If it has no rows, or the Trainer does not say how many steps to make.
    """
    trainer = data.trainer
    if trainer is not None and trainer.max_steps == -1 and not isinstance(trainer.limit_train_batches, int):
        raise ValueError(
            "Got streaming=True and no max_steps, but a schedule needs the number of steps, and how many rows a stream "
            "has is known at its end. Set trainer.max_steps."
        )
    data.splits.stream().check()


def stream_examples(data: TableDataModule) -> StreamedExamples:
    """The train rows of a data module as they come.

    Args:
        data: In a Trainer, it has the share of this process.
    """
    stream = data.splits.stream()
    rank, world = (0, 1) if data.trainer is None else (data.trainer.global_rank, data.trainer.world_size)
    sentences = (partial(data.dropped, "train", stream.name), partial(data.was_cut, stream.name))
    size = data.batch_size if data.group_by_length and data.padding == "longest" else 1
    return StreamedExamples(stream, partial(data.encode, "train"), sentences, size, rank, world)


class StreamedExamples(IterableDataset[Example]):
    """Encoded rows of a stream, in an order that torch's generator decides.

    Each pass reads the stream once. Row i is for the (i mod n)-th of n shares; each process has as many shares as
    workers. 10,000 rows of a share are shuffled together, and encoded a thousand at a time. Rows that ``encode`` leaves
    out may be more in one share than in another: with several processes, a share of fewer rows repeats some of its
    last ones, so that all processes make the same number of steps.

    Args:
        stream: The rows.
        encode: Makes examples from a table.
        sentences: Say, of how many of how many rows, that they were left out, and that they were cut.
        batch_size: Rows per batch, if rows of about the same length are to share one; else 1.
        rank: Which of ``world`` processes this is.
        world: Number of processes.
    """

    def __init__(
        self,
        stream: TableStream,
        encode: Callable[[Table], list[Example]],
        sentences: tuple[Callable[[int, int], str], Callable[[int, int], str]],
        batch_size: int,
        rank: int,
        world: int,
    ) -> None:
        self.stream, self.encode, self.sentences = stream, encode, sentences
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        seed = int(torch.empty((), dtype=torch.int64).random_()) if worker is None else torch.initial_seed()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        share = _Share(self.stream, self.rank * workers + number, self.world * workers)
        done, last = 0, deque[Example](maxlen=ROWS)
        for example in self._ordered(share, torch.Generator().manual_seed(seed)):
            done += 1
            last.append(example)
            if self.world > 1 and done > share.rows:
                raise ValueError(
                    f"Rows of {self.stream.name!r} become several examples each, of which processes would have "
                    "different numbers. Set streaming=False, or train in one process."
                )
            yield example
        if self.world > 1:
            yield from islice(cycle(last), max(0, -(-share.read // share.count) - done))
        if not last:
            raise ValueError(self.sentences[0](share.rows, share.rows))

    def _ordered(self, share: _Share, generator: torch.Generator) -> Iterator[Example]:
        waiting: list[Example] = []  # fewer than a batch
        cut = kept = 0
        for buffer in in_parts(share, BUFFER):
            columns = dict.fromkeys(name for row in buffer for name in row.row)
            order = torch.randperm(len(buffer), generator=generator).tolist()
            for part in in_parts((buffer[place] for place in order), ROWS):
                examples = self.encode(self.stream.table(part, columns))
                kept += len(examples)
                cut += sum(bool(example.pop(CUT, False)) for example in examples)
                waiting += examples
                *batches, rest = group_by_length([_length(e) for e in waiting], self.batch_size, generator)
                yield from (waiting[place] for batch in batches for place in batch)
                waiting = [waiting[place] for place in rest]
        yield from waiting
        for sentence, count in zip(self.sentences, (share.rows - kept, cut), strict=True):
            if count > 0 and kept:
                rank_zero_warn(sentence(count, share.rows))


class _Share:
    """The rows of a stream that one process or worker has.

    Args:
        stream: The rows.
        number: Which share.
        count: How many shares there are.
    """

    def __init__(self, stream: TableStream, number: int, count: int) -> None:
        self.stream, self.number, self.count = stream, number, count
        self.read = self.rows = 0  # of the stream, and of this share

    def __iter__(self) -> Iterator[StreamedRow]:
        for row in self.stream:
            if self.read % self.count == self.number:
                self.rows += 1
                yield row
            self.read += 1


def _length(example: Any) -> int:
    return len(example["input_ids"])
