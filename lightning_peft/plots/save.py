"""``pictures`` draws all figures for a model's adapters; the functions of ``lightning-peft plot`` write files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .adapter_values import PlotValues
from .curves import learning_curves
from .heatmaps import draw_gates, draw_ranks
from .pareto import accuracy_over_parameters
from .similarity import draw_similarity, nearest_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


def pictures(adapted: nn.Module | PlotValues, tokenizer: Any = None) -> dict[str, Figure]:
    """Return the pictures of adapters that hold something to see, by the name of the function that draws them.

    Args:
        adapted: A model, adapted or not.
        tokenizer: As for ``prompt_similarity``.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 16)), lp.AdaLoRA(targets=["0"]))
        >>> list(lp.plots.pictures(model))
        ['rank_map']
    """
    values = adapted if isinstance(adapted, PlotValues) else PlotValues.of(adapted)
    figures: dict[str, Figure] = {}
    if values.ranks:
        figures["rank_map"] = draw_ranks(values.ranks)
    if values.gates:
        figures["gate_map"] = draw_gates(values.gates)
    if values.tokens:
        words = nearest_words(values, tokenizer) if tokenizer is not None else {}
        figures["prompt_similarity"] = draw_similarity(values.tokens, words)
    return figures


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure into a file, of the format that its name ends with, and return the path.

    Examples:
        >>> figure = lp.plots.accuracy_over_parameters({"LoRA": (222_338, 0.879)})
        >>> lp.plots.save(figure, "accuracy.svg").stat().st_size > 1000
        True
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def curves(folders: list[str], metric: str = "val_loss", output: str = "curves.png") -> list[Path]:
    """Draw the learning curves of several runs.

    Args:
        folders: Folders of runs with CSVLogger.
        metric: What to draw, such as val_accuracy; what was logged in training is drawn as well.
        output: File to write, as PNG, SVG or PDF.
    """
    return [save(learning_curves(folders, metric), output)]


def parameters(folders: list[str], metric: str | None = None, output: str = "parameters.png") -> list[Path]:
    """Draw accuracy over trained parameters of several runs.

    Args:
        folders: Folders of runs with the report.json of `lightning-peft fit`.
        metric: What to read from the reports; by default test_accuracy, or val_accuracy where a run was not tested.
        output: File to write, as PNG, SVG or PDF.
    """
    return [save(accuracy_over_parameters(folders, metric), output)]


def adapter(folder: str, output: str = ".") -> list[Path]:
    """Draw what an adapter holds, without its base model.

    Args:
        folder: Folder that save_adapter wrote.
        output: Folder for the pictures.

    Raises:
        ValueError: It holds neither triplets nor gates nor virtual tokens.
    """
    figures = pictures(PlotValues.stored(folder))
    if not figures:
        raise ValueError(f"{folder} has nothing to draw: no triplets of AdaLoRA, no gates, no virtual tokens.")
    return [save(figure, Path(output) / f"{name}.png") for name, figure in figures.items()]
