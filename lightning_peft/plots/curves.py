"""``learning_curves`` draws the metrics of several runs over optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runs import METRICS, Folder, find_runs, metric_value, read_metrics_csv
from .style import COLORS, INK, SMALL, blank, head, matplotlib, percent, quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = list[tuple[float, float]]
_MARKERS = "osD^vPX"


def learning_curves(folders: Iterable[Folder], metric: str = "val_loss") -> Figure:
    """Draw a metric over optimizer steps: in validation with marks, and in training, thin, where it was logged.

    Args:
        folders: Of runs with CSVLogger: each holds metrics.csv, or folders ``version_0, version_1, ...``, of which the
            last counts. Runs are named by what tells their folders apart.
        metric: Such as ``val_accuracy``, which draws ``train_accuracy`` as well where there is one.

    Raises:
        FileNotFoundError: A folder holds no metrics.csv.
        ValueError: A run has not logged the metric, or nothing at all.

    Examples:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> logger = CSVLogger("runs", name="lora")
        >>> for step, loss in enumerate([2.0, 1.0, 0.5]):
        ...     logger.log_metrics({"val_loss": loss}, step)
        >>> logger.save()
        >>> lp.plots.learning_curves(["runs/lora"]).axes[0].lines[0].get_ydata().tolist()
        [2.0, 1.0, 0.5]
    """
    runs = {
        name: _pair(read_metrics_csv(path), metric, str(path)) for name, path in find_runs(folders, METRICS).items()
    }
    figure = blank(6.4 if len(runs) == 1 else 7.6, 3.8)
    axes = figure.add_subplot()
    for number, (validation, training) in enumerate(runs.values()):
        color, round_of_colors = COLORS[number % len(COLORS)], number // len(COLORS)
        if training:
            axes.plot(*zip(*training, strict=True), color=color, linewidth=0.9, alpha=0.55)
        style = (
            {"marker": _MARKERS[round_of_colors % len(_MARKERS)], "markersize": 4.5} if len(validation) <= 60 else {}
        )
        axes.plot(*zip(*validation, strict=True), color=color, linewidth=1.8, **style)
    quiet(axes, grid=True)
    values = [value for pair in runs.values() for curve in pair for _, value in curve]
    if "acc" in metric and min(values) >= 0 and max(values) <= 1:
        axes.yaxis.set_major_formatter(percent)
    axes.xaxis.set_major_locator(matplotlib("ticker").MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("optimizer step", fontsize=SMALL, color=INK)
    head(axes, f"{next(iter(runs))}: {metric}" if len(runs) == 1 else metric)
    _explain(figure, list(runs), metric, any(training for _, training in runs.values()))
    return figure


def validated(folder: Folder) -> list[str]:
    """Return the names of the validation metrics that a run has logged.

    Examples:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> logger = CSVLogger("runs", name="lora")
        >>> logger.log_metrics({"train_loss": 2.0, "val_loss": 2.0, "val_accuracy": 0.5}, step=1)
        >>> logger.save()
        >>> lp.plots.validated("runs/lora")
        ['val_accuracy', 'val_loss']
    """
    (path,) = find_runs([folder], METRICS).values()
    return sorted(name for name in read_metrics_csv(Path(path)) if name.startswith("val_"))


def _pair(metrics: Mapping[str, Curve], metric: str, source: str) -> tuple[Curve, Curve]:
    """Return the curve of a metric, and that of its namesake in training if it is one of validation."""
    curve: Curve = metric_value(metrics, metric, source)
    name = metric.removeprefix("val_")
    if name == metric:
        return curve, []
    candidates = (f"train_{name}_epoch", f"train_{name}", f"train_{name}_step")
    return curve, next((metrics[candidate] for candidate in candidates if candidate in metrics), [])


def _explain(figure: Figure, names: list[str], metric: str, trains: bool) -> None:
    line = matplotlib("lines").Line2D
    handles: list[Any] = []
    if len(names) > 1:
        markers = [_MARKERS[i // len(COLORS) % len(_MARKERS)] for i in range(len(names))]
        styles = zip(names, markers, range(len(names)), strict=True)
        handles = [
            line([], [], color=COLORS[i % len(COLORS)], linewidth=1.8, marker=mark, markersize=4.5, label=name)
            for name, mark, i in styles
        ]
    if trains:
        color = COLORS[0] if len(names) == 1 else "#777777"
        handles += [
            line([], [], color=color, linewidth=1.8, marker=_MARKERS[0], markersize=4.5, label="validation"),
            line([], [], color=color, linewidth=0.9, alpha=0.7, label="training"),
        ]
    if handles:
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=SMALL, labelcolor=INK)
