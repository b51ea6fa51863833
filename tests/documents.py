"""What pages of documentation name and show: files, functions, blocks of code."""

import ast
import functools
import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_peft"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(page, language):
    """Return the blocks of code of a page in one language."""
    return [text for found, text in FENCED.findall((ROOT / page).read_text()) if found == language]


def prose(page):
    return FENCED.sub("", (ROOT / page).read_text())


def links(page):
    """Return the targets of a page's links to files of the repository, as paths."""
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", prose(page))
    return [((ROOT / page).parent / target).resolve() for target in targets if "://" not in target]


def references(text):
    """Return what stands in backticks as `path` or `path:name`, where a path has a folder or ends like a file's."""
    return re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|yaml|toml|svg)|(?:[\w.-]+/)+[\w-]*)(?::([\w.]+))?`", text)


def locate(path):
    """Return the file or folder that a page means: in the repository, or in the package."""
    return next((place / path for place in (ROOT, PACKAGE) if (place / path).exists()), None)


def defines(path, name):
    """Return whether a file defines a dotted name: a class, a function, a method, one inside of these, a constant."""
    body = ast.parse(path.read_text()).body
    for part in name.split("."):
        found = [node for node in body if part in _names(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def _names(node):
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


@functools.cache
def execute(text, name):
    """Return a module of this name in which a block ran; with the name come relative imports, and pickling.

    It stays importable, since its methods stay subclasses of ``Method``, which command lines import by their module.
    """
    module = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    sys.modules[name] = module
    exec(compile(text, f"<{name}>", "exec"), module.__dict__)  # noqa: S102
    return module
