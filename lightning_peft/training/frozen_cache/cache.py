"""``FrozenCache``: outputs of the frozen trunk, kept by row, that replace later calls of the trunk."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..distributed.lightning_strategies import SHARDING
from ..lightning_api import is_compiled
from ..lightning_namespace import is_instance
from .cached_step import CachedStep, Replay
from .first_step import check_first_step
from .frozen_parts import Trunk
from .recording import Recording
from .row_index import RowIndex
from .row_store import row_keys


class FrozenCache:
    """Cuts the frozen trunk of a model out of steps whose rows are all known, and keeps the rows of others.

    The first training step tells what the trunk is (what runs before anything that trains) and which of its outputs
    are used further on; only these are kept. A row is known by a digest of all that the batch and the trunk's first
    call hold of it, padding included. In the first step of an epoch that could do without the trunk, and wherever rows
    meet a batch of another size for the first time, the trunk runs nevertheless: its bits must be those of the cache.

    Each process caches its own rows; where a sampler deals them anew in each epoch, it knows few of them at first.

    Args:
        trainer: Trainer that starts to train.
        module: Its module.
        folder: Where the file goes; by default the system's folder for temporary files.

    Raises:
        TypeError: The module is sharded or compiled.
        ValueError: All of it trains.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, folder: str | None = None) -> None:
        if is_instance(trainer.strategy, *SHARDING):
            raise TypeError("cache_frozen=True works on whole models, and the Trainer's strategy shards; use ddp.")
        if is_compiled(module):
            raise TypeError("The module is compiled, and cache_frozen=True cuts parts of it out; do not compile it.")
        self.trunk, self.index = Trunk(module), RowIndex(folder)
        self.step: CachedStep | None = None
        self.compared_sizes = set[tuple[bool, int, int]]()  # whether a step trains, batch size on writing, on reading
        self.starts_epoch = self.is_full = False
        self.hits = self.misses = 0
        self.shapes = set[Any]()  # of batches, without their rows
        self.first_epoch, self.has_warned = trainer.current_epoch, False
        self.trunk.attach()

    def close(self) -> None:
        """Remove the probes from the model, and the file from the disk."""
        self.trunk.step = self.step = None
        self.trunk.remove()
        self.index.store.close()

    def start_epoch(self) -> None:
        """Have the next batch of known rows compared with what the trunk returns, and restart the counts."""
        self.trunk.check_frozen()
        self.starts_epoch, self.hits, self.misses = True, 0, 0
        self.shapes.clear()

    def begin(self, batch: Any, trains: bool) -> None:
        """Start a training or validation step; nothing is known before the first one that trains."""
        self.step = CachedStep(batch, trains, self.choose_mode) if trains or self.index.calls else None
        self.trunk.step = self.step

    def end(self) -> None:
        """End the step, and keep what it has computed."""
        if self.step is not None and isinstance(self.step.mode, Recording):
            self.step.mode.keep()
        self.trunk.step = self.step = None

    def check_first(self, trainer: pl.Trainer) -> None:
        """Check the first step after its forward pass, before anything changes, and print what caching costs.

        Raises:
            ValueError: Caching saves nothing or does not fit; says why.
        """
        if self.step is None or self.step.checked or self.index.calls:
            return
        self.step.checked = True
        recording = self.step.mode if isinstance(self.step.mode, Recording) else None
        counts = [trainer.num_training_batches, *(n for n in trainer.num_val_batches if math.isfinite(n))]
        rank_zero_info(check_first_step(self.step, recording, self.trunk, self.index.store, sum(counts)))

    def warn_of_misses(self, epoch: int) -> None:
        """Warn once at the end of an epoch in which rows should have been known and were not."""
        if self.has_warned or epoch == self.first_epoch:
            return
        if self.is_full:
            message = (
                f"The disk of {self.index.store.folder} is full: the frozen trunk runs for rows that are not cached."
            )
        elif self.misses:
            message = self._explain_misses()
        else:
            return
        warnings.warn(message, stacklevel=2)
        self.has_warned = True

    def _explain_misses(self) -> str:
        if len(self.shapes) > 1:
            why = (
                f"batches had {len(self.shapes)} shapes, and a row is known in the shape alone that it had. Pad all "
                f"rows to one length (TextDataModule: padding='max_length')"
            )
        else:
            why = "they are new, or their contents differ, as after augmentation, which caching cannot help"
        share = self.misses / (self.hits + self.misses)
        return f"{share:.0%} of the epoch's rows were not in the cache of the frozen trunk: {why}."

    def choose_mode(self, step: CachedStep, args: Any) -> Recording | Replay:
        """Return the mode of a step, at its first call of the trunk: Replay if all of its rows are known."""
        rows, keys, shapes = _keys_of(step, args)
        entries = [self.index.entries.get(key) for key in keys]
        known = [entry for entry in entries if entry is not None]
        if step.trains:
            self.hits, self.misses = self.hits + len(known), self.misses + rows - len(known)
            self.shapes.add(shapes)
        if not known or len(known) < rows or len({id(block.calls) for block, _ in known}) > 1:
            self.is_full = self.index.store.room() <= 0
            new = {} if self.is_full else {i: keys[i] for i, entry in enumerate(entries) if entry is None}
            return Recording(step, rows, self.trunk, self.index, new)
        replay, sizes = Replay(step, self.index, known), {(step.trains, block.rows, rows) for block, _ in known}
        if self.starts_epoch or sizes - self.compared_sizes:
            self.starts_epoch, self.compared_sizes = False, self.compared_sizes | sizes
            return Recording(step, rows, self.trunk, self.index, {}, expected=replay)
        return replay


def _keys_of(step: CachedStep, args: Any) -> tuple[int, list[bytes], Any]:
    """Return the number of rows, their keys, and the shapes of the tensors without their rows.

    A key depends on the row in the batch and in the arguments of the trunk's first call, and on autocast, which changes
    what modules return.
    """
    batch = dict(step.batch) if isinstance(step.batch, Mapping) else step.batch  # pytree opens dicts alone
    leaves, spec = tree_flatten((batch, args))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    devices = sorted({x.device.type for x in tensors})
    casts = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices]
    rows, keys = row_keys(tensors, [step.trains, casts, spec, [x for x in leaves if not isinstance(x, Tensor)]])
    return rows, keys, tuple(x.shape[1:] for x in tensors)
