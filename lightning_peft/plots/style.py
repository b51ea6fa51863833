"""The style of all figures: no global state of matplotlib, colours that most people can tell apart, few lines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..core.optional_imports import check_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # of Okabe and Ito
INK, PALE = "#333333", "#d9d9d9"
SMALL, MIDDLE = 8, 9  # font sizes


def matplotlib(part: str) -> Any:
    """Return a part of matplotlib, such as ``ticker``, imported on first use because it is an optional dependency.

    Raises:
        ImportError: It is not installed.
    """
    check_extra("matplotlib", "Pictures need matplotlib", "plots")
    return importlib.import_module(f"matplotlib.{part}")


def blank(width: float, height: float, layout: str = "constrained") -> Figure:
    """Return a white figure of so many inches that draws itself without a window."""
    figure: Figure = matplotlib("figure").Figure(figsize=(width, height), layout=layout, facecolor="white")
    matplotlib("backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def head(axes: Axes, text: str) -> None:
    """Put a title above the axes, on the left."""
    axes.set_title(text, loc="left", fontsize=MIDDLE + 1, color=INK, pad=8)


def quiet(axes: Axes, grid: bool = False) -> None:
    """Leave out frames, ticks and, unless ``grid``, all lines of the axes."""
    axes.tick_params(labelsize=SMALL, colors=INK, length=3 if grid else 0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    if grid:
        axes.grid(color="#e8e8e8", linewidth=0.7)
        axes.set_axisbelow(True)
    else:
        axes.spines[:].set_visible(False)


def color_bar(figure: Figure, image: Any, **place: Any) -> None:
    """Add a colour bar to an image."""
    bar = figure.colorbar(image, **place)
    bar.ax.tick_params(labelsize=SMALL, colors=INK, length=2)
    bar.outline.set_visible(False)


def percent(value: float, position: int = 0) -> str:
    """Return a share as axes show it."""
    return f"{round(100 * value, 6):g} %"


def writable(text: str) -> str:
    r"""Return a text without what the letters at hand cannot write: those characters by number, as in ``\u6e05``."""
    fonts = matplotlib("font_manager")
    font = fonts.get_font(fonts.findfont(fonts.FontProperties()))
    known = (c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in text)
    return "".join(known)


def ink_on(color: tuple[float, ...]) -> str:
    """Return black or white, whichever is easier to read on a colour."""
    red, green, blue = color[:3]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
