"""Defaults that the pages of methods name are those of the code."""

import inspect
import re
from pathlib import Path

import method_classes
import pytest

import lightning_peft as lp

PAGES = Path(__file__).parents[2] / "docs/methods"
METHODS = {
    **{
        page: method for page, method in method_classes.METHODS.items() if page != "full_fine_tuning"
    },  # has no settings
    "dora": lp.LoRA,
    "qlora": lp.LoRA,
}


def defaults(method):
    """Return the default of each setting of a method and of the callback."""
    settings = {p.name: p.default for p in inspect.signature(lp.PEFTStrategy).parameters.values()}
    return settings | {
        name: field.default_factory() if callable(field.default_factory) else field.default
        for name, field in method.__dataclass_fields__.items()
    }


def named_defaults(page):
    """Yield (setting, what the page names as its default) of the tables whose second column is headed so."""
    for table in re.findall(r"^\| setting \| default \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page.read_text("utf-8"), re.M):
        for line in table.splitlines():
            names, values = re.findall(r"`([a-z]\w*)`", line.split("|")[1]), line.split("|")[2].strip()
            each = values.split(", ")
            yield from zip(names, each if len(each) == len(names) else [values], strict=False)


def is_named(value, default):
    """Return whether a page's words for a value mean it, or None where they are prose."""
    if value == "none":
        return not default and default is not False and default != 0
    literals = re.findall(r"`([^`]+)`", value) if re.fullmatch(r"`[^`]+`(, `[^`]+`)*", value) else []
    if literals:
        return literals == (default if isinstance(default, list) else [default])
    if value in ("true", "false"):
        return (value == "true") is default
    return float(value) == default if re.fullmatch(r"[\d.]+(e-?\d+)?", value) else None


WRITTEN = [stem for stem in METHODS if (PAGES / f"{stem}.md").exists()]


@pytest.mark.parametrize("stem", WRITTEN)
def test_a_page_names_settings_of_its_method_with_their_defaults(stem):
    known = defaults(METHODS[stem])
    named = list(named_defaults(PAGES / f"{stem}.md"))
    assert [name for name, _ in named if name not in known] == []
    wrong = [(name, value, known[name]) for name, value in named if is_named(value, known[name]) is False]
    assert wrong == []


def test_most_defaults_on_pages_are_values_and_not_prose():
    pairs = [(stem, *pair) for stem in WRITTEN for pair in named_defaults(PAGES / f"{stem}.md")]
    compared = [name for stem, name, value in pairs if is_named(value, defaults(METHODS[stem])[name]) is not None]
    assert len(compared) >= 25
    assert (is_named("9", 8), is_named("true", False), is_named("none", {}), is_named("all", [])) == (
        False,
        False,
        True,
        None,
    )
