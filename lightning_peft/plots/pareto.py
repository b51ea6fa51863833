"""``accuracy_over_parameters`` draws runs or methods by their number of trained parameters, with the Pareto front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .label_placement import Point, write_names
from .runs import Folder, read_points
from .style import COLORS, INK, SMALL, blank, head, matplotlib, percent, quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def accuracy_over_parameters(points: Mapping[str, Point] | Iterable[Folder], metric: str | None = None) -> Figure:
    """Draw accuracy over trained parameters (logarithmic), with the best accuracy for so many parameters or fewer.

    Args:
        points: (trained parameters, accuracy) by name; or folders of runs with the report.json of `lightning-peft fit`.
        metric: What to read from reports, and the title; by default test_accuracy, or val_accuracy where a run was not
            tested.

    Raises:
        FileNotFoundError: A folder holds no report.json.
        ValueError: There are no points, or a report has no such metric.

    Examples:
        >>> figure = lp.plots.accuracy_over_parameters({"LoRA": (222_338, 0.879), "full": (22_713_986, 0.881)})
        >>> figure.axes[0].get_xscale()
        'log'
    """
    if isinstance(points, Mapping):
        title, by_name = metric or "test_accuracy", dict(points)
    else:
        title, by_name = read_points(points, metric)
    if not by_name or min(x for x, _ in by_name.values()) <= 0:
        raise ValueError(f"points must be at least one (trained parameters > 0, accuracy), got {by_name!r}.")
    figure = blank(8.2, 4.9)
    axes = figure.add_subplot()
    best = pareto_front(by_name)
    for name, (x, y) in by_name.items():
        color = COLORS[1] if name in best else COLORS[0]
        axes.plot(x, y, "o", color=color, markersize=6.5, markeredgecolor="white", markeredgewidth=0.7)
    largest = max(x for x, _ in by_name.values())
    steps = [*(by_name[name] for name in best), (largest, by_name[best[-1]][1])]
    if len(by_name) > 1:
        style = {"color": COLORS[1], "linewidth": 1.2, "alpha": 0.7, "zorder": 1.5}
        axes.step(*zip(*steps, strict=True), where="post", label="best with so many parameters or fewer", **style)
        axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK, loc="lower right")
    _scale(axes, list(by_name.values()))
    head(axes, title.replace("_", " "))
    write_names(figure, axes, by_name, steps)
    return figure


def pareto_front(points: Mapping[str, Point]) -> list[str]:
    """Return the names of the points that no other one with as few parameters or fewer equals, by parameters."""
    best: list[str] = []
    for name, (_, y) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not best or y > points[best[-1]][1]:
            best.append(name)
    return best


def _scale(axes: Any, points: list[Point]) -> None:
    ticker, numbers = matplotlib("ticker"), [x for x, _ in points]
    axes.set_xscale("log")
    axes.set_xlim(min(numbers) / 1.5, max(numbers) * 2)
    axes.margins(y=0.12)
    quiet(axes, grid=True)
    spans_decades = max(numbers) > 5 * min(numbers)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if spans_decades else range(1, 10)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    if all(0 <= y <= 1 for _, y in points):
        axes.yaxis.set_major_formatter(percent)
    axes.set_xlabel("trained parameters", fontsize=SMALL, color=INK)
