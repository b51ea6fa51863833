"""Blocks of code on the pages of the documentation, with what comments before them say.

A page is Markdown with three kinds of comments, which a reader does not see:

* ``<!-- setup``, lines of Python, ``-->`` on a line of its own: makes the names that a reader has;
* ``<!-- over: configs/chat.yaml -->`` right before a YAML block: the configuration that the block changes;
* ``<!-- not run: REASON -->`` right before a block: why no test runs it.
"""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/**/*.md")]
)
RUN = ("setup", "python", "yaml", "bash", "json")
SHOWN = ("text", "console", "csv", "diff", "html", "jinja", "toml")
_PART = re.compile(
    r"^(?P<margin> *)<!-- setup\n(?P<setup>.*?)^ *-->$"
    r"|^ *<!-- (?P<key>over|not run): (?P<value>[^\n]*?) -->$"
    r"|^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)(?P=fence)$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """One block of a page.

    Args:
        page: Path of the page in the repository.
        line: Number of the line before its text.
        language: What stands behind the fence, or ``setup``.
        text: The code.
        over: Configuration that a YAML block changes.
        not_run: Why it is not run.
    """

    page: str
    line: int
    language: str
    text: str
    over: str | None = None
    not_run: str | None = None


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of a page, hidden ones too, from top to bottom."""
    return list(parse(page, (ROOT / page).read_text()))


def parse(page: str, text: str) -> Iterator[Block]:
    """Yield the blocks of a text."""
    said: dict[str, str] = {}
    end = 0
    for part in _PART.finditer(text):
        line = text.count("\n", 0, part.start()) + 1
        if said and text[end : part.start()].strip():
            raise ValueError(f"{page}:{line}: no block follows right after the comment {said}.")
        end = part.end()
        if part["key"]:
            said[part["key"]] = part["value"]
            continue
        code = textwrap.dedent(part["code"] if part["setup"] is None else part["setup"])
        language = "setup" if part["setup"] is not None else part["info"].split(" ")[0]
        yield Block(page, line, language, code, said.get("over"), said.get("not run"))
        said = {}
    if said:
        raise ValueError(f"{page}: no block follows the comment {said}.")


def outside(page: str) -> str:
    """Return what stands on a page outside of blocks."""
    return _PART.sub("", (ROOT / page).read_text())
