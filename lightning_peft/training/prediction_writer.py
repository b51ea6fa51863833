"""``PredictionWriter``: the Lightning Callback that writes what ``Trainer.predict`` finds, one line for each row."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from ..core.console import echo
from ..files.ordered_lines import LinesWriter, ordered_lines
from ..files.storage import check_local
from ..files.temporary_paths import remove_leftovers, temporary_folder
from ..structure.class_names import class_names
from .lightning_namespace import make_callback_of_both
from .prediction_rows import flat_row, prediction_rows

_SUFFIXES = (".jsonl", ".csv")
_LOADER = 2**40  # more rows than a loader has: what the number of a loader counts in the numbers of lines


class PredictionWriter(BasePredictionWriter):
    """Writes a line for each row that ``Trainer.predict`` predicts, in the order of the rows, and prints where.

    A line has ``row``, counted from 1 as the data set counts, and what ``predict_step`` returned for it: a dictionary
    of columns, each with one entry for each row (``labels``, ``probabilities``, ...), a list of texts (column
    ``text``), or a tensor (column ``prediction``). Probabilities stand by the names of the classes: those of the
    module's ``class_names``, or of the configuration of the transformers model inside. With several loaders, lines
    have the number of the ``loader`` as well.

    Lines go to disk batch by batch, and the file appears under its name once it is complete. Of several processes each
    writes what it predicts, to a file system that all share; rows that a sampler repeats are written once.

    Args:
        path: File to write, in place of one that is there: ``.jsonl`` or ``.csv``. By default ``predictions.jsonl`` in
            the folder of the run's logs.

    Raises:
        ValueError: The path has another suffix, or is an address.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "limit_predict_batches": 2}
        >>> _ = L.Trainer(callbacks=[lp.PredictionWriter("rows.csv")], **settings).predict(BoringModel())
        predictions: ...rows.csv (2 rows)
        >>> with open("rows.csv") as file:
        ...     file.readline().split(",")[0]  # columns are the row's number and what was predicted
        'row'
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__("batch")
        make_callback_of_both(type(self), BasePredictionWriter)
        self.path = None if path is None else check_local(path, "predictions are written into a file in place")
        if self.path is not None and (self.path.suffix not in _SUFFIXES or self.path.is_dir()):
            raise ValueError(f"Got path={str(path)!r}, expected a file whose name ends with {' or '.join(_SUFFIXES)}.")
        self._open = contextlib.ExitStack()
        self._lines: LinesWriter | None = None
        self._target, self._folder = Path(), Path()
        self._counts: dict[int, int] = {}  # rows of each loader so far, where it tells no numbers

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open a temporary file beside the one to write."""
        if getattr(trainer, "fast_dev_run", False):
            return
        self._close()
        logs = trainer.log_dir or trainer.default_root_dir  # asked for in each process, which agree on it
        self._target = Path(os.path.realpath(self.path or Path(logs, f"predictions{_SUFFIXES[0]}")))
        folder = self._open_folder() if trainer.is_global_zero else Path()
        self._folder = trainer.strategy.broadcast(folder)
        self._lines = self._open.enter_context(
            contextlib.closing(LinesWriter(self._folder / f"{trainer.global_rank}.lines"))
        )
        self._counts = {}

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the lines of a batch."""
        if self._lines is None:
            return
        source = type(pl_module).__name__
        names = getattr(pl_module, "class_names", None) or class_names(pl_module)
        rows = prediction_rows(prediction, names, source)
        trainer.predict_loop.current_batch_indices = []  # else a loader that tells none would have these
        indices = batch_indices or self._following(trainer, dataloader_idx, len(rows))
        if len(indices) != len(rows):
            raise ValueError(f"{source}.predict_step returned {len(rows)} predictions for {len(indices)} rows.")
        loaders = len(trainer.num_predict_batches)
        for index, row in zip(indices, rows, strict=True):
            place = {"row": index + 1} | ({"loader": dataloader_idx} if loaders > 1 else {})
            line = json.dumps(place | row, ensure_ascii=False, allow_nan=False)
            self._lines.write(dataloader_idx * _LOADER + index, line)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file from the lines of all processes, and print where it is."""
        if self._lines is None:
            return
        self._lines.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            paths = [self._folder / f"{rank}.lines" for rank in range(trainer.world_size)]
            count = _write(self._folder / "complete", paths, as_table=self._target.suffix == ".csv")
            os.replace(self._folder / "complete", self._target)
            echo(f"predictions: {self._target} ({count:,} rows)")
        self._close()
        trainer.strategy.barrier()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._close()

    def _open_folder(self) -> Path:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._target)
        return self._open.enter_context(temporary_folder(self._target))

    def _following(self, trainer: pl.Trainer, loader: int, count: int) -> Sequence[int]:
        """Return the numbers of a batch's rows where the loader tells none, such as that of an ``IterableDataset``."""
        if trainer.world_size > 1:
            raise ValueError(
                "Several processes predict rows of a loader whose sampler Lightning does not know, so which rows they "
                "are cannot be told. Predict with devices=1, or give a DataLoader over a data set with a length."
            )
        start = self._counts.get(loader, 0)
        self._counts[loader] = start + count
        return range(start, start + count)

    def _close(self) -> None:
        self._lines = None
        self._open.close()


def _write(path: Path, parts: Sequence[Path], as_table: bool) -> int:
    """Write the lines of all processes as they are, or as a table of all columns in them; return how many."""
    columns = dict[str, None]()
    for _, line in ordered_lines(parts) if as_table else ():
        columns |= dict.fromkeys(flat_row(json.loads(line)))
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(columns), lineterminator="\n")
        if as_table:
            table.writeheader()
        for _, line in ordered_lines(parts):
            count += 1
            table.writerow(flat_row(json.loads(line))) if as_table else file.write(f"{line}\n")
        file.flush()
        os.fsync(file.fileno())
    return count
