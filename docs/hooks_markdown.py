"""MkDocs hook: pages are written for GitHub's Markdown; what Python-Markdown reads otherwise is changed before it.

Comments are for tests and scripts, and left out. Lists are nested by four spaces, and a blank line precedes them.
Pipes in code in tables need no backslash.
"""

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

COMMENT = re.compile(r"^ *<!--.*?-->[ \t]*\n?", re.M | re.S)
FENCE = re.compile(r"( *)(`{3,})")
MARKER = re.compile(r"( *)([*+-]|\d+\.)( +)(?=\S)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the Markdown of a page as Python-Markdown reads it."""
    return nest_lists(without_comments(markdown))


def without_comments(markdown: str) -> str:
    """Leave out comments outside of code."""
    parts = re.split(r"(^ *(?:`{3,}).*?^ *`{3,} *$)", markdown, flags=re.M | re.S)
    return "".join(part if number % 2 else COMMENT.sub("", part) for number, part in enumerate(parts))


def nest_lists(markdown: str) -> str:
    """Indent what belongs to items of lists by four spaces a level, and put a blank line before a list."""
    reader = _Lines()
    for line in markdown.splitlines():
        reader.read(line)
    return "\n".join(reader.lines) + "\n"


class _Lines:
    """Reads lines; ``levels`` are the columns at which the content of the open items begins."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.levels: list[int] = []
        self.fence: str | None = None

    def read(self, line: str) -> None:
        indent = len(line) - len(line.lstrip())
        if self.fence is not None:
            self._add(line[min(indent, self._column()) :])
            self.fence = None if line.strip() == self.fence else self.fence
        elif not line.strip():
            self.lines.append("")
        else:
            self._read_text(line, indent)

    def _read_text(self, line: str, indent: int) -> None:
        after_blank = not self.lines or not self.lines[-1]
        marker, fence = MARKER.match(line), FENCE.match(line)
        begins = marker and not after_blank and not self.levels
        while self.levels and indent < self._column() and (after_blank or marker or fence):
            self.levels.pop()
        if fence:
            self.fence = fence[2]
        if marker and indent < self._column() + 4:
            self.lines += [""] if begins else []
            self._add(f"{marker[2]} {line[marker.end() :]}")
            self.levels.append(marker.end())
        elif line.lstrip().startswith("|"):
            self._add(re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), line[min(indent, self._column()) :]))
        else:
            self._add(line[min(indent, self._column()) :])

    def _column(self) -> int:
        return self.levels[-1] if self.levels else 0

    def _add(self, text: str) -> None:
        self.lines.append(f"{'    ' * len(self.levels)}{text}")
