"""Writes the files of cases that have none, and compares the outputs of all with those stored, to the bit.

Run it in the root of the repository: PYTHONPATH=.:tests OMP_NUM_THREADS=1 python -m stored.write

Files that are there stay as they are: they show that a later version reads what an earlier one wrote. Outputs are the
same to the bit on one machine with one version of torch; elsewhere, what the last column says is rounding.
"""

import gzip
import json
import tempfile
from itertools import chain
from pathlib import Path

import lightning.pytorch as pl
import torch
from stored.cases import CASES, Case
from stored.models import Task, values
from stored.running import CHECKPOINT, EXPECTED, FOLDER, expected, fit, outputs, unpack_checkpoint

import lightning_peft as lp


class SaveAfterTwo(pl.Callback):
    """Fills the adapters, writes the checkpoint that a run goes on from, and notes what the module returns then."""

    def __init__(self, path: Path, case: Case) -> None:
        self.path, self.case = path, case
        self.outputs: list[list[float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Task) -> None:
        fill_adapters(pl_module, self.case)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        if trainer.current_epoch == 1:
            with tempfile.TemporaryDirectory() as folder:
                trainer.save_checkpoint(path := Path(folder, "x.ckpt"))
                self.path.write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
            self.outputs = outputs(pl_module, self.case)
            pl_module.train()


@torch.no_grad()
def fill_adapters(task: Task, case: Case) -> None:
    for name, parameter in task.named_parameters():
        if ".peft." in name or parameter.requires_grad:
            parameter.copy_(case.scale * values(name, parameter))


def write(name: str, case: Case) -> None:
    task = Task(case.model, case.with_pseudo)
    case.inject(task)
    fill_adapters(task, case)
    lp.save_adapter(task, FOLDER / name)
    found = {"outputs": outputs(task, case)}
    if case.trains:
        torch.manual_seed(0)
        saved = SaveAfterTwo(FOLDER / name / CHECKPOINT, case)
        trained, loss = fit(case, saved)
        found |= {"trained": saved.outputs, "resumed": outputs(trained, case), "last_loss": loss}
    (FOLDER / name / EXPECTED).write_text(json.dumps(found) + "\n")


def read(name: str, case: Case) -> dict[str, object]:
    """Return what ``write`` stored as expected, of what is there."""
    found: dict[str, object] = {"outputs": outputs(lp.load_adapter(Task(case.model), FOLDER / name), case)}
    if case.trains:
        with tempfile.TemporaryDirectory() as folder:
            path = unpack_checkpoint(name, Path(folder))
            loaded = lp.load_from_checkpoint(Task, path)
            resumed, loss = fit(case, path=path)
        found |= {"trained": outputs(loaded, case), "resumed": outputs(resumed, case), "last_loss": loss}
    return found


def flat(content: object) -> list[float]:
    return list(chain.from_iterable(map(flat, content))) if isinstance(content, list) else [content]


def main() -> None:
    for name, case in CASES.items():
        if not (FOLDER / name / EXPECTED).exists():
            write(name, case)
        before, after = expected(name), read(name, case)
        pairs = [pair for key in before for pair in zip(flat(before[key]), flat(after[key]), strict=True)]
        print(f"{name:35}{'same' if before == after else max(abs(a - b) for a, b in pairs)}")


if __name__ == "__main__":
    main()
