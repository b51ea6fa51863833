"""Training in stages, each of which ends with an adapter folder; a stage that was killed resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ..checkpoints.save_load import save_adapter
from ..core.adapter_folder import CONFIG, write_json
from ..tasks.data.mixed_data import MixedDataModule
from ..tasks.module import TaskModule
from ..training.callback import PEFTStrategy
from .settings_diff import changes

Plain = dict[str, Any]
_LAST, _SETTINGS, _REPORT, _ADAPTER = "last.ckpt", "settings.json", "report.json", "adapter"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a stage trains.

    Args:
        epochs: Passes over the train rows.
        learning_rate: Highest learning rate, in place of the module's own.
        lr_factors: Factors of the learning rate by glob of parameter names, such as ``{"*.u": 3.0}``.
    """

    epochs: int = 5
    learning_rate: float = 1e-2
    lr_factors: dict[str, float] = field(default_factory=dict)


class Stage:
    """One stage: its folder holds ``adapter``, ``report.json``, ``settings.json`` and, while it trains, ``last.ckpt``.

    Args:
        folder: Of this stage.
        settings: All that its result depends on, as plain data.
    """

    def __init__(self, folder: Path, settings: Plain) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings, default=str))

    @property
    def adapter(self) -> Path:
        """The adapter's folder."""
        return self.folder / _ADAPTER

    @property
    def done(self) -> bool:
        """Whether the adapter is there."""
        return (self.adapter / CONFIG).is_file()

    def check(self) -> None:
        """Compare the settings with those that the folder's checkpoint or adapter was trained with.

        Raises:
            ValueError: Some differ; names them.
        """
        if not (self.done or (self.folder / _LAST).is_file()):
            return  # what failed before its first epoch ended may be corrected
        differ = changes(json.loads((self.folder / _SETTINGS).read_text(encoding="utf-8")), self.settings)
        if differ:
            raise ValueError(
                f"{str(self.folder)!r} was begun with other settings: {'; '.join(differ[:5])}. Give these settings "
                "again, or another output."
            )

    def train(
        self,
        module: LightningModule,
        evaluated: TaskModule,
        strategy: PEFTStrategy,
        data: LightningDataModule,
        trainer: Mapping[str, Any],
    ) -> Plain:
        """Train up to the adapter, from the last whole epoch if there is one; return the report.

        Args:
            module: What trains.
            evaluated: What is validated and tested, with the adapters of ``module``.
            strategy: Adapts it.
            data: Its data.
            trainer: Arguments of the Trainer.
        """
        last = self.folder / _LAST
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
        options: Plain = {**quiet, **trainer, "default_root_dir": str(self.folder)}
        run = Trainer(**options, max_epochs=self.settings["epochs"], callbacks=[strategy, LastCheckpoint(last)])
        if run.world_size > 1:
            raise ValueError(
                f"Got a Trainer of {run.world_size} processes, expected one: stages hand files on. Set devices: 1."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / _SETTINGS, self.settings)
        run.fit(module, datamodule=data, ckpt_path=str(last) if last.is_file() else None)
        report = {"epochs": run.current_epoch, "steps": run.global_step}
        report |= evaluate_stage(Trainer(**options, enable_checkpointing=False), evaluated, data)
        write_json(self.folder / _REPORT, report)
        save_adapter(module, self.adapter)  # last, because it means that the stage is done
        return report

    def report(self) -> Plain:
        """What the finished stage wrote."""
        found: Plain = json.loads((self.folder / _REPORT).read_text(encoding="utf-8"))
        return found


class LastCheckpoint(Checkpoint):
    """Keeps the checkpoint of the last whole epoch; it is replaced by a whole one or not at all.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and replace."""
        part = self.path.with_suffix(".part")
        trainer.save_checkpoint(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, self.path)


def evaluate_stage(trainer: Trainer, module: TaskModule, data: LightningDataModule) -> Plain:
    """Return the metrics of the splits that there are, with the share of the most frequent answer beside an accuracy.

    ``worse_than_guess`` lists where the accuracy is below that share.
    """
    tasks: dict[str, Any] = {"": data}
    if isinstance(data, MixedDataModule):
        tasks = {f"/{name}": task for name, task in data.tasks.items()}
    report: Plain = {"worse_than_guess": []}
    for split, prefix, run in (("validation", "val", trainer.validate), ("test", "test", trainer.test)):
        if not all(task.splits.has(split) for task in tasks.values()):
            continue
        report |= run(module, datamodule=data, verbose=False)[0]
        for name, task in tasks.items() if module.accuracy else ():
            labels = Counter(row["labels"] for row in task.examples(split))
            share = report[f"{prefix}_most_frequent{name}"] = max(labels.values()) / sum(labels.values())
            if report[f"{prefix}_{module.accuracy}{name}"] < share:
                report["worse_than_guess"].append(f"{prefix}{name}")
    return report


def described(part: LightningModule | LightningDataModule) -> Plain:
    """Return the class and arguments of a module or its data, and digests of the files that it reads."""
    files = getattr(getattr(part, "splits", None), "files", {})
    digests = {split: _digest(file) for split, file in files.items() if file is not None}
    return {"class": type(part).__name__, **part.hparams} | ({"sha256": digests} if digests else {})


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
