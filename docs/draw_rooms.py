"""python docs/draw_rooms.py: draws docs/rooms.svg, the rooms of the package and what they import, from its files.

A room is a package directly below ``lightning_peft``, or a module that belongs to none.
"""

import ast
import functools
import textwrap
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1] / "lightning_peft"
PICTURE = Path(__file__).with_name("rooms.svg")
ROOMS = """
    ops files structure core losses methods quantization checkpoints summary composition training interop analysis tasks
    plots recipes cli __main__
"""
ORDER = ROOMS.split()  # each imports only those before it, which tests/test_imports.py holds all files to


def name_of(path: Path) -> str:
    """Return the dotted name of a module of the package."""
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(source: str, package: str) -> Iterator[str]:
    """Yield the full name of each module that a file imports, also where its package is asked for it by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            yield from sorted(names & FILES.keys())
            if not names <= FILES.keys():
                yield module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@functools.cache
def imported(name: str) -> tuple[str, ...]:
    """Return the names of the modules that a module of the package imports."""
    path = FILES[name]
    return tuple(imports(path.read_text(), name if path.name == "__init__.py" else name.rpartition(".")[0]))


def room(name: str) -> str:
    """Return the room of a module."""
    return name.split(".")[1]


def says(module: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(module.read_text())) or "").partition("\n")[0].replace("`", "")


@functools.cache
def arrows() -> dict[str, list[str]]:
    """Return, for each room that is drawn, the other rooms that its files import."""
    found: dict[str, set[str]] = {name: set() for name in ORDER if name != "__main__"}
    for name in FILES.keys() - {"lightning_peft", "lightning_peft.__main__"}:
        found[room(name)] |= {room(target) for target in imported(name) if target.startswith("lightning_peft.")}
    return {name: [other for other in found if other in targets - {name}] for name, targets in found.items()}


# Sizes in pixels. A row for each room, the first at the bottom; a line for each room that others import.
WIDTH, HEIGHT, PITCH, MARGIN = 572, 46, 60, 20
LANE, FIRST_LANE = 24, 28
COLORS = ["#3367d6", "#c5221f", "#188038", "#b06000", "#8430ce", "#00838f", "#ad1457", "#5f6368"]
STYLE = """
    text { font-family: "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: #202124 }
    .room { font-size: 15px; font-weight: bold } .says { font-size: 12px; fill: #5f6368 }
"""


def draw() -> str:
    """Return the picture: boxes in the order of imports, and lines from each room down to those that it imports."""
    targets = arrows()
    rooms = list(targets)
    importers = {name: [other for other in rooms if name in targets[other]] for name in rooms}
    used = [name for name in reversed(rooms) if importers[name]]
    lanes = {name: MARGIN + WIDTH + FIRST_LANE + LANE * i for i, name in enumerate(used)}
    tops = {name: MARGIN + PITCH * i for i, name in enumerate(reversed(rooms))}
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(reversed(used))}
    width, height = max(lanes.values()) + MARGIN, MARGIN + PITCH * len(rooms)
    shapes = [f'<rect width="{width}" height="{height}" fill="#ffffff"/>']
    for name in rooms:
        if targets[name]:
            shapes.append(_outgoing(tops[name], max(lanes[target] for target in targets[name])))
    for name in used:
        shapes += _incoming(tops[name], lanes[name], [tops[other] for other in importers[name]], colors[name])
    shapes += [shape for name in rooms for shape in _box(name, tops[name], colors.get(name, "#5f6368"))]
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    title = "<title>Rooms of lightning_peft: lines lead from a room down to those that it imports</title>"
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', title, f"<style>{STYLE}</style>", *shapes, "</svg>"]
    return "\n".join(lines) + "\n"


def _outgoing(top: int, end: int) -> str:
    y = top + 2 * HEIGHT // 3
    return f'<path d="M{MARGIN + WIDTH} {y}H{end}" stroke="#9aa0a6" stroke-width="1.2" fill="none"/>'


def _incoming(top: int, lane: int, others: list[int], color: str) -> list[str]:
    """Return the line of one imported room: a dot at each room that imports it, and an arrow into its box."""
    right, y = MARGIN + WIDTH, top + HEIGHT // 3
    dots = [other + 2 * HEIGHT // 3 for other in others]
    line = f"M{lane} {min(dots)}V{y - 6}Q{lane} {y} {lane - 6} {y}H{right + 8}"
    return [
        f'<path d="{line}" stroke="{color}" stroke-width="2" fill="none"/>',
        f'<path d="M{right + 1} {y}l9 -4.5v9z" fill="{color}"/>',
        *(f'<circle cx="{lane}" cy="{dot}" r="4.5" fill="{color}"/>' for dot in dots),
    ]


def _box(name: str, top: int, color: str) -> list[str]:
    module = FILES[f"lightning_peft.{name}"]
    label = f"{name}/" if module.name == "__init__.py" else module.name
    lines = textwrap.wrap(says(module), 66, break_on_hyphens=False)
    first = top + HEIGHT // 2 + 4 - 8 * (len(lines) - 1)
    return [
        f'<rect x="{MARGIN}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#f8f9fa" stroke="#dadce0"/>',
        f'<rect x="{MARGIN}" y="{top}" width="6" height="{HEIGHT}" rx="3" fill="{color}"/>',
        f'<text class="room" x="{MARGIN + 18}" y="{top + HEIGHT // 2 + 5}">{label}</text>',
        *(
            f'<text class="says" x="{MARGIN + 150}" y="{first + 16 * i}">{escape(t)}</text>'
            for i, t in enumerate(lines)
        ),
    ]


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(f"wrote {PICTURE}")
