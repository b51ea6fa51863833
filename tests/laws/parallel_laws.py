"""What must hold however a Trainer spreads a run over processes; each function runs in every one (processes.py).

``strategy`` is a function that makes the Trainer's strategy, or its name; a new one for each Trainer.
"""

import logging
import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from models import MODELS, VOCABULARY, logits
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from trainer_models import trainer

import lightning_peft as lp
from lightning_peft.core.injection_record import adapters_of

ROWS = 8  # of a data set; each process sees its share of every batch of four


class Rows(Dataset):
    """Rows that any model of the tests reads, different in each process' share."""

    def __init__(self, model):
        generator = torch.Generator().manual_seed(3)
        kind = MODELS[model]
        if kind.reads == "images":
            self.columns = {kind.images: torch.randn(ROWS, 3, 8, 8, generator=generator)}
        else:
            self.columns = {"input_ids": torch.randint(3, VOCABULARY, (ROWS, 7), generator=generator)}
        if kind.reads == "text and text":
            self.columns["decoder_input_ids"] = torch.randint(3, VOCABULARY, (ROWS, 5), generator=generator)

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {"row": index, **{name: column[index] for name, column in self.columns.items()}}


class Task(pl.LightningModule):
    """Tells rows apart by their number; the loss is a mean over rows of equal weight."""

    def __init__(self, model):
        super().__init__()
        self.net = MODELS[model]()

    def training_step(self, batch, index=0):
        inputs = {name: column for name, column in batch.items() if name != "row"}
        scores = logits(self.net(**inputs))
        scores = scores if scores.dim() == 3 else scores[:, None]  # (rows, positions, classes)
        labels = (batch["row"][:, None] + torch.arange(scores.shape[1], device=scores.device)) % 3
        return F.cross_entropy(scores.flatten(0, 1), labels.flatten())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Disturb(pl.Callback):
    """Gives everything that trains values that matter right after injection: adapters others in each process."""

    def setup(self, trainer, pl_module, stage):
        disturb(pl_module, trainer.global_rank)


class Keep(pl.Callback):
    """Keeps what the first optimizer step gets to see, in whole tensors."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not hasattr(self, "gradients"):
            trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
            self.gradients = {name: whole(p.grad).clone() for name, p in trained.items()}


def disturb(module, rank=0):
    for place, seed in ((lambda name: ".peft." not in name, 2), (lambda name: ".peft." in name, 100 + rank)):
        generator = torch.Generator().manual_seed(seed)
        for name, p in module.named_parameters():
            if p.requires_grad and place(name):
                with torch.no_grad():
                    p.add_(torch.randn(p.shape, generator=generator), alpha=0.3 if ".peft." in name else 0.05)


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fit(case, strategy, *callbacks, path=None, make=Task, also_train=(), **settings):
    """Return the module after two epochs of two steps (fewer with ``max_steps``) that started at rank 0's values."""
    rank, count = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if in_group() else (0, 1)
    torch.manual_seed(rank)  # what is drawn differs between processes; whatever runs them must make it one
    module = make(case.model)
    peft = lp.PEFTStrategy(list(case.methods), list(also_train), show_summary=False)
    settings = {"max_epochs": 2, "accumulate_grad_batches": 1, **settings}
    tuner = trainer(
        peft, Disturb(), *callbacks, strategy=strategy if isinstance(strategy, str) else strategy(), devices=count,
        use_distributed_sampler=False, **settings,
    )  # fmt: skip
    rows = Rows(case.model)
    share = DistributedSampler(rows, count, rank, shuffle=False)  # Lightning's own would shuffle
    tuner.fit(module, DataLoader(rows, batch_size=4 // count, sampler=share), ckpt_path=path)
    return module


def in_group():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gradients(case, strategy, **settings):
    """Return the gradients of the first step by name, penalties included."""
    keep = Keep()
    fit(case, strategy, keep, max_steps=1, **settings)
    return keep.gradients


def gradients_alone(case):
    """Return the same of one process over the whole batch, in float64 and without a Trainer."""
    torch.manual_seed(0)
    module = Task(case.model)
    lp.inject(module, list(case.methods))
    disturb(module)
    module.double().train()
    rows = Rows(case.model)
    batch = torch.utils.data.default_collate([rows[i] for i in range(4)])
    module.training_step({k: v.double() if v.is_floating_point() else v for k, v in batch.items()}).backward()
    for method in case.methods:
        penalty = method.penalty(list(adapters_of(module, method).values()))
        if penalty is not None:
            penalty.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def difference(found, expected):
    """Return the largest difference between tensors of the same names, relative to the largest value of each."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].double(), expected[name].double()) for name in expected]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in pairs)


def largest_difference(case, strategy, **settings):
    """Return by how much the gradients of several processes differ from those of one over the whole batch.

    With ``precision="64-true"``, where a strategy knows that, rounding explains 1e-12 of it; in float32, 1e-4.
    """
    return difference(gradients(case, strategy, **settings), gradients_alone(case))


def state(module):
    """Return what training changes, in whole tensors: parameters that train and buffers of adapters."""
    found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found |= {name: b for name, b in module.named_buffers() if ".peft." in name}
    return {name: whole(tensor).clone() for name, tensor in found.items()}


def resumed(case, strategy, folder, *callbacks, **settings):
    """Return the names of what differs in a single bit between a run and its continuation from the middle.

    ``folder`` is empty and the same in all processes; callbacks take part in both runs.
    """
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    expected = state(fit(case, strategy, saves, *callbacks, **settings))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory|.*ckpt_path")
        found = state(fit(case, strategy, *callbacks, path=folder / "epoch=0.ckpt", **settings))
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


def same_everywhere(tensors):
    """Return the names of tensors whose values differ between processes."""
    names = []
    for name, tensor in tensors.items():
        every = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(every, tensor.contiguous())
        if any(not torch.equal(one, every[0]) for one in every):
            names.append(name)
    return names


def quiet():
    warnings.simplefilter("ignore")  # torch's own, of FSDP1
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo")
