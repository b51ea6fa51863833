"""``write_names`` writes names beside points where they overlap nothing: greedily, in the best of four orders."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from .style import INK, SMALL

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels
# Directions from a point to its name, best first.
_SIDES = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
_MARK, _NEAR, _FAR = 5, 6, 90  # pixels from the middle of a point: its own edge, the nearest name, the farthest


def write_names(figure: Any, axes: Any, points: Mapping[str, Point], steps: Sequence[Point]) -> None:
    """Write names as near to their points as there is room, with a thin line where that is far.

    Args:
        figure: Complete otherwise; its layout stays as it is now.
        axes: Where the points are.
        points: Places by name.
        steps: Corners of a line of steps, which names leave free.
    """
    figure.draw_without_rendering()  # now places are final
    figure.set_layout_engine("none")
    axes.autoscale(False)
    inside, renderer = axes.get_window_extent().extents, figure.canvas.get_renderer()
    marks = {name: tuple(axes.transData.transform(point)) for name, point in points.items()}
    taken: list[Box] = [(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in marks.values()]
    for (x, y), (after, higher) in itertools.pairwise(axes.transData.transform(steps)):
        taken += [(x, y - 1, after, y + 1), (after - 1, y, after + 1, higher)]
    if axes.get_legend() is not None:
        taken.append(tuple(axes.get_legend().get_window_extent(renderer).extents))
    texts = {
        name: axes.annotate(
            name.replace("_", " "), point, (0, 0), textcoords="offset points", va="bottom", fontsize=SMALL, color=INK
        )
        for name, point in points.items()
    }
    sizes = {name: text.get_window_extent(renderer) for name, text in texts.items()}
    spots = _place_boxes(
        marks, {name: (size.width + 2, size.height + 3) for name, size in sizes.items()}, inside, taken
    )
    for name, (distance, box) in spots.items():
        offset = ((corner + 1 - middle) * 72 / figure.dpi for corner, middle in zip(box, marks[name], strict=False))
        texts[name].set_position(tuple(offset))
        if 2 * _NEAR < distance < _FAR:
            _connect(axes, marks[name], box)


def _place_boxes(
    marks: Mapping[str, Point], sizes: Mapping[str, Point], inside: Box, taken: Sequence[Box]
) -> dict[str, tuple[float, Box]]:
    """Return distances and boxes of names, placed one after the other in the order with the least sum of distances."""
    arrangements = []
    for axis, sign in itertools.product((0, 1), (1, -1)):
        spots: dict[str, tuple[float, Box]] = {}
        for name in sorted(marks, key=lambda name: sign * marks[name][axis]):  # noqa: B023
            obstacles = [*taken, *(box for _, box in spots.values())]
            spots[name] = _nearest_free_box(marks[name], *sizes[name], inside, obstacles)
        arrangements.append(spots)
    return min(arrangements, key=lambda spots: sum(distance for distance, _ in spots.values()))


def _nearest_free_box(mark: Point, width: float, height: float, inside: Box, taken: Sequence[Box]) -> tuple[float, Box]:
    """Return the nearest free place inside, with its distance; one beside the mark where none is free."""
    spots = []
    for distance, (right, up) in itertools.product(range(_NEAR, _FAR, 4), _SIDES):
        left = mark[0] + right * distance - width * (1 - right) / 2
        bottom = mark[1] + up * distance - height * (1 - up) / 2
        spots.append((distance, (left, bottom, left + width, bottom + height)))
    free = (
        spot for spot in spots if _is_inside(spot[1], inside) and not any(_overlap(spot[1], other) for other in taken)
    )
    return next(free, (_FAR, spots[0][1]))


def _connect(axes: Any, mark: Point, box: Box) -> None:
    end = (min(max(mark[0], box[0]), box[2]), min(max(mark[1], box[1]), box[3]))
    line = axes.transData.inverted().transform([mark, end])
    axes.plot(*line.T, color="#999999", linewidth=0.6, zorder=1)


def _is_inside(box: Box, frame: Box) -> bool:
    return all(box[i] >= frame[i] for i in (0, 1)) and all(box[i] <= frame[i] for i in (2, 3))


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
