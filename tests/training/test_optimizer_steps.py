"""Methods count the steps that their own optimizer takes, and a missing gradient is reported once it is certain."""

import random
from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader
from trainer_models import Module, data, trainer

import lightning_peft as lp

calls = []


@dataclass(frozen=True, kw_only=True)
class Counted(lp.LoRA):
    name: str = "counted"
    rank: int = 2

    def after_step(self, adapters, step, total_steps):
        calls.append((len(adapters), step, total_steps))


@pytest.fixture(autouse=True)
def _no_calls():
    calls.clear()


class Task(pl.LightningModule):
    """Two layers and one row for each batch; the row is the factor of the loss."""

    def __init__(self, fused=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.fused = nn.Linear(8, 8), nn.Linear(8, 8), fused

    def training_step(self, batch, index):
        return (self.second(self.first(torch.ones(2, 8))).square().mean() * batch).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01, fused=self.fused or None)


def factors(*values):
    return DataLoader(torch.tensor(values), batch_size=1)


def fit(net, method, loader, **settings):
    strategy = lp.PEFTStrategy(method, show_summary=False)
    tuner = trainer(strategy, **{"accumulate_grad_batches": 1, **settings})
    tuner.fit(net, loader)
    return tuner


def scaled():
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))]}


@pytest.mark.parametrize("fused", [True, False])
def test_steps_that_a_gradient_scaler_skips_do_not_count(fused):
    loader = factors(1.0, float("inf"), 1.0, float("nan"), 1.0)
    tuner = fit(Task(fused), Counted(targets=["first"]), loader, **scaled())
    assert tuner.global_step == 5
    assert [step for _, step, _ in calls] == [1, 2, 3]
    assert tuner.callbacks[0].state_dict()["steps"] == [3]


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_gates_stay_closed_for_as_many_steps_as_were_taken(fused):
    gates = []

    class Gated(Module):
        def training_step(self, batch, index):
            gates.append(max(adapter.gate.abs().max().item() for *_, adapter in lp.adapters(self)))
            return super().training_step(batch, index) * (float("inf") if index in (0, 2) else 1)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.01, fused=fused or None)

    fit(Gated(), lp.LLaMAAdapter(length=3, layers=2, gate_warmup_steps=3), data(), **scaled())
    assert [gate > 0 for gate in gates] == [False] * 6 + [True] * 2  # batches 0 and 2 are skipped, 1, 3 and 4 warm up


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_penalty_is_scaled_as_the_loss_is(fused):
    @dataclass(frozen=True, kw_only=True)
    class Shrinking(lp.LoRA):
        name: str = "lora"

        def penalty(self, adapters):
            return sum(adapter.a.square().sum() for adapter in adapters)

    ends = []
    fields = {"rank": 2, "targets": ["first"]}
    for method, settings in ((Shrinking(**fields), scaled()), (lp.LoRA(**fields), {})):

        class Penalized(Task):
            def training_step(self, batch, index, add=not settings):
                a = [adapter.a for *_, adapter in lp.adapters(self)]
                return super().training_step(batch, index) + (sum(x.square().sum() for x in a) if add else 0)

            def configure_optimizers(self):
                return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01, fused=fused)

        net = Penalized()
        torch.manual_seed(1)
        fit(net, method, factors(1.0, 1.0, 1.0), **settings)
        ends.append(net.first.peft["lora"].a.detach())
    torch.testing.assert_close(*ends, atol=2e-3, rtol=2e-3)  # the forward pass is in float16


class Manual(Task):
    """Takes the steps that a plan says: for each batch, the optimizers that step, in order."""

    automatic_optimization = False

    def __init__(self, plan):
        super().__init__()
        self.plan = plan

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.first, self.second)]

    def training_step(self, batch, index):
        for number in self.plan(index):
            optimizer = self.optimizers()[number]
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()
            optimizer.zero_grad()


