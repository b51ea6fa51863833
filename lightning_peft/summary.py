"""What trains and what does not, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .checkpoints.adapter_state import adapter_state
from .core.adapted_module import adapters
from .core.coverage import Coverage, coverage
from .core.injection_record import adapters_of, get_record
from .core.method import Method
from .core.method_groups import active_methods
from .ops.sharded_tensors import global_shape
from .structure.base_model import base_parameters

BASE = "base parameters"  # that train


@dataclass(frozen=True)
class Summary:
    """Parameters of an adapted model.

    Args:
        rows: (what, number of places with parameters, trained parameters) for each method, idle ones with none, and for
            what else trains.
        trainable: Number of parameters that train.
        total: Number of parameters, adapters included, a shared one once.
        saved_bytes: Size of what an adapter file holds.
        base_bytes: Size of the base model's parameters.
        coverage: Blocks with adapters, by tower; empty where no blocks are known.
    """

    rows: tuple[tuple[str, int, int], ...]
    trainable: int
    total: int
    saved_bytes: int
    base_bytes: int
    coverage: tuple[Coverage, ...] = ()

    def __str__(self) -> str:
        """Return the table as text."""
        lines = [f"{what:<28} {places:>6} {count:>15,}" for what, places, count in self.rows]
        head = f"{'trains':<28} {'places':>6} {'parameters':>15}"
        return "\n".join([head, *lines, self.caption])

    @property
    def caption(self) -> str:
        """What trains of all, and what a file of it takes."""
        share = 100 * self.trainable / max(1, self.total)
        partly = len(self.coverage) > 1 or any(part.adapted and part.untouched for part in self.coverage)
        reached = f";\nadapters are in {', '.join(map(str, self.coverage))}" if partly else ""
        return (
            f"{self.trainable:,} of {self.total:,} parameters train ({share:.3g} %);\n"
            f"an adapter takes {size(self.saved_bytes)}, the base model {size(self.base_bytes)}{reached}"
        )


def summary(model: nn.Module) -> Summary:
    """Count what trains, by method; works on the meta device too.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(lp.summary(lp.inject(model, lp.LoRA(rank=2, targets=["0"]))))
        trains                       places      parameters
        LoRA (lora)                       1              48
        48 of 202 parameters train (23.8 %);
        an adapter takes 192 B, the base model 616 B
    """
    record, rows = get_record(model), []
    active = active_methods(record) if record else []
    trained = {n: _count(p) for n, p in base_parameters(model).items() if p.requires_grad}
    for method in record.methods if record else ():
        what, places, count = row(model, method)
        if count:
            rows.append((what, places, count) if method in active else (f"{what}, idle", places, 0))
    if trained:
        rows.append((BASE, len(trained), sum(trained.values())))
    return Summary(
        rows=tuple(rows),
        trainable=sum(_count(p) for p in model.parameters() if p.requires_grad),
        total=sum(_count(p) for p in model.parameters()),
        saved_bytes=sum(_count(v) * v.element_size() for v in adapter_state(model, packed=True).values()),
        base_bytes=sum(_count(p) * p.element_size() for p in base_parameters(model).values()),
        coverage=tuple(coverage(model, {name for name, *_ in adapters(model)})),
    )


def row(model: nn.Module, method: Method) -> tuple[str, int, int]:
    """Return the row of a method in the table, as it is where its adapters train."""
    found = [a for a in adapters_of(model, method).values() if next(a.parameters(), None) is not None]
    parameters = {id(p): _count(p) for adapter in found for p in adapter.parameters()}
    return f"{type(method).__name__} ({method.name})", len(found), sum(parameters.values())


def _count(tensor: Tensor) -> int:
    return global_shape(tensor).numel()


def size(count: float) -> str:
    """Return a number of bytes as text, in powers of 1,000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
