"""``plan_text`` prints a memory plan as a table: bytes per GPU in each layout, and the card that has room for them."""

from __future__ import annotations

from typing import Any

from ..summary import size
from .memory_plan import MemoryPlan

CARDS = (16, 24, 32, 40, 48, 80, 96, 140, 180)  # GiB that graphics cards have
_CUDA_BYTES = 10**9  # bytes that CUDA's context and kernels take
_COLUMNS = ("weights", "gradients", "optimizer", "activations", "transient", "memory", "sent")


def layouts(plan: MemoryPlan, processes: list[int]) -> list[dict[str, Any]]:
    """Return the bytes of each GPU for each number of tokens and each layout, with the smallest card that has room.

    Args:
        plan: Of ``plan_memory``.
        processes: Numbers of GPUs.
    """
    names = [("one GPU", 1, False)] * (1 in processes)
    names += [(f"{name} x {n}", n, name == "FSDP") for n in sorted(processes) if n > 1 for name in ("DDP", "FSDP")]
    rows = []
    for tokens in plan.activations:
        for name, count, sharded in names:
            share = plan.share(tokens, count, sharded)
            card = next((card for card in CARDS if share.total + _CUDA_BYTES <= card * 2**30), None)
            totals = {"memory": share.total, "sent": plan.traffic(count, sharded), "card": card}
            rows.append({"tokens": tokens, "layout": name, **vars(share), **totals})
    return rows


def plan_text(plan: MemoryPlan, processes: list[int]) -> str:
    """Return the rows of ``layouts`` as text, with trained parameters above and the cheapest layouts below."""
    rows = layouts(plan, processes)
    lines = [
        f"{plan.trained:,} of {plan.trained + plan.frozen:,} parameters train; an adapter file takes "
        f"{size(plan.checkpoint)}. On each GPU:",
        f"{'tokens':>7}  {'layout':<10}{''.join(f'{column:>12}' for column in _COLUMNS)}  card",
    ]
    for row in rows:
        cells = "".join(f"{size(row[column]):>12}" for column in _COLUMNS)
        card = f"{row['card']} GiB" if row["card"] else f"over {CARDS[-1]} GiB"
        lines.append(f"{row['tokens'] or 'data':>7}  {row['layout']:<10}{cells}  {card}")
    return "\n".join([*lines, _cheapest_layouts(rows)])


def _cheapest_layouts(rows: list[dict[str, Any]]) -> str:
    """Return the layout with the fewest GPUs, and then the least traffic, for each card, at the most tokens."""
    most = max(row["tokens"] for row in rows)
    fitting: dict[str, int] = {}
    for card in CARDS:
        fits = (row["layout"] for row in rows if row["tokens"] == most and row["card"] and row["card"] <= card)
        if cheapest := next(fits, None):
            fitting.setdefault(cheapest, card)
    cards = "; ".join(f"{card} GiB: {layout}" for layout, card in fitting.items()) or "no layout fits any card"
    return f"Fewest GPUs for {f'{most} tokens' if most else 'this data'}, by card: {cards}."