PLANS = {
    "both": (lambda index: (0, 1), 8, {}),
    "both, by steps": (lambda index: (0, 1), 8, {"epochs": None, "max_steps": 16}),
    "in turn": (lambda index: (index % 2,), 4, {}),
    "every fourth batch": (lambda index: (0, 1) if index % 4 == 3 else (), 2, {}),
    "twice": (lambda index: (0, 0, 1, 1), 16, {}),
}


QUICK = ("both", "in turn")
PLAN_NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PLANS]


@pytest.mark.parametrize("plan", PLAN_NAMES)
def test_each_of_several_optimizers_has_its_own_steps_and_total(plan):
    plan, steps, settings = PLANS[plan]
    fit(Manual(plan), Counted(targets=["first", "second"]), factors(*[1.0] * 8), **settings)
    assert [(count, step) for count, step, _ in calls[::1]].count((1, steps)) == 2
    assert sorted(step for _, step, _ in calls) == sorted([*range(1, steps + 1)] * 2)
    assert calls[-1] == (1, steps, steps)
    assert all(abs(total - steps) <= steps / 2 for _, step, total in calls if step > steps / 2)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_adalora_reaches_its_final_rank_with_any_plan(plan):
    plan, steps, settings = PLANS[plan]
    ranks = []

    class Watched(Manual):
        def training_step(self, batch, index):
            super().training_step(batch, index)
            ranks.append(sum(int(adapter.kept.sum()) for *_, adapter in lp.adapters(self)))

    method = lp.AdaLoRA(targets=["first", "second"], initial_rank=8, target_rank=2, interval=1)
    many = {**settings, "max_steps": 64} if settings else {}
    fit(Watched(plan), method, factors(*[1.0] * 32), **many)
    assert len(ranks) == 32
    assert ranks[-1] == 4
    assert ranks[8] > 4  # a quarter of the run is done, and seven tenths are for shrinking
    assert ranks == sorted(ranks, reverse=True)


def test_an_accumulation_schedule_counts_in_the_total():
    scheduler = pl.callbacks.GradientAccumulationScheduler({0: 4, 2: 1})
    strategy = lp.PEFTStrategy(Counted(targets=["first"]), show_summary=False)
    tuner = trainer(strategy, scheduler, epochs=3, accumulate_grad_batches=1)
    tuner.fit(Task(), factors(*[1.0] * 8))
    assert [step for _, step, _ in calls] == list(range(1, 13))
    assert {total for *_, total in calls} == {tuner.global_step} == {12}


def test_counts_go_on_after_a_checkpoint_and_begin_anew_with_a_new_run(tmp_path):
    def run(epochs, path=None, strategy=None):
        strategy = strategy or lp.PEFTStrategy(Counted(targets=["first"]), show_summary=False)
        tuner = trainer(strategy, epochs=epochs, accumulate_grad_batches=1, **scaled())
        tuner.fit(Task(), factors(1.0, float("inf"), 1.0), ckpt_path=path)
        tuner.save_checkpoint(tmp_path / "x.ckpt")
        return strategy

    strategy = run(1)
    run(2, tmp_path / "x.ckpt")
    assert [step for _, step, _ in calls] == [1, 2, 3, 4]
    run(1, strategy=strategy)
    assert [step for _, step, _ in calls[4:]] == [1, 2]
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    del checkpoint["callbacks"]["PEFTStrategy"]["steps"]  # as earlier versions wrote it
    torch.save(checkpoint, tmp_path / "x.ckpt")
    run(2, tmp_path / "x.ckpt")
    assert [step for _, step, _ in calls[6:]] == [4, 5]  # Lightning's count: 3 steps before


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("settings", [{"barebones": True}, {"log_every_n_steps": 0}], ids=str)
def test_a_run_that_logs_nothing_trains(settings):
    class Quiet(Task):
        def training_step(self, batch, index):
            return super().training_step(batch, index)

    quiet = {"enable_checkpointing": False, "logger": False, "accelerator": "cpu", "max_epochs": 1}
    if "barebones" in settings:
        quiet = {"accelerator": "cpu", "max_epochs": 1}
    net = Quiet()
    method = lp.AdaLoRA(targets=["first"], initial_rank=4, target_rank=2, warmup_steps=0, final_steps=1, interval=1)
    tuner = pl.Trainer(callbacks=[lp.PEFTStrategy(method, show_summary=False)], **quiet, **settings)
    tuner.fit(net, factors(*[1.0] * 6))
    assert tuner.global_step == 6
    assert net.first.peft["adalora"].kept.sum() == 2


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_no_loss_in_the_first_batch_is_no_missing_gradient():
    class Picky(Task):
        def training_step(self, batch, index):
            return None if index == 0 else super().training_step(batch, index)

    net = Picky()
    fit(net, lp.LoRA(rank=2, targets=["first", "second"]), factors(1.0, 1.0, 1.0))
    assert all(adapter.b.abs().min() > 0 for *_, adapter in lp.adapters(net))


