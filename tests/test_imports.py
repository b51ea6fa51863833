"""Imports point one way, and the public surface is what is exported."""

import ast
from pathlib import Path

import lightning_peft as lp

ROOT = Path(lp.__file__).parent
ROOMS = """
    losses ops structure core methods quantization checkpoints summary composition training interop analysis tasks
    plots recipes cli __main__
"""
ORDER = ROOMS.split()


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    package = ["lightning_peft", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_point_one_way():
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "__init__.py":
            continue
        for name in imports(path):
            if name.startswith("lightning_peft."):
                target = name.split(".")[1]
                assert ORDER.index(target) <= ORDER.index(room(path)), f"{path.name} imports {name}"


def test_only_the_trainers_side_imports_lightning():
    for path in ROOT.rglob("*.py"):
        if room(path) not in ("training", "tasks", "recipes", "cli", "__init__"):
            assert not [name for name in imports(path) if name.split(".")[0] == "lightning"], path


def test_methods_know_neither_injection_nor_each_other():
    for path in (ROOT / "methods").glob("*.py"):
        if path.name != "__init__.py":
            siblings = {f"lightning_peft.methods.{other.stem}" for other in path.parent.glob("*.py")}
            assert not siblings & set(imports(path)), path
            assert "lightning_peft.core.inject" not in imports(path), path


def test_the_public_surface_is_sorted_and_complete():
    assert lp.__all__ == sorted(lp.__all__)
    public = {name for name, value in vars(lp).items() if not name.startswith("_") and not hasattr(value, "__path__")}
    modules = {path.stem for path in ROOT.iterdir()}
    assert public - modules - {"version"} == set(lp.__all__) - modules
    for name in lp.__all__:
        assert getattr(lp, name).__doc__, name
