"""``rank_map`` and ``gate_map`` draw maps of a model, with one cell for each layer or head."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .adapter_values import PlotValues, shorten_names, split_at_number
from .style import INK, PALE, SMALL, blank, color_bar, head, ink_on, quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rank_map(model: nn.Module) -> Figure:
    """Draw how many triplets each layer keeps: kinds of layers down, numbers of blocks across.

    Args:
        model: A model adapted by AdaLoRA.

    Raises:
        ValueError: No adapter of the model has triplets.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 16)), lp.AdaLoRA(targets=["0"]))
        >>> figure = lp.plots.rank_map(model)
        >>> int(figure.axes[0].images[0].get_array().max())
        12
    """
    ranks = PlotValues.of(model).ranks
    if not ranks:
        raise ValueError("No adapter of this model has triplets; adapt it with AdaLoRA.")
    return draw_ranks(ranks)


def gate_map(model: nn.Module) -> Figure:
    """Draw tanh(gate) of each head: layers down, heads across, zero white.

    Args:
        model: A model adapted by LLaMAAdapter.

    Raises:
        ValueError: No adapter of the model has gates.

    Examples:
        >>> model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        >>> figure = lp.plots.gate_map(lp.inject(model, lp.LLaMAAdapter(length=2, targets=["self_attn"])))
        >>> figure.axes[0].images[0].get_array().shape  # 1 layer, 4 heads
        (1, 4)
    """
    gates = PlotValues.of(model).gates
    if not gates:
        raise ValueError("No adapter of this model has gates; adapt it with LLaMAAdapter.")
    return draw_gates(gates)


def draw_ranks(ranks: Mapping[str, tuple[int, int]]) -> Figure:
    """Draw (kept, possible) numbers of triplets by layer."""
    positions = {name: split_at_number(name) for name in ranks}
    kinds = list(dict.fromkeys(position[:2] for position in positions.values()))
    numbers = sorted({position[2] for position in positions.values()}, key=lambda text: (not text, int(text or 0)))
    cells = [[math.nan] * len(numbers) for _ in kinds]
    for name, position in positions.items():
        cells[kinds.index(position[:2])][numbers.index(position[2])] = ranks[name][0]
    suffix_counts = Counter(after for _, after in kinds)
    labels = [after if suffix_counts[after] == 1 else f"{before}.*.{after}" for before, after in kinds]
    kept, possible = (sum(pair[i] for pair in ranks.values()) for i in (0, 1))
    width = 0.5 + 0.075 * max(map(len, labels)) + max(0.42 * len(numbers), 2.4)
    figure = blank(width, 0.95 + 0.3 * len(kinds))
    axes = figure.add_subplot()
    image = _image(axes, cells, "Purples", 0, max(pair[1] for pair in ranks.values()))
    for (y, row), x in itertools.product(enumerate(cells), range(len(numbers))):
        if not math.isnan(row[x]):
            ink = ink_on(image.cmap(image.norm(row[x])))
            axes.text(x, y, f"{row[x]:g}", ha="center", va="center", fontsize=SMALL, color=ink)
    axes.set_xticks(range(len(numbers)), numbers)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("block", fontsize=SMALL, color=INK)
    head(axes, f"{kept} of {possible} triplets kept")
    return figure


def draw_gates(gates: Mapping[str, Tensor]) -> Figure:
    """Draw values (heads,) between -1 and 1 by layer."""
    heads = max(map(len, gates.values()))
    cells = [[*values.tolist(), *[math.nan] * (heads - len(values))] for values in gates.values()]
    largest = max(values.abs().max().item() for values in gates.values()) or 1.0
    labels = shorten_names(list(gates))
    width = 1.6 + 0.07 * max(map(len, labels)) + max(0.24 * heads, 2.4)
    figure = blank(width, 1.1 + max(0.24 * len(cells), 0.9))
    axes = figure.add_subplot()
    image = _image(axes, cells, "RdBu_r", -largest, largest)
    axes.set_xticks(range(0, heads, -(-heads // 16)))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("head", fontsize=SMALL, color=INK)
    if all(label.isdecimal() for label in labels):
        axes.set_ylabel("layer", fontsize=SMALL, color=INK)
    color_bar(figure, image, ax=axes, fraction=0.05, pad=0.03)
    opened = sum(int((values != 0).sum()) for values in gates.values())
    head(axes, f"tanh(gate): {opened} of {sum(map(len, gates.values()))} gates are open")
    return figure


def _image(axes: Any, cells: list[list[float]], colors: str, low: float, high: float) -> Any:
    """Draw cells with white lines between them; cells without a number are grey."""
    axes.set_facecolor(PALE)  # seen where a cell has no number
    image = axes.imshow(cells, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    quiet(axes)
    axes.set_xticks([x - 0.5 for x in range(1, len(cells[0]))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(cells))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    return image
