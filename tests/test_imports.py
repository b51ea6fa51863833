"""Imports point one way, rooms say what they are for, and the public surface is what is exported."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import lightning_peft as lp
from docs.draw_rooms import FILES, ORDER, ROOT, imported, imports, room

AT_THE_TOP = {"__init__.py", "__main__.py", "py.typed", "summary.py"}

# Loads Lightning, then the program and its help; prints what the second part loads, and what `fit --help` adds.
STARTS = """
import contextlib, io, sys
import jsonargparse, lightning.pytorch.cli
known = set(sys.modules)
import lightning_peft.cli.main
for arguments in (["--help"], ["fit", "--help"]):
    sys.argv = ["lightning-peft", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        lightning_peft.cli.main.main()
    assert "usage: lightning-peft" in page.getvalue()
print(*sorted(sys.modules.keys() - known))
"""
HEAVY = {"datasets", "flwr", "huggingface_hub", "matplotlib", "pandas", "scipy", "sklearn", "torch", "transformers"}


def test_every_way_to_write_an_import_is_seen():
    source = (
        "import os.path\nfrom .. import plots, LoRA\nfrom . import loha\nfrom .lora import export\nfrom torch import nn"
    )
    found = list(imports(source, "lightning_peft.interop"))
    assert found[:3] == ["os.path", "lightning_peft.plots", "lightning_peft"]
    assert found[3:] == ["lightning_peft.interop.loha", "lightning_peft.interop.lora", "torch"]


def test_only_what_belongs_to_no_room_is_at_the_top():
    assert {path.name for path in ROOT.iterdir() if path.is_file()} == AT_THE_TOP


def test_every_package_is_a_room_or_in_one():
    folders = {path.parent for path in FILES.values()}
    assert {path for path in folders if not (path / "__init__.py").is_file()} == set()
    packages = {path.name for path in folders if path.parent == ROOT}
    assert packages | {name.removesuffix(".py") for name in AT_THE_TOP if name[-3:] == ".py"} == {*ORDER, "__init__"}


def test_the_docstring_of_a_package_begins_with_a_line_that_is_one_sentence():
    docs = {name: ast.get_docstring(ast.parse(p.read_text())) for name, p in FILES.items() if p.name == "__init__.py"}
    del docs["lightning_peft"]  # it shows how to begin
    first = {name: (doc or "").split("\n\n")[0] for name, doc in docs.items()}
    assert len(docs) >= 14
    assert [name for name, line in first.items() if "\n" in line or ". " in line or not line] == []


def test_imports_point_one_way():
    own = [(name, target) for name in FILES for target in imported(name) if target.split(".")[0] == "lightning_peft"]
    own = [(name, target) for name, target in own if name != "lightning_peft"]
    assert {room(name) for name, _ in own} >= set(ORDER) - {"ops", "files"}
    of_all = [f"{name} imports the whole package" for name, target in own if target == "lightning_peft"]
    assert of_all == []
    back = [(name, target) for name, target in own if ORDER.index(room(target)) > ORDER.index(room(name))]
    assert back == []


def test_only_the_trainers_side_imports_lightning():
    allowed = {"training", "tasks", "recipes", "cli"}
    users = {name for name in FILES if "lightning" in {target.split(".")[0] for target in imported(name)}}
    assert {room(name) for name in users} == allowed


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the import statements that run when a module is imported: outside of functions and of type checking."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from at_import(child)


def loaded_with(name: str) -> tuple[set[str], set[str]]:
    """Return the modules of the package that come with one of them, and the names of the others' packages."""
    own, others, waiting = set(), set(), [name]
    while waiting:
        name = waiting.pop()
        if name in own or name not in FILES:
            others |= {name.partition(".")[0]} - {"lightning_peft"}
            continue
        own.add(name)
        path = FILES[name]
        statements = "\n".join(map(ast.unparse, at_import(ast.parse(path.read_text()))))
        waiting += imports(statements, name if path.name == "__init__.py" else name.rpartition(".")[0])
        waiting += [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
    return own, others - set(sys.stdlib_module_names)


def test_a_start_imports_no_plots_no_recipes_and_of_others_what_it_needs():
    rest = {"plots", "recipes", "tasks", "cli", "__main__"}
    own, others = loaded_with("lightning_peft")
    assert others == {"fsspec", "lightning", "lightning_utilities", "numpy", "safetensors", "torch"}
    assert {room(name) for name in own - {"lightning_peft"}} == set(ORDER) - rest
    own, others_of_program = loaded_with("lightning_peft.cli.main")
    assert others_of_program == others | {"jsonargparse", "torchmetrics"}
    assert {room(name) for name in own - {"lightning_peft"}} == set(ORDER) - rest | {"tasks", "cli"}


@pytest.mark.slow
def test_the_program_and_its_help_load_nothing_heavy_beside_lightning():
    found = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, check=True).stdout.split()
    assert "lightning_peft.cli.commands" in found
    assert [name for name in found if name.partition(".")[0] in HEAVY] == []
    assert [name for name in found if name.startswith(("lightning_peft.plots", "lightning_peft.recipes"))] == []


def test_plots_are_there_when_they_are_asked_for():
    assert lp.plots.__name__ == "lightning_peft.plots"
    with pytest.raises(AttributeError, match="module 'lightning_peft' has no attribute 'plot'"):
        _ = lp.plot


def test_fsdp1_is_known_at_the_edge_alone():
    words = re.compile(r"fsdp1|import .*\bFullyShardedDataParallel\b", re.IGNORECASE)
    users = {name for name, path in FILES.items() if words.search(f"{path.name} {path.read_text()}")}
    assert "lightning_peft.training.distributed.fsdp1_parameters" in users
    assert {room(name) for name in users - {"lightning_peft"}} == {"training"}


def test_methods_know_neither_injection_nor_each_other():
    methods = {name for name, path in FILES.items() if path.parent == ROOT / "methods" and path.name != "__init__.py"}
    assert "lightning_peft.methods.lora" in methods
    others = {name: (methods | {"lightning_peft.core.inject"}) & set(imported(name)) for name in methods}
    assert {name: found for name, found in others.items() if found} == {}


def test_the_public_surface_is_sorted_and_complete():
    assert lp.__all__ == sorted(lp.__all__)
    public = {name for name, value in vars(lp).items() if not name.startswith("_") and not hasattr(value, "__path__")}
    modules = {path.stem for path in ROOT.iterdir()}
    assert public - modules - {"TYPE_CHECKING", "version"} == set(lp.__all__) - modules
    assert [name for name in lp.__all__ if not getattr(lp, name).__doc__] == []
