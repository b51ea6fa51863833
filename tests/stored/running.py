"""Outputs of stored cases, and runs of the Trainer that write and read their checkpoints."""

import contextlib
import gzip
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from stored.cases import Call, Case
from stored.models import Task, tokens

import lightning_peft as lp

FOLDER = Path(__file__).parent
CHECKPOINT, EXPECTED = "checkpoint.ckpt.gz", "expected.json"
EPOCHS = 3  # of one step each; the checkpoint was written after the second


def outputs(task: Task, case: Case) -> list[list[float]]:
    """Return a few output values for each way to call the model."""
    return [_values(task, case, call) for call in case.calls]


@torch.no_grad()
def _values(task: Task, case: Case, call: Call) -> list[float]:
    if call.active is not None:
        lp.activate(task, *call.active)
    with contextlib.nullcontext() if call.tasks is None else lp.row_tasks(task, torch.tensor(call.tasks)):
        found = task.eval()(tokens(case.with_pseudo)).flatten()
    return found[:: max(1, len(found) // 12)].tolist()


def trainer(case: Case, *callbacks: pl.Callback) -> pl.Trainer:
    kind = case.model.partition("-")[2] or None
    methods = list(case.methods) or None
    strategy = lp.PEFTStrategy(methods, list(case.also_train), quantize=kind, show_summary=False)
    return pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, callbacks=[strategy, *callbacks], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip


def fit(case: Case, *callbacks: pl.Callback, path: Path | None = None) -> tuple[Task, float]:
    """Return a trained module and its last loss."""
    task = Task(case.model, case.with_pseudo)
    if case.build is not None:
        case.inject(task)
    runner = trainer(case, *callbacks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, on loaders and on the folder of the checkpoint
        runner.fit(task, ckpt_path=path, **({} if path is None else {"weights_only": True}))
    return task, runner.callback_metrics["loss"].item()


def expected(name: str) -> dict[str, list[list[float]] | float]:
    return json.loads((FOLDER / name / EXPECTED).read_text())


def unpack_checkpoint(name: str, folder: Path) -> Path:
    """Write the checkpoint of a case, which is stored compressed, into a folder."""
    path = folder / f"{name}.ckpt"
    path.write_bytes(gzip.decompress((FOLDER / name / CHECKPOINT).read_bytes()))
    return path


def stored_names() -> Iterator[str]:
    """Yield the names of the stored folders."""
    return (path.parent.name for path in sorted(FOLDER.glob(f"*/{EXPECTED}")))
