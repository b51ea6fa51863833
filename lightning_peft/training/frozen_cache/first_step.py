"""``check_first_step``: whether caching fits, and what it costs, before anything changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .cached_step import CachedStep
from .frozen_parts import Trunk
from .recording import Recording
from .row_index import ADVICE
from .row_store import RowLayout, RowStore


def check_first_step(
    step: CachedStep, recording: Recording | None, trunk: Trunk, store: RowStore, batches: float
) -> str:
    """Return a sentence on what caching costs.

    Args:
        step: The first step that trains, after its forward pass.
        recording: Its recording, if anything frozen ran in it.
        trunk: The trunk.
        store: Where rows will be written.
        batches: How many batches the store will hold.

    Raises:
        ValueError: Nothing is saved, hooks would not be called, rows cannot be kept, or the disk is too small.
    """
    calls, first = recording.calls if recording else [], step.first_trained or "what trains"
    outputs = sorted(step.used)
    if recording is None or not outputs or trunk.only_looks_up([call.name for call in calls]):
        reason = "only embeddings and norms run" if calls else "nothing frozen runs"
        raise ValueError(
            f"cache_frozen=True saves nothing here: {reason} before {first}, which trains. It is for methods that "
            f"train the end of a model, such as OutputLayers and LastLayers; set cache_frozen=False."
        )
    trunk.check_hooks([call.name for call in calls])
    layouts = [(calls[call].name, calls[call].leaves[leaf]) for call, leaf in outputs]
    for name, layout in layouts:
        if not layout.by_row and layout.shape[:1] != (1,):
            raise ValueError(
                f"cache_frozen=True keeps rows, but {name} returns a tensor of shape {layout.shape} for a batch of "
                f"{recording.rows}: its first axis is not the batch. Let it return rows first, {ADVICE}"
            )
    again = sorted({call.name for call in calls} & step.late.keys())
    also = f" {again[0]} runs again after that; such calls are not cached." if again else ""
    cost = _cost([layout for _, layout in layouts], recording.rows, store, batches)
    return f"Caching the frozen trunk, up to {first}: {cost}{also}"


def _cost(layouts: Sequence[RowLayout], rows: int, store: RowStore, batches: float) -> str:
    row = sum(layout.row_bytes if layout.by_row else layout.row_bytes // rows for layout in layouts)
    total, room = row * rows * batches, max(store.room(), 0)
    if math.isinf(total):
        return f"{row:,} bytes a row in {store.folder}."
    if total > room:
        raise ValueError(
            f"cache_frozen=True needs {total / 1e9:.3g} GB ({row:,} bytes for each of {rows * batches:,.0f} rows) in "
            f"{store.folder}, which has room for {room / 1e9:.3g} GB. Set cache_folder to a larger disk, {ADVICE}"
        )
    return f"{row:,} bytes a row, {total / 1e6:,.0f} MB in all, in {store.folder}."
