"""CONTRIBUTING.md is true: its code runs, its methods and layers obey the laws, and a copy changed by it passes."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import test_contract
import test_weight_updates
from cases import Case
from documents import ROOT, blocks, execute
from installed import needs

PAGE = "CONTRIBUTING.md"
PYTHON, DIFFS = blocks(PAGE, "python"), blocks(PAGE, "diff")
COMMANDS = [line.partition("#")[0].strip() for block in blocks(PAGE, "bash") for line in block.splitlines()]
FILES = {match[1]: text for text in PYTHON if (match := re.match(r"# (\S+\.py)\n", text))}
METHOD, ADAPTER, LAYER = "lightning_peft/methods/rank_one.py", "tests/gate.py", "tests/dense.py"
LAWS = [
    "test_base_keys_stay_and_a_base_state_loads_after_injection",
    "test_step_0_is_the_base_bit_for_bit",
    "test_trained_values_matter_and_both_modes_agree",
    "test_detach_restores_the_base",
    "test_merge_equals_live",
    "test_update_is_the_map_of_delta",
    "test_three_steps_train_what_is_declared_and_nothing_else",
    "test_a_narrow_base_keeps_wide_adapters",
    "test_autocast_to_bfloat16_changes_values_by_rounding_alone",
]
REFUSED = ["test_a_refused_merge_leaves_the_model_untouched"]


@pytest.fixture
def example():
    """Return a function that runs the block of a file and returns it as a module."""
    return lambda file: execute(FILES[file], file.removesuffix(".py").replace("/", "."))


def test_the_page_has_the_blocks_that_these_tests_run():
    assert {METHOD, ADAPTER, LAYER} < set(FILES)
    assert (len(PYTHON), len(DIFFS), len(COMMANDS)) == (5, 4, 12)


@pytest.mark.parametrize("model", ["plain", "encoder", pytest.param("gpt2", marks=needs("transformers"))])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.usefixtures("ordinary_path")
def test_the_example_of_a_method_obeys_the_laws(law, model, example):
    method = example(METHOD).RankOne(scale=2)
    assert method.scale == 2
    getattr(test_contract, law)(Case(model, (method,)))


@pytest.mark.parametrize(
    "model",
    ["encoder", *[pytest.param(name, marks=[needs("transformers"), pytest.mark.slow]) for name in ("bert", "gpt2")]],
)
@pytest.mark.parametrize("law", [law for law in LAWS if "merge" not in law and "delta" not in law] + REFUSED)
@pytest.mark.usefixtures("ordinary_path")
def test_the_example_of_an_adapter_that_is_no_weight_update_obeys_the_laws(law, model, example):
    method = example(ADAPTER).AttentionGate()
    assert method.targets == ["attention"]
    getattr(test_contract, law)(Case(model, (method,), mergeable=False))


def test_the_example_of_a_method_refuses_what_is_no_scale(example):
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        example(METHOD).RankOne(scale=0)


@pytest.mark.parametrize("name", test_weight_updates.METHODS)
def test_each_method_is_right_on_the_example_of_a_layer_type(name, example, monkeypatch):
    dense = example(LAYER)
    monkeypatch.setitem(test_weight_updates.LAYERS, "dense", (lambda: dense.Dense(32, 64), (40, 32), "layer"))
    test_weight_updates.test_values_and_gradients_are_those_of_the_updated_weight(name, "dense", "float32")
    test_weight_updates.test_rows_that_are_written_are_those_that_are_read_and_the_others_stay("dense")


@needs("transformers")
def test_other_blocks_run(capsys):
    (roles,) = [text for text in PYTHON if text not in FILES.values()]
    execute(roles, "roles_of_a_model")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["attention.query", "3", "model.layers.0.self_attn.q_proj"] in lines
    assert len(lines) == 6


def test_commands_name_targets_of_make_and_what_ci_runs():
    makefile = (ROOT / "Makefile").read_text()
    text = (ROOT / PAGE).read_text()
    targets = set(re.findall(r"\bmake ([\w-]+)", text)) - {"sense"}
    assert targets >= {"test", "test-all", "test-newest", "test-oldest", "lint", "format"}
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)] == []
    assert (
        re.findall("^make .*", (ROOT / ".ci" / "run").read_text(), re.M)
        == re.findall(r"`(make [\w-]+)`", text[text.index("`.ci/run` is what a change must pass") :])[:4]
    )


def changed(text, diff):
    """Return a text with the added lines of a diff behind the lines of it that precede them."""
    before = None
    for line in diff.splitlines():
        if line.startswith(" "):
            before = line[1:]
            assert text.count(f"{before}\n") == 1, before
        else:
            text = text.replace(f"{before}\n", f"{before}\n{line[1:]}\n")
    return text


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of the repository, changed as the page says."""
    folder = tmp_path_factory.mktemp("repository") / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "stored", "runs", "build", "dist"))
    for name, text in FILES.items():
        (folder / name).write_text(text.partition("\n")[2])
    for diff in DIFFS:
        head, _, rest = diff.partition("\n")
        path = folder / head.removeprefix("--- ")
        path.write_text(changed(path.read_text(), rest))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("make")])
def test_each_command_passes_in_a_copy_that_was_changed_as_the_page_says(command, copy):
    program, *arguments = shlex.split(command)
    start = (
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"] if program == "pytest" else [sys.executable]
    )
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert program != "pytest" or int(passed[1]) > 0
