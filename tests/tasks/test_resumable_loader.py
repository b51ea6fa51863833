from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.tasks.resumable_loader import ResumableLoader

ROWS = torch.arange(20.0).view(10, 2)  # four batches of three or fewer


class Noisy(LightningModule):
    """Records its batches, and draws at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(2, 2), []  # type: ignore[var-annotated]

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        self.seen.append(batch[:, 0].tolist())
        return self.layer(batch + torch.randn(2)).pow(2).mean()

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        self.log("val_loss", self.layer(batch).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.layer.parameters(), lr=0.01)


def run(folder: Path, limit: dict[str, int], saved: ModelCheckpoint | None = None, path: Path | None = None) -> Noisy:
    seed_everything(3, verbose=False)
    module, strategy = Noisy(), lp.PEFTStrategy(lp.FullFineTuning(), show_summary=False)
    callbacks = [strategy] if saved is None else [strategy, saved]
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        num_sanity_val_steps=0, enable_checkpointing=saved is not None, default_root_dir=folder, **limit,
    )  # fmt: skip
    loader = ResumableLoader(ROWS, 3, shuffle=True)  # type: ignore[arg-type]
    trainer.fit(module, loader, DataLoader(ROWS, 5), ckpt_path=path)  # type: ignore[arg-type]
    return module


WHEN: dict[str, tuple[dict[str, Any], int, int]] = {
    "inside an epoch": ({"every_n_train_steps": 3}, 3, 3),
    "inside the second epoch": ({"every_n_train_steps": 6}, 6, 6),
    "after the last batch": ({"every_n_train_steps": 4}, 4, 4),
    "after validation": ({"monitor": "val_loss"}, 4, 4),
    "after an epoch": ({"save_on_train_epoch_end": True, "every_n_epochs": 1}, 4, 4),
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")
@pytest.mark.parametrize("limit", ["max_steps", "max_epochs"])
@pytest.mark.parametrize("when", WHEN)
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(tmp_path: Path, when: str, limit: str) -> None:
    settings, steps, done = WHEN[when]
    end = {"max_steps": 11} if limit == "max_steps" else {"max_epochs": 3}
    whole = run(tmp_path, end)
    stop = {"max_steps": steps} if limit == "max_steps" else {"max_epochs": -(-steps // 4)}
    run(tmp_path, stop, ModelCheckpoint(tmp_path / "half", filename="x", **settings))
    resumed = run(tmp_path, end, path=tmp_path / "half" / "x.ckpt")
    assert resumed.seen == whole.seen[done:]
    assert len({str(whole.seen[i : i + 4]) for i in (0, 4)}) == 2
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
