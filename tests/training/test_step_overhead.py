"""What the callback does in each training step: calls of Python functions, whatever the number of layers."""

import collections
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from counting import OperatorCount
from torch import nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.methods.families.svd_triplets import SVDTriplets

HOOKS = str(Path(lp.__file__).with_name("training"))
FIRST, LAST = 24, 28  # steps: the first ones still look for first gradients


class Net(pl.LightningModule):
    """Some layers in a row."""

    def __init__(self, layers):
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class CountCalls(pl.Callback):
    """Counts calls of the functions of ``lightning_peft.training`` in some steps."""

    def __init__(self):
        self.calls = collections.Counter()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == FIRST:
            sys.setprofile(self.count)
        elif batch_idx == LAST:
            sys.setprofile(None)

    def count(self, frame, event, argument):
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if event == "call" and file.startswith(HOOKS) and name[0] != "<":  # newer Pythons inline comprehensions
            self.calls[name] += 1


def calls_of_a_step(method, layers):
    counted = CountCalls()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy = lp.PEFTStrategy(method, show_summary=False)
    trainer = pl.Trainer(max_steps=LAST + 1, accelerator="cpu", callbacks=[strategy, counted], **quiet)
    before = sys.getprofile()
    try:
        trainer.fit(Net(layers), DataLoader(torch.ones(LAST + 1, 2, 4), batch_size=None))
    finally:
        sys.setprofile(before)
    assert all(count % (LAST - FIRST) == 0 for count in counted.calls.values())
    return sum(counted.calls.values()) // (LAST - FIRST)


def test_a_step_calls_as_many_functions_of_the_callback_with_many_layers_as_with_few():
    method = lp.LoRA(rank=2, targets=["net.*"])
    assert calls_of_a_step(method, 2) == calls_of_a_step(method, 24) == 29


def triplets(layers, device="cpu"):
    made = [SVDTriplets(nn.Linear(6, 4, device=device), 3, 1.0) for _ in range(layers)]
    for parameter in (p for one in made for p in one.parameters()):
        parameter.grad = torch.ones_like(parameter)
    return made


@pytest.mark.parametrize("layers", [2, 24])
def test_a_step_of_adalora_dispatches_a_view_of_each_tensor_and_a_number_that_is_fixed(layers):
    method, made = (
        lp.AdaLoRA(initial_rank=3, target_rank=2, warmup_steps=1, final_steps=2, interval=1),
        triplets(layers),
    )
    method.after_step(made, 2, 100)  # the buffers move into one memory
    with OperatorCount() as count:
        method.after_step(made, 3, 100)
    assert count.operators.pop("view") == 6 * layers + 4
    assert count.operators.total() == 35


def test_a_step_of_adalora_reads_no_value():
    method = lp.AdaLoRA(initial_rank=3, target_rank=2, warmup_steps=1, final_steps=2, interval=1)
    made = triplets(3, "meta")
    for step in range(1, 12):
        method.after_step(made, step, 12)  # would raise where a tensor on the meta device were read
    assert all(one.kept.is_meta and one.mean.shape == one.spread.shape for one in made)
