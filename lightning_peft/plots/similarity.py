"""``prompt_similarity`` draws cosines among virtual tokens, labelled with the nearest words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from .adapter_values import PlotValues, shorten_names
from .style import INK, MIDDLE, SMALL, blank, color_bar, quiet, writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def prompt_similarity(model: nn.Module, tokenizer: Any = None) -> Figure:
    """Draw the cosine of each pair of virtual tokens: a panel for each prompt, or for the keys of each layer's prefix.

    Args:
        model: A model adapted by a method with prompts or prefixes.
        tokenizer: Of the model; with it, virtual tokens among the input embeddings are labelled with the nearest word
            of the vocabulary, by cosine.

    Raises:
        ValueError: No adapter of the model has virtual tokens.

    Examples:
        >>> model = nn.ModuleDict({"block": nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)})
        >>> figure = lp.plots.prompt_similarity(lp.inject(model, lp.PromptTuning(length=5, targets=["block"])))
        >>> figure.axes[0].images[0].get_array().shape
        (5, 5)
    """
    values = PlotValues.of(model)
    if not values.tokens:
        raise ValueError("No adapter of this model has virtual tokens; adapt it with a prompt or prefix method.")
    return draw_similarity(values.tokens, nearest_words(values, tokenizer) if tokenizer is not None else {})


def nearest_words(values: PlotValues, tokenizer: Any) -> dict[str, list[str]]:
    """Return the word of the vocabulary nearest to each virtual token, by prompt."""
    tokens = {name: values.tokens[name].flatten(0, -2) for name in values.tables}
    ids = {name: cosines(x, values.tables[name].float().cpu()).argmax(1).tolist() for name, x in tokens.items()}
    return {name: list(map(str, tokenizer.convert_ids_to_tokens(token_ids))) for name, token_ids in ids.items()}


def draw_similarity(tokens: Mapping[str, Tensor], words: Mapping[str, list[str]]) -> Figure:
    """Draw cosines among virtual tokens (..., length, features), by name of the panel; labelled with words, if any."""
    panels = _panels(tokens, words)
    length = max(len(x) for _, x, _ in panels)
    across = math.ceil(math.sqrt(len(panels) * 1.6)) if len(panels) > 1 else 1
    down = math.ceil(len(panels) / across)
    if words:
        side = min(max(0.17 * length, 2.6), 14.0)  # a line for each word
    else:
        side = min(max(0.17 * length, 2.6), 4.5) if len(panels) == 1 else 1.7
    figure = blank(across * (side + 0.35) + 1.0 + 0.7 * bool(words), down * (side + 0.45) + 0.5, "compressed")
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes, (title, x, panel_words) in zip(grid, panels, strict=False):
        image = axes.imshow(cosines(x, x).tolist(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(_wrapped(title, side), fontsize=SMALL, color=INK)
        _ticks(axes, len(x), panel_words, side if len(panels) == 1 else 1.2)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    color_bar(figure, image, ax=grid.tolist(), fraction=0.03, pad=0.02, aspect=30, shrink=0.8, ticks=[-1, 0, 1])
    figure.suptitle("cosine of each pair of virtual tokens", x=0.01, ha="left", fontsize=MIDDLE + 1, color=INK)
    return figure


def _ticks(axes: Any, length: int, words: list[str], side: float) -> None:
    quiet(axes)
    axes.tick_params(labelsize=SMALL - 1)
    ticks = range(0, length, 1 if length * 0.14 < side else math.ceil(length / (side / 0.3)))
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    if words:
        labels = [f"{writable(word)}  {number}" for number, word in enumerate(words)]
        axes.set_yticks(range(length), labels, parse_math=False)


def _wrapped(title: str, side: float) -> str:
    """Return a title in two lines, broken before the word that is nearest to the middle, if one line is too short."""
    dots = [i + 1 for i, letter in enumerate(title[:-1]) if letter == "." and title[i + 1].isalpha()]
    if len(title) * 0.085 < side or not dots:
        return title
    middle = min(dots, key=lambda at: abs(at - len(title) / 2))
    return f"{title[:middle]}\n{title[middle:]}"


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return x_i y_j / (|x_i| |y_j|) of (n, features) and (m, features), as (n, m)."""
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT


def _panels(tokens: Mapping[str, Tensor], words: Mapping[str, list[str]]) -> list[tuple[str, Tensor, list[str]]]:
    """Return (title, virtual tokens (length, features), their words) of each prompt; of several tasks, of each."""
    panels = []
    for (name, x), short in zip(tokens.items(), shorten_names(list(tokens)), strict=True):
        title = f"layer {short}" if short.isdecimal() else short if len(tokens) > 1 else ""
        prompts = x.flatten(0, -3) if x.dim() > 3 else x if x.dim() == 3 else x[None]
        prompt_words = words.get(name, [])
        for task, prompt in enumerate(prompts):
            task_title = f"task {task}" if len(prompts) > 1 else ""
            span = prompt_words[task * len(prompt) : (task + 1) * len(prompt)]
            panels.append((", ".join(filter(None, (title, task_title))), prompt, span))
    return panels
