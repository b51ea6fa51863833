"""Draws results/evidence.png and evidence_mean.png: accuracy over trained parameters, with brackets as lines."""

from pathlib import Path
from typing import Any

from evidence_summary import FILE, SETS, Runs, average, each, load, mean
from evidence_summary import title as name_of

from lightning_peft import plots
from lightning_peft.plots.label_placement import write_names
from lightning_peft.plots.style import COLORS, INK, SMALL, blank, head, matplotlib, percent, quiet

BRACKETS = {
    "full_fine_tuning": "full fine-tuning, 22.7M",
    "features_mean": "logistic regression on mean features",
    "features": "logistic regression on features of [CLS]",
}


def draw(runs: Runs, folder: Path = FILE.parent) -> list[Path]:
    """Draw the sets below each other, and their mean alone; white behind, so that they are seen in dark mode."""
    every = figure_of(runs, {title: [name] for name, title in SETS.items()})
    mean_alone = figure_of(runs, {f"Mean of {', '.join(SETS.values())}": list(SETS)})
    return [plots.save(every, folder / "evidence.png"), plots.save(mean_alone, folder / "evidence_mean.png")]


def figure_of(runs: Runs, panels: dict[str, list[str]]) -> Any:
    """Return a figure with a panel for each title, and the sets whose mean it shows."""
    figure = blank(7.2, 5.2 * len(panels))
    axes_of = dict(zip(panels, figure.subplots(len(panels), squeeze=False).flat, strict=True))
    points = {title: panel(axes_of[title], runs, title, sets) for title, sets in panels.items()}
    for title, axes in axes_of.items():
        write_names(figure, axes, points[title], [])
    return figure


def panel(axes: Any, runs: Runs, title: str, sets: list[str]) -> dict[str, tuple[float, float]]:
    """Draw the methods with the range of their seeds, and the brackets as lines; return the points."""
    points = {}
    for method in sorted(set.intersection(*(set(runs.get(name, {})) for name in sets)) - {"majority", *BRACKETS}):
        values = by_seed(runs, method, sets)
        x, y = average(runs, method, "trained", sets), mean(values)
        points[name_of(method)] = (x, y)
        axes.errorbar(
            x, y, [[y - min(values)], [max(values) - y]], fmt="o", markersize=5, color=COLORS[0], elinewidth=1, zorder=3
        )
    for number, (method, text) in enumerate(BRACKETS.items()):
        if values := by_seed(runs, method, sets):
            style = {"color": COLORS[1 + number], "linewidth": 1.2, "linestyle": "--", "zorder": 1}
            axes.axhline(mean(values), label=text, **style)
    _scale(axes, title)
    return points


def by_seed(runs: Runs, method: str, sets: list[str]) -> list[float]:
    """Return the mean accuracy over sets of each seed that ran on all of them."""
    found = [each(runs, name, method) for name in sets]
    return [mean([values[seed] for values in found]) for seed in set.intersection(*map(set, found))]


def _scale(axes: Any, title: str) -> None:
    head(axes, f"{title}: test accuracy, mean and range of the seeds")
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.08)
    quiet(axes, grid=True)
    axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK, loc="lower right")
    axes.xaxis.set_major_formatter(matplotlib("ticker").EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(matplotlib("ticker").NullFormatter())
    axes.yaxis.set_major_formatter(percent)
    axes.set_xlabel("trained parameters, pooler and classifier included", fontsize=SMALL, color=INK)


if __name__ == "__main__":
    print(*draw(load()), sep="\n")
