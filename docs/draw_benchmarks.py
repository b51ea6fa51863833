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
WIDTH, BAR, TEXT, GAP = 360, 12, 17, 9
COLORS = ("#5e35b1", "#e08e0b")
STYLE = """text { font: 13px system-ui, sans-serif; fill: #222; paint-order: stroke; stroke: #fff; stroke-width: 3px }
.value { fill: #555; font-size: 12px }"""


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
    """Return horizontal bars of some columns as SVG, no wider than a phone; light in any theme."""
    rows = [(row[0].strip("`"), [row[column] for column in table.bars]) for row in table.rows]
    rows = [(label, values) for label, values in rows if any(value is not None for value in values)]
    largest = max(value for _, values in rows for value in values if value is not None)
    scale = (WIDTH - 50) / max(largest, table.line or 0)
    start = 16 + 18 * len(table.bars)
    step = TEXT + BAR * len(table.bars) + GAP
    end = start + step * len(rows)
    parts = [*_legend(table), *_line(table.line, scale, start, end)]
    for number, (label, values) in enumerate(rows):
        parts += _row(label, values, start + step * number, scale, table.form)
    size = f'width="{WIDTH}" height="{end + 18}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {end + 18}">'
    return "\n".join([head, f"<style>{STYLE}</style>", f'<rect {size} rx="6" fill="#fff"/>', *parts, "</svg>", ""])


def _legend(table: Table) -> list[str]:
    parts = []
    for number, column in enumerate(table.bars):
        y = 8 + 18 * number
        parts.append(f'<rect x="8" y="{y}" width="12" height="12" fill="{COLORS[number]}"/>')
        parts.append(f'<text x="26" y="{y + 11}">{escape(table.head[column])}</text>')
    return parts


def _line(value: float | None, scale: float, start: int, end: int) -> list[str]:
    if value is None:
        return []
    x = 8 + value * scale
    return [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{start}" y2="{end}" stroke="#222" stroke-dasharray="4 3"/>',
        f'<text class="value" x="{x:.1f}" y="{end + 12}" text-anchor="middle">{value:g}</text>',
    ]


def _row(label: str, values: list[float | None], top: int, scale: float, form: str) -> list[str]:
    parts = [f'<text x="8" y="{top + 13}">{escape(label)}</text>']
    for number, value in enumerate(values):
        if value is not None:
            y, width = top + TEXT + BAR * number, value * scale
            parts.append(f'<rect x="8" y="{y}" width="{width:.1f}" height="{BAR - 1}" fill="{COLORS[number]}"/>')
            parts.append(f'<text class="value" x="{width + 12:.1f}" y="{y + 10}">{cell(value, form)}</text>')
    return parts


def charts() -> dict[str, str]:
    """Return the chart of each benchmark that has one, by its name."""
    tables = {stem: table(read(stem)) for stem, table in TABLES.items()}
    return {stem: chart(table) for stem, table in sorted(tables.items()) if table.bars}


if __name__ == "__main__":
    CHARTS.mkdir(parents=True, exist_ok=True)
    for stem, text in charts().items():
        (CHARTS / f"{stem}.svg").write_text(text)
    PAGE.write_text(filled(PAGE.read_text()))
