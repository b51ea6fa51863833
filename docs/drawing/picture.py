"""``Picture``: the shapes that pictures of methods are made of, in one language: grey is frozen, orange trains."""

from __future__ import annotations

from typing import Literal
from xml.sax.saxutils import escape

Kind = Literal["frozen", "trained", "training", "plain"]
Point = tuple[float, float]

WIDTH, HEIGHT = 560, 280
INK, PAPER = "#202124", "#ffffff"
FILLS = {"frozen": "#e3e6ea", "trained": "#ffb74d", "training": "#fff3e0", "plain": PAPER}
STROKES = {"frozen": "#80868b", "trained": "#d95f02", "training": "#d95f02", "plain": "#bdc1c6"}
NAMES = {"frozen": "frozen", "trained": "trained", "training": "trained, dropped afterwards"}
CHARACTER = 0.56  # widest mean width of a character in the fonts below, in units of the font's size
STYLE = f"""
    text {{ font-family: "Segoe UI", "Helvetica Neue", Arial, "Liberation Sans", sans-serif; fill: {INK} }}
    .bold {{ font-weight: bold }}
"""


def text_width(line: str, size: float) -> float:
    """Return about how wide a line of text is; combining marks take no room."""
    return CHARACTER * size * len(line.replace("\u0302", ""))


class Picture:
    """One picture; shapes are drawn in the order in which they are added.

    Args:
        title: What stands in the upper left corner.
        formula: What stands beside it.
    """

    def __init__(self, title: str, formula: str = "") -> None:
        self.title, self.shapes, self.kinds = title, list[str](), set[Kind]()
        self.text(16, 30, title, 18, "start", bold=True)
        if formula:
            self.text(WIDTH - 16, 30, formula, 16, "end")

    def text(self, x: float, y: float, line: str, size: float = 15, anchor: str = "middle", bold: bool = False) -> None:
        """Add a line of text whose baseline is at y; a ``ValueError`` if it leaves the picture."""
        width = text_width(line, size)
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        if left < 0 or left + width > WIDTH or not size <= y < HEIGHT:
            raise ValueError(f"{line!r} leaves the picture of {self.title}: from {left:.0f} to {left + width:.0f}.")
        style = ' class="bold"' if bold else ""
        place = f'x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}"'
        self.shapes.append(f"<text{style} {place}>{escape(line)}</text>")

    def box(self, x: float, y: float, w: float, h: float, *lines: str, kind: Kind = "frozen", size: float = 15) -> None:
        """Add a box with lines of text in its middle; a ``ValueError`` if they are wider or higher than the box."""
        self._area(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4"', kind)
        self._label(x + w / 2, y + h / 2, w, h, lines, size)

    def taper(
        self, x: float, y: float, w: float, left: float, right: float, *lines: str, kind: Kind = "trained"
    ) -> None:
        """Add a box around the middle line y whose sides are ``left`` and ``right`` high: features to rank, or back."""
        corners = [(x, y - left / 2), (x + w, y - right / 2), (x + w, y + right / 2), (x, y + left / 2)]
        self._area(f'<polygon points="{_points(corners)}"', kind)
        self._label(x + w / 2, y, w, max(left, right), lines, 15)

    def arrow(self, *points: Point, kind: Kind = "frozen") -> None:
        """Add a line through points that ends in an arrowhead; the flow of data."""
        *_, (x0, y0), (x, y) = points
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        head = [(x, y), (x - 9 * dx - 5 * dy, y - 9 * dy - 5 * dx), (x - 9 * dx + 5 * dy, y - 9 * dy + 5 * dx)]
        color = self._color(kind)
        self.line(*points[:-1], (x - 6 * dx, y - 6 * dy), kind=kind)
        self.shapes.append(f'<polygon points="{_points(head)}" fill="{color}"/>')

    def line(self, *points: Point, kind: Kind = "frozen") -> None:
        """Add a line through points."""
        dash = ' stroke-dasharray="5 4"' if kind == "training" else ""
        self.shapes.append(
            f'<polyline points="{_points(points)}" fill="none" stroke="{self._color(kind)}" stroke-width="2"{dash}/>'
        )

    def sign(self, x: float, y: float, sign: str, kind: Kind = "plain") -> None:
        """Add a small circle with a sign, such as a sum."""
        self._area(f'<circle cx="{x:g}" cy="{y:g}" r="14"', kind)
        self.text(x, y + 6, sign, 18)

    def svg(self) -> str:
        """Return the whole picture with its legend."""
        shown, x = [kind for kind in NAMES if kind in self.kinds], 16.0
        for kind in shown:
            self._area(f'<rect x="{x:g}" y="{HEIGHT - 27}" width="16" height="16" rx="3"', kind)
            self.text(x + 23, HEIGHT - 14, NAMES[kind], 14, "start")
            x += 23 + text_width(NAMES[kind], 14) + 18
        frame = (
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" fill="{PAPER}" stroke="#dadce0"/>'
        )
        size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        title = f"<title>{escape(self.title)}: grey parts are frozen, orange parts train</title>"
        lines = [f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>', title, f"<style>{STYLE}</style>", frame]
        return "\n".join([*lines, *self.shapes, "</svg>"]) + "\n"

    def _area(self, opening: str, kind: Kind) -> None:
        self.kinds.add(kind)
        dash = ' stroke-dasharray="5 4"' if kind == "training" else ""
        self.shapes.append(f'{opening} fill="{FILLS[kind]}" stroke="{STROKES[kind]}" stroke-width="1.5"{dash}/>')

    def _label(self, x: float, y: float, w: float, h: float, lines: tuple[str, ...], size: float) -> None:
        widest = max([0.0, *(text_width(line, size) for line in lines)])
        if widest > w - 2 or len(lines) * (size + 3) > h + 4:
            raise ValueError(f"{lines} need {widest:.0f} x {len(lines) * (size + 3):.0f}, the box has {w:g} x {h:g}.")
        for number, line in enumerate(lines):
            self.text(x, y + size * 0.36 + (number - (len(lines) - 1) / 2) * (size + 3), line, size)

    def _color(self, kind: Kind) -> str:
        return STROKES["trained"] if kind in ("trained", "training") else "#3c4043"


def _points(points: tuple[Point, ...] | list[Point]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)
