"""Loaders, and runs over them, of the tests of exact resuming."""

import math
import random
import warnings

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from trainer_models import Resumable, trainer

import lightning_peft as lp

ROWS, BATCH = 24, 4
STEPS = ROWS // BATCH  # of an epoch


class Rows(Dataset):
    """Rows with their number; counts how many this process loaded."""

    def __init__(self, count=ROWS):
        self.values = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
        self.loaded = 0

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        self.loaded += 1
        return {"row": index, "x": self.values[index]}


class NoisyRows(Rows):
    """Adds noise of all global generators, which dropout draws from as well."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return {**found, "x": found["x"] + torch.randn(6) + random.random() + np.random.rand()}  # noqa: S311


class OwnNoise(Rows):
    """Adds noise of generators of its own."""

    def __init__(self):
        super().__init__()
        self.numpy, self.python, self.old = np.random.default_rng(2), random.Random(3), np.random.RandomState(4)  # noqa: S311

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return {**found, "x": found["x"] + self.numpy.random() + self.python.random() + self.old.rand()}


class Stream(IterableDataset):
    """Yields rows in an order of each pass, shared between workers."""

    def __init__(self):
        self.rows, self.passes = Rows(), 0

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.passes)).tolist()
        self.passes += 1
        return (self.rows[index] for index in order[first::step])


class SizedStream(Stream):
    def __len__(self):
        return ROWS


class NoisyStream(Stream):
    """A stream whose order comes from torch's global generator; in a worker, from that of the worker."""

    def __iter__(self):
        return (self.rows[index] for index in torch.randperm(ROWS)[: ROWS // get_worker_info().num_workers].tolist())


class Passes(Sampler):
    """A sampler that counts its passes, and shuffles by them."""

    def __init__(self):
        self.passes = 0

    def __len__(self):
        return ROWS

    def __iter__(self):
        self.passes += 1
        yield from torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.passes)).tolist()


class Buckets:
    """A batch sampler of no class of torch's, with a generator of numpy."""

    def __init__(self):
        self.numpy = np.random.default_rng(5)

    def __len__(self):
        return STEPS

    def __iter__(self):
        yield from self.numpy.permutation(ROWS).reshape(STEPS, BATCH).tolist()


class OwnIterable:
    """A loader of no class of torch's."""

    def __init__(self):
        self.python = random.Random(6)  # noqa: S311

    def __len__(self):
        return STEPS

    def __iter__(self):
        order = self.python.sample(range(ROWS), ROWS)
        rows = Rows()
        for first in range(0, ROWS, BATCH):
            yield torch.utils.data.default_collate([rows[index] for index in order[first : first + BATCH]])


class Data(pl.LightningDataModule):
    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader()


def loader(dataset=Rows, kind=DataLoader, **settings):
    return lambda: kind(dataset(), **{"batch_size": BATCH, **settings})


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def combined(mode):
    return lambda: pl.utilities.CombinedLoader(
        {"a": loader(shuffle=True)(), "b": DataLoader(Rows(10), BATCH, shuffle=True)}, mode
    )


