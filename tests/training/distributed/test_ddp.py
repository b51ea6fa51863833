"""Data parallel training: one run in several processes is the run of one, for every method."""

from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from cases import CASES, Case
from parallel_laws import Task, difference, fit, gradients, gradients_alone, resumed, same_everywhere, state
from processes import together
from sampling import Laws
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from trainer_models import data, module, trainer

import lightning_peft as lp

DISTRIBUTED = [case for case in CASES if case.model in ("bert", "llama", "fused_vit")]
SAMPLE = Laws().sample(DISTRIBUTED)  # of each method and each of the models
LORA = Case("bert", (lp.LoRA(rank=2),))


def off(case):
    """Return by how much gradients differ from those of one process over the whole batch."""
    return difference(gradients(case, "ddp", precision="64-true"), gradients_alone(case))


def gradients_and_continuations(folder):
    dist.init_process_group("gloo")
    return [(str(case), off(case), resumed(case, "ddp", Path(folder, str(i)))) for i, case in enumerate(DISTRIBUTED)]


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one_and_resume_bit_for_bit(tmp_path):
    for rank in together(gradients_and_continuations, str(tmp_path)):
        assert max(value for _, value, _ in rank) < 1e-11, max(rank, key=lambda found: found[1])
        assert not [(name, different) for name, _, different in rank if different]
        print(f"largest difference of {len(rank)} cases: {max(value for _, value, _ in rank):.1e}")


class Traffic(pl.Callback):
    """Counts what DDP sends, in bytes: at its start, before each forward pass, and of gradients."""

    def __init__(self):
        self.sent, self.reduced = [], []

    def setup(self, trainer, pl_module, stage):
        broadcast = dist._broadcast_coalesced

        def counted(group, tensors, *args):
            self.sent.append(bytes_of(tensors))
            return broadcast(group, tensors, *args)

        self.patch = mock.patch.object(dist, "_broadcast_coalesced", counted)
        self.patch.start()

    def on_fit_start(self, trainer, pl_module):
        def hook(group, bucket):
            self.reduced.append(bytes_of([bucket.buffer()]))
            return allreduce_hook(group, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)
        self.differs = same_everywhere(state(pl_module))

    def on_fit_end(self, trainer, pl_module):
        self.patch.stop()


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def traffic():
    dist.init_process_group("gloo")
    found = {}
    for case in SAMPLE:
        seen = Traffic()
        module = fit(case, "ddp", seen, max_steps=2)
        trained = bytes_of([p for p in module.parameters() if p.requires_grad])
        adapters = [a for *_, a in lp.adapters(module)]
        counted = bytes_of({id(b): b for a in adapters for b in a.buffers()}.values())
        frozen = bytes_of([p for n, p in module.named_parameters() if ".peft." in n and not p.requires_grad])
        expected = [trained + counted + frozen] + [counted] * (2 if counted else 0)
        ends = same_everywhere(state(module))
        found[str(case)] = (seen.sent == expected, seen.reduced == [trained] * 2, seen.differs, ends)
    return found


@pytest.mark.slow
def test_what_trains_is_sent_and_nothing_else():
    for rank in together(traffic):
        assert len(rank) == len(SAMPLE) > 25
        assert {name: found for name, found in rank.items() if found != (True, True, [], [])} == {}


def other_base(model):
    task = Task(model)
    with torch.no_grad():
        task.net.bert.embeddings.word_embeddings.weight[0] += dist.get_rank()
    return task


class Unfreeze(pl.Callback):
    def setup(self, trainer, pl_module, stage):
        pl_module.net.bert.pooler.dense.weight.requires_grad_(True)
        with torch.no_grad():
            pl_module.net.bert.pooler.dense.weight += dist.get_rank()

    def on_fit_start(self, trainer, pl_module):
        assert same_everywhere({"pooler": pl_module.net.bert.pooler.dense.weight.detach()}) == []


def odd_ones():
    dist.init_process_group("gloo")
    errors = []
    for make in (other_base, WithSpare):
        with pytest.raises(ValueError, match=".") as error:
            fit(LORA, "ddp", make=make, also_train=["spare"] if make is WithSpare else [])
        errors.append(str(error.value))
    fit(LORA, "ddp", Unfreeze())
    return errors


class WithSpare(Task):
    def __init__(self, model):
        super().__init__(model)
        self.spare = nn.Linear(2, 2)


@pytest.mark.slow
def test_what_goes_wrong_in_parallel_is_told_in_every_process():
    for errors in together(odd_ones):
        assert "The frozen base of process 1 is not that of process 0" in errors[0]
        assert "2 trained parameters got no gradient in 1 steps: spare.weight, spare.bias" in errors[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_adapters_come_back_from_processes_that_the_trainer_starts():
    """Filters make a warning about fresh adapters an error."""
    ends = []
    for kind in ("ddp_spawn", "ddp_fork"):
        torch.manual_seed(0)
        net = module()
        strategy = lp.PEFTStrategy(lp.LoRA(rank=2), ["lm_head"], show_summary=False)
        strategy.apply(net)
        before = state(net)
        trainer(strategy, strategy=kind, devices=2).fit(net, data())
        ends.append(state(net))
        assert not [name for name, value in ends[-1].items() if torch.equal(value, before[name])]
        trainer(strategy).test(net, data(), verbose=False)
    assert not [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])]


@pytest.mark.slow
def test_processes_that_the_trainer_starts_need_adapters_before():
    strategy = lp.PEFTStrategy(lp.LoRA(rank=2), show_summary=False)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=r"call this callback's apply\(module\)"):
        trainer(strategy, strategy="ddp_spawn", devices=2).fit(module(), data())
