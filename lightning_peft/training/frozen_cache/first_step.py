"""What the first step tells of a cache, while nothing has changed: whether it fits, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .frozen_parts import Trunk
from .record_replay import CachedStep, Recording
from .row_index import ADVICE
from .row_store import Form, RowStore


def check_first_step(
    step: CachedStep, recording: Recording | None, trunk: Trunk, store: RowStore, batches: float
) -> str:
    """Return what caching costs.

    Args:
        step: The first step that trains, after its forward pass.
        recording: What it has noted, if anything frozen ran in it.
        trunk: What the cache cuts out.
        store: Where rows go.
        batches: How many the store will hold.

    Raises:
        ValueError: Nothing is saved, hooks would not be called, rows cannot be kept, or the disk is too small.
    """
    calls, first = recording.calls if recording else [], step.first or "what trains"
    places = sorted(step.used)
    if recording is None or not places or trunk.only_looks_up([call.name for call in calls]):
        what = "only embeddings and norms run" if calls else "nothing frozen runs"
        raise ValueError(
            f"cache_frozen=True saves nothing here: {what} before {first}, which trains. It is for methods that train "
            f"the end of a model, such as OutputLayers and LastLayers; set cache_frozen=False."
        )
    trunk.check_hooks([call.name for call in calls])
    forms = [(calls[call].name, calls[call].leaves[leaf]) for call, leaf in places]
    for name, form in forms:
        if not form.by_row and form.shape[:1] != (1,):
            raise ValueError(
                f"cache_frozen=True keeps rows, but {name} returns a tensor of shape {form.shape} for a batch of "
                f"{recording.rows}: its first axis is not the batch. Let it return rows first, {ADVICE}"
            )
    again = sorted({call.name for call in calls} & step.late.keys())
    also = f" {again[0]} runs again after that; such calls are not cached." if again else ""
    return (
        f"Caching the frozen trunk, up to {first}: {_cost([f for _, f in forms], recording.rows, store, batches)}{also}"
    )


def _cost(forms: Sequence[Form], rows: int, store: RowStore, batches: float) -> str:
    row = sum(form.row_bytes if form.by_row else form.row_bytes // rows for form in forms)
    total, room = row * rows * batches, max(store.room(), 0)
    if math.isinf(total):
        return f"{row:,} bytes a row in {store.folder}."
    if total > room:
        raise ValueError(
            f"cache_frozen=True needs {total / 1e9:.3g} GB ({row:,} bytes for each of {rows * batches:,.0f} rows) in "
            f"{store.folder}, which has room for {room / 1e9:.3g} GB. Set cache_folder to a larger disk, {ADVICE}"
        )
    return f"{row:,} bytes a row, {total / 1e6:,.0f} MB in all, in {store.folder}."