TWO = {"num_workers": 2}
KEPT = {"num_workers": 2, "persistent_workers": True}
KINDS = {
    "in order": loader(),
    "shuffled": loader(shuffle=True),
    "shuffled, last batch dropped": loader(shuffle=True, batch_size=5, drop_last=True),
    "shuffled, own generator": lambda: loader(shuffle=True, generator=seeded())(),
    "shuffled, 2 workers": loader(shuffle=True, **TWO),
    "shuffled, 2 workers, own generator": lambda: loader(shuffle=True, generator=seeded(), **TWO)(),
    "shuffled, 2 persistent workers": loader(shuffle=True, **KEPT),
    "persistent workers, own generator": lambda: loader(shuffle=True, generator=seeded(), **KEPT)(),
    "own sampler": lambda: loader(sampler=Passes())(),
    "own sampler, 2 workers": lambda: loader(sampler=Passes(), **TWO)(),
    "own sampler, persistent workers": lambda: loader(sampler=Passes(), **KEPT)(),
    "own batch sampler": lambda: DataLoader(Rows(), batch_sampler=Buckets()),
    "batch sampler, 2 workers": lambda: DataLoader(
        Rows(), batch_sampler=BatchSampler(torch.utils.data.RandomSampler(range(ROWS)), BATCH, False), **TWO
    ),
    "weighted sampler": lambda: loader(sampler=torch.utils.data.WeightedRandomSampler(torch.ones(ROWS), ROWS))(),
    "rows with random numbers": loader(NoisyRows, shuffle=True),
    "rows with generators of their own": loader(OwnNoise, shuffle=True),
    "iterable": loader(Stream),
    "iterable with a length": loader(SizedStream),
    "iterable, 2 workers": loader(Stream, **TWO),
    "iterable, order drawn by workers": loader(NoisyStream, **TWO),
    "own state_dict": loader(kind=Resumable, shuffle=True),
    "no DataLoader": OwnIterable,
    "DataModule": lambda: Data(loader(shuffle=True)),
    "DataModule, made anew in each epoch": lambda: Data(loader(shuffle=True)),
    "two loaders": combined("max_size_cycle"),
    "two loaders, the shortest": combined("min_size"),
    "a dict of loaders": lambda: {"a": loader(shuffle=True)(), "b": loader(Stream)()},
}
SETTINGS = {"DataModule, made anew in each epoch": {"reload_dataloaders_every_n_epochs": 1}}


class Task(pl.LightningModule):
    """Trains a small network with dropout, and notes the rows of each batch.

    Args:
        reads: Whether configure_optimizers reads the number of steps.
    """

    def __init__(self, reads=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))
        self.reads, self.seen = reads, []

    def training_step(self, batch, index):
        batches = [batch] if "x" in batch else [part for part in batch.values() if part is not None]
        self.seen.append([part["row"].tolist() for part in batches])
        return sum(self.net(part["x"]).square().mean() for part in batches)

    def validation_step(self, batch, index):
        self.log("val_loss", self.net(batch["x"]).square().mean())

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches if self.reads else 1
        optimizer = torch.optim.AdamW(self.parameters(), 0.05)
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 if steps < 0 else 0.97**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}


def fit(
    make,
    reads=False,
    *callbacks,
    path=None,
    seed=7,
    epochs=3,
    method=None,
    task=Task,
    valid=None,
    peft=None,
    **settings,
):
    """Fit a Task over the loaders that ``make()`` returns, from a checkpoint if there is one; return it."""
    pl.seed_everything(seed, verbose=False)
    module, data = task(reads), make()
    strategy = lp.PEFTStrategy(
        method or lp.LoRA(rank=2, targets=["net.0", "net.3"]),
        show_summary=False,
        **{"frozen_mode": "train", **(peft or {})},
    )
    settings = {"accumulate_grad_batches": 1, **settings}
    run = trainer(strategy, *callbacks, epochs=epochs, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            "Checkpoint directory|Be aware that when using|This DataLoader|Your .IterableDataset",
        )
        if isinstance(data, pl.LightningDataModule):
            run.fit(module, data, ckpt_path=path)
        else:
            run.fit(module, data, valid, ckpt_path=path)
    return module


def saving(folder, every=1, epochs=True):
    """Return callbacks that save at each so many steps, and at each end of an epoch."""
    steps = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1, enable_version_counter=False)
    ends = ModelCheckpoint(folder, "end-{epoch}", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1)
    return [steps, ends] if epochs else [steps]


def values(module):
    """Return what training changes, in whole tensors."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in module.state_dict().items()
    }


def outcome(whole, again, done):
    """Return "equal", or what differs between a run and its continuation after some steps."""
    rows = "" if again.seen == whole.seen[done:] else "rows"
    pairs = zip(values(whole).items(), values(again).items(), strict=True)
    off = max((a - b).abs().max().item() if name == other else math.inf for (name, a), (other, b) in pairs)
    return rows + (f" weights {off:.1e}" if off else "") or "equal"
