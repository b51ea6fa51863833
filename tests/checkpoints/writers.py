"""Writers to be killed at random moments, and readers of what they leave. Each version has its own alpha and values."""

import itertools
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_peft as lp
from lightning_peft.core.adapter_folder import CONFIG, read_files
from lightning_peft.core.injection_record import require_record
from lightning_peft.interop.model_card import CARD

SIZE = 64
VERSIONS = (1, 2)


def base(meta=False):
    with torch.random.fork_rng(), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE))


def adapted(version, net=None):
    net = lp.inject(net or base(), lp.LoRA(rank=2, targets=["*0", "*2"], alpha=float(version)))
    for *_, adapter in lp.adapters(net):
        for parameter in adapter.parameters():
            nn.init.constant_(parameter, float(version))
    return net


def version_of(net):
    """Return the version whose settings and values a model has; fail where they are of two."""
    values = {v for *_, adapter in lp.adapters(net) for p in adapter.parameters() for v in p.flatten().tolist()}
    (version,) = {method.alpha for method in require_record(net).methods} | values
    return int(version)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = base()

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.0)


class Adapters:
    """``save_adapter`` and ``load_adapter``."""

    def __init__(self, folder):
        self.place = Path(folder, "adapter")
        self.models = [adapted(version) for version in VERSIONS]

    def write(self, version):
        lp.save_adapter(self.models[version - 1], self.place)

    def read(self):
        return version_of(lp.load_adapter(base(), self.place))


class Exports(Adapters):
    """``export_peft`` and ``import_peft``."""

    def write(self, version):
        lp.export_peft(self.models[version - 1], self.place)

    def read(self):
        files = read_files(self.place, (CONFIG, CARD))
        assert f"| alpha | {json.loads(files[CONFIG])['lora_alpha']}.0 |" in files[CARD].decode()
        return version_of(lp.import_peft(base(), self.place))


class MergedFiles(Adapters):
    """``merge_files``, to a place that is cleared before each."""

    def __init__(self, folder):
        super().__init__(folder)
        self.folder, self.base = Path(folder), Path(folder, "base.safetensors")
        if not self.base.exists():
            save_file(base().state_dict(), self.base)
        for version, model in zip(VERSIONS, self.models, strict=True):
            if not (self.folder / f"v{version}").exists():
                lp.save_adapter(model, self.folder / f"v{version}")

    def write(self, version):
        shutil.rmtree(trash := self.folder / "trash", ignore_errors=True)
        if self.place.exists():
            self.place.rename(trash)  # what is half removed is no output
        lp.merge_files(base(meta=True), self.base, self.folder / f"v{version}", self.place)
        time.sleep(0.02)  # in which a kill finds what was written

    def read(self):
        assert all(torch.equal(value, base().state_dict()[key]) for key, value in load_file(self.base).items())
        if not self.place.exists():
            return 0  # of which the writer had removed the old one
        change = load_file(self.place / "base.safetensors")["0.weight"] - base().state_dict()["0.weight"]
        (version,) = {round(value ** (1 / 3)) for value in change.flatten().tolist()}  # alpha / 2 of (v v) (v v)^T
        return version


class Checkpoints:
    """Checkpoints of a Trainer."""

    def __init__(self, folder):
        self.place = Path(folder, "last.ckpt")
        self.trainers = []
        for version in VERSIONS:
            quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
            strategy = lp.PEFTStrategy(lp.LoRA(rank=2, targets=["*0", "*2"], alpha=float(version)), show_summary=False)
            trainer = pl.Trainer(
                accelerator="cpu", max_steps=1, callbacks=[strategy], enable_checkpointing=False, **quiet
            )
            module = Module()
            trainer.fit(module, torch.utils.data.DataLoader(torch.ones(2, SIZE)))
            for *_, adapter in lp.adapters(module):
                for parameter in adapter.parameters():
                    nn.init.constant_(parameter, float(version))
            self.trainers.append(trainer)

    def write(self, version):
        self.trainers[version - 1].save_checkpoint(self.place)

    def read(self):
        return version_of(lp.load_from_checkpoint(Module, self.place))


KINDS = {"save_adapter": Adapters, "export_peft": Exports, "merge_files": MergedFiles, "checkpoint": Checkpoints}


def write_in_children(kind, folder, pipe):
    """For each message, fork a child that writes one version after the other until killed, and send its number."""
    torch.set_num_threads(1)
    tempfile.tempdir = str(folder)  # where fsspec puts what it moves
    writer = KINDS[kind](folder)
    pipe.send(os.getpid())
    while pipe.recv():
        child = os.fork()
        if child == 0:
            for number in itertools.count():
                writer.write(VERSIONS[(number + 1) % len(VERSIONS)])
        pipe.send(child)
        pipe.recv()
        os.waitpid(child, 0)
        pipe.send("ended")
