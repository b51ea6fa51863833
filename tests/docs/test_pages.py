"""Lists of pages, of public names and of benchmarks are whole; Markdown for GitHub becomes Markdown for the site."""

import importlib
import re
from collections import Counter

import pytest
from page_blocks import ROOT

from docs.benchmark_tables import RESULTS
from docs.draw_benchmarks import CHARTS, PAGE, TABLES, charts, filled
from docs.list_pages import listing, pages, repository_address, site_address

API = {
    path.stem: re.findall(r"^::: lightning_peft\.(\S+)", path.read_text(), re.M) for path in ROOT.glob("docs/api/*.md")
}
ENTRIES = Counter(name for names in API.values() for name in names)
PAGES_OF_MODULES = {"losses", "plots"}  # whose names have a page


def public(module):
    """Return the public names of a module below the package, as the reference has them."""
    prefix = "" if module == "core" else f"{module}."
    names = importlib.import_module(f"lightning_peft.{module}".rstrip(".")).__all__
    return [f"{prefix}{name}".lstrip(".") for name in names if name not in PAGES_OF_MODULES]


@pytest.mark.parametrize("module", ["", "core", "tasks", "losses", "plots", "recipes.features", "recipes.federated"])
def test_each_public_name_has_one_entry_in_the_reference(module):
    if module == "plots":
        pytest.importorskip("matplotlib")
    counts = {name: ENTRIES[name] + (ENTRIES[f"core.{name}"] if module == "core" else 0) for name in public(module)}
    assert len(counts) > 4
    assert {name: count for name, count in counts.items() if count != 1} == {}


def test_no_entry_stands_twice_and_each_page_has_some():
    assert [name for name, count in ENTRIES.items() if count > 1] == []
    assert [stem for stem, names in API.items() if not names] == ["index"]


def test_the_list_of_pages_is_what_the_script_writes():
    assert (ROOT / "llms.txt").read_text() == listing(repository_address), "run python docs/list_pages.py"


def test_each_page_is_listed_with_a_sentence():
    listed = list(pages())
    assert len(listed) > 30
    assert [page.path for page in listed if not (ROOT / page.path).exists() or not page.sentence] == []
    assert {site_address(page) for page in listed} >= {"./", "chat/", "api/", "configs/trainer/", "CONTRIBUTING/"}


def test_tables_and_charts_are_what_the_script_makes_of_the_results():
    assert PAGE.read_text() == filled(PAGE.read_text()), "run python docs/draw_benchmarks.py"
    drawn = charts()
    assert {path.stem: path.read_text() for path in CHARTS.glob("*.svg")} == drawn, "run python docs/draw_benchmarks.py"
    assert max(map(len, drawn.values())) < 8_000


def test_each_result_of_a_benchmark_is_on_the_page():
    stems = {path.stem for path in RESULTS.glob("*.json") if not path.stem.startswith("evidence")}
    assert stems == set(TABLES)
    assert stems == set(re.findall(r"<!-- table: (\w+) -->", PAGE.read_text()))
    assert [stem for stem in charts() if f"(pictures/benchmarks/{stem}.svg)" not in PAGE.read_text()] == []
    commands = re.findall(r"`python\s+(benchmarks/\w+\.py)", PAGE.read_text())
    assert {path for path in commands if (ROOT / path).is_file()} == {f"benchmarks/{stem}.py" for stem in stems}
