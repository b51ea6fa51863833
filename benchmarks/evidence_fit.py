"""Training in benchmarks/evidence.py: a module with one learning rate, and the search among a few."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from evidence_cost import Cost, file_sizes

import lightning_peft as lp

QUIET = {"num_sanity_val_steps": 0, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
QUIET["enable_checkpointing"] = False


def read(folder: Path, split: str) -> list[dict[str, Any]]:
    path = next(folder.glob(f"{split}.jsonl*"))
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Fit:
    """A module that ``build`` makes, trained with one learning rate and validated; without a strategy, as it is."""

    def __init__(
        self,
        build: Callable[[float], pl.LightningModule],
        strategy: lp.PEFTStrategy | None,
        data: Any,
        rate: float,
        seed: int,
        epochs: int = 1,
    ) -> None:
        pl.seed_everything(seed, verbose=False)
        self.data, self.rate, self.module = data, rate, build(rate)
        for parameter in self.module.parameters():
            parameter.sum()  # weights that are mapped from a file are in memory once they are read
        data.setup("fit")
        callbacks = [] if strategy is None else [strategy]
        settings = {"accelerator": "cpu", "max_epochs": epochs, "limit_val_batches": 0}
        self.trainer = pl.Trainer(callbacks=callbacks, **settings, **QUIET)
        with Cost() as self.cost:
            if strategy is not None:
                self.trainer.fit(self.module, data)
        self.scorer = pl.Trainer(accelerator="cpu", callbacks=callbacks, **QUIET)
        self.validation = self.score("validate", "val")

    def score(self, call: str, split: str) -> dict[str, float]:
        """Return loss and accuracy, if it has one, in batches that are larger than those of training."""
        batch_size, self.data.batch_size = self.data.batch_size, 64
        (found,) = getattr(self.scorer, call)(self.module, self.data, verbose=False)
        self.data.batch_size = batch_size
        names = [name for name in ("accuracy", "loss") if f"{split}_{name}" in found]
        return {name: round(found[f"{split}_{name}"], 4) for name in names}

    def tried(self) -> dict[str, Any]:
        return {"rate": self.rate, **self.validation, "cpu_seconds": self.cost.seconds}

    @property
    def merit(self) -> tuple[float, float]:
        return self.validation.get("accuracy", 0.0), -self.validation["loss"]


def best_of(rates: list[float], fit: Callable[[float], Fit]) -> dict[str, Any]:
    """Train with each rate, and beyond the last one if it is the best; test what is best on the validation rows."""
    waiting = sorted(rates)
    beyond = {waiting[0]: waiting[0] / 3, waiting[-1]: waiting[-1] * 3} if len(waiting) > 1 else {}
    tried: list[dict[str, Any]] = []
    best, memory = None, 0
    while waiting:
        new = fit(waiting.pop(0))
        memory = memory or new.cost.memory  # before later fits, the process has some already
        tried.append(new.tried())
        best = new if best is None or new.merit > best.merit else best
        if len(tried) == len(rates) and best.rate in beyond:
            waiting = [beyond[best.rate]]
    assert best is not None
    return {**tested(best), "rate": best.rate, "tried": tried, "memory": memory}


def tested(fit: Fit) -> dict[str, Any]:
    """Return the result on test rows (accuracy, or the loss with a minus), and what the fit cost."""
    validation, test = fit.validation, fit.score("test", "test")
    found = {split: s.get("accuracy", -s["loss"]) for split, s in {"validation": validation, "test": test}.items()}
    trained = lp.summary(fit.module).trainable
    costs = {"test_loss": test["loss"], "trained": trained, "cpu_seconds": fit.cost.seconds}
    return {**found, **costs, **file_sizes(fit.module, fit.trainer)}
