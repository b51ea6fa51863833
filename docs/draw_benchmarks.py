"""python docs/draw_benchmarks.py: fills tables of docs/benchmarks.md from benchmarks/results, and draws their charts.

Between ``<!-- table: STEM -->`` and ``<!-- /table -->`` stands the table of benchmarks/results/STEM.json; charts are
docs/pictures/benchmarks/STEM.svg.
"""

import re
import sys
from pathlib import Path
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).parents[1]))

from docs.benchmark_tables import Table, read
from docs.benchmark_tables.costs import COSTS
from docs.benchmark_tables.scores import SCORES

PAGE = Path(__file__).with_name("benchmarks.md")
CHARTS = Path(__file__).with_name("pictures") / "benchmarks"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.S)
TABLES = COSTS | SCORES
WIDTH, LABEL, BAR, GAP = 720, 250, 13, 9
COLORS = ("#5e35b1", "#e08e0b")
STYLE = "text { font: 13px system-ui, sans-serif; fill: #222 } .value { fill: #555; font-size: 12px }"


def cell(value: object, form: str) -> str:
    """Return a value as text."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:{'d' if isinstance(value, int) else form}}"


def markdown(table: Table) -> str:
    """Return a table of Markdown."""
    lines = [table.head, ("---",) * len(table.head), *table.rows]
    return "".join(f"| {' | '.join(cell(value, table.form) for value in line)} |\n" for line in lines)


def filled(page: str) -> str:
    """Return the page with its tables filled."""
    return MARKED.sub(lambda match: f"{match[1]}\n{markdown(TABLES[match[2]](read(match[2])))}\n{match[3]}", page)


def chart(table: Table) -> str:
    """Return horizontal bars of some columns as SVG, light in any theme."""
    rows = [(row[0].strip("`"), [row[column] for column in table.bars]) for row in table.rows]
    rows = [(label, values) for label, values in rows if any(value is not None for value in values)]
    largest = max(value for _, values in rows for value in values if value is not None)
    scale = (WIDTH - LABEL - 70) / max(largest, table.line or 0)
    parts, top = _legend(table), 34
    for label, values in rows:
        height = BAR * len(values)
        parts.append(f'<text x="{LABEL - 10}" y="{top + height / 2 + 5}" text-anchor="end">{escape(label)}</text>')
        for number, value in enumerate(values):
            parts += _bar(value, top + BAR * number, scale, number, table.form)
        top += height + GAP
    if table.line is not None:
        x = LABEL + table.line * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="28" y2="{top}" stroke="#222" stroke-dasharray="4 3"/>')
        parts.append(f'<text class="value" x="{x:.1f}" y="{top + 13}" text-anchor="middle">{table.line:g}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 20}" role="img">'
    frame = f'<rect width="{WIDTH}" height="{top + 20}" rx="6" fill="#fff"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", frame, *parts, "</svg>", ""])


def _legend(table: Table) -> list[str]:
    parts, x = [], LABEL
    for number, column in enumerate(table.bars):
        name = table.head[column]
        parts.append(f'<rect x="{x}" y="9" width="12" height="12" fill="{COLORS[number]}"/>')
        parts.append(f'<text x="{x + 18}" y="20">{escape(name)}</text>')
        x += 40 + 7 * len(name)
    return parts


def _bar(value: float | None, y: float, scale: float, number: int, form: str) -> list[str]:
    if value is None:
        return []
    width = value * scale
    return [
        f'<rect x="{LABEL}" y="{y}" width="{width:.1f}" height="{BAR - 1}" fill="{COLORS[number]}"/>',
        f'<text class="value" x="{LABEL + width + 5:.1f}" y="{y + 10}">{cell(value, form)}</text>',
    ]


def charts() -> dict[str, str]:
    """Return the chart of each benchmark that has one, by its name."""
    tables = {stem: table(read(stem)) for stem, table in TABLES.items()}
    return {stem: chart(table) for stem, table in sorted(tables.items()) if table.bars}


if __name__ == "__main__":
    CHARTS.mkdir(parents=True, exist_ok=True)
    for stem, text in charts().items():
        (CHARTS / f"{stem}.svg").write_text(text)
    PAGE.write_text(filled(PAGE.read_text()))