class Dropping(Task):
    """Drops its second layer in the first batches, as LayerDrop may."""

    def __init__(self, dropped):
        super().__init__()
        self.dropped = dropped

    def training_step(self, batch, index):
        hidden = self.first(torch.ones(2, 8))
        return (hidden if index < self.dropped else self.second(hidden)).square().mean()


def test_a_layer_that_is_dropped_at_random_is_no_missing_gradient():
    random.seed(0)
    net = Dropping(dropped=3)
    fit(net, lp.LoRA(rank=2, targets=["first", "second"]), factors(*[1.0] * 25))
    assert all(adapter.b.abs().min() > 0 for *_, adapter in lp.adapters(net))


def test_what_never_takes_part_is_reported_after_twenty_steps_or_at_the_end():
    for batches, steps in ((25, 20), (5, 5)):
        with pytest.warns(UserWarning, match=rf"2 trained .* no gradient in {steps} steps: second\.peft\.lora\.a"):
            fit(Dropping(dropped=99), lp.LoRA(rank=2, targets=["first", "second"]), factors(*[1.0] * batches))


def test_adapters_of_which_none_learns_are_an_error():
    class HeadAlone(Task):
        def training_step(self, batch, index):
            with torch.no_grad():
                hidden = self.first(torch.ones(2, 8))
            return self.second(hidden).square().mean()

    strategy = lp.PEFTStrategy(lp.LoRA(rank=2, targets=["first"]), also_train=["second"], show_summary=False)
    tuner = trainer(strategy, accumulate_grad_batches=1)
    with pytest.raises(ValueError, match=r"2 trained parameters got no gradient in 20 steps: first\.peft\.lora\.a"):
        tuner.fit(HeadAlone(), factors(*[1.0] * 25))
    assert tuner.global_step == 19


def test_a_loss_that_depends_on_nothing_that_trains_is_refused_by_name():
    net = Dropping(dropped=99)
    with pytest.raises(ValueError, match=r"depends on none of the 2 parameters that train: second\.peft\.lora\.a"):
        fit(net, lp.LoRA(rank=2, targets=["second"]), factors(1.0))
    assert not net.first.weight.requires_grad


def test_hooks_leave_the_optimizer_with_the_run():
    optimizers = []

    class Kept(Task):
        def configure_optimizers(self):
            optimizers.append(super().configure_optimizers())
            return optimizers[-1]

        def on_train_batch_end(self, *args):
            if self.trainer.max_epochs == 2:
                raise RuntimeError("stop")

    fit(Kept(), Counted(targets=["first"]), factors(1.0, 1.0))
    with pytest.raises(RuntimeError, match="stop"):
        fit(Kept(), Counted(targets=["first"]), factors(1.0, 1.0), epochs=2)
    assert [len(optimizer._optimizer_step_post_hooks) for optimizer in optimizers] == [0, 0]
