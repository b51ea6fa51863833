"""What is declared to train, requires gradients and is in the optimizers: the same parameters, from start to end."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from trainer_models import Module, data, trainer

import lightning_peft as lp


def strategy(**settings):
    return lp.PEFTStrategy(lp.LoRA(rank=2), show_summary=False, **settings)


def freeze(module):
    for parameter in module.net.model.parameters():
        parameter.requires_grad = False


class FreezesInConfigure(Module):
    def configure_optimizers(self):
        freeze(self)
        return torch.optim.AdamW(self.parameters(), 0.01)


class FreezesAndFilters(Module):
    def configure_optimizers(self):
        freeze(self)
        return torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), 0.01)


class FreezesInFitStart(Module):
    def on_fit_start(self):
        freeze(self)


class FreezesInEpochStart(Module):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            freeze(self)


class Finetuning(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.net.model)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net.model.layers[0].mlp, optimizer)


class Thawing(Finetuning):
    def freeze_before_training(self, module):
        pass


class ReplacesOptimizers(pl.Callback):
    def on_fit_start(self, tuner, module):
        tuner.strategy.optimizers = [torch.optim.SGD(module.net.lm_head.parameters(), 0.1)]


def plain_optimizer(module):
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    return module


FROZEN = r"12 parameters \(net\.model\.layers\.0\.self_attn\.q_proj\.peft\.lora\.a, .* shall train and are frozen"
THAWED = r"3 parameters \(net\.model\.layers\.0\.mlp\.gate_proj\.weight, .* train although PEFTStrategy froze them"
CASES = {
    "configure_optimizers": (FreezesInConfigure, [], FROZEN, 0),
    "configure_optimizers, filtered": (FreezesAndFilters, [], FROZEN, 0),
    "on_fit_start": (FreezesInFitStart, [], FROZEN, 0),
    "a later epoch": (FreezesInEpochStart, [], FROZEN, 4),
    "BaseFinetuning after": (Module, [Finetuning], FROZEN, 0),
    "thaw": (lambda: plain_optimizer(Module()), [Thawing], THAWED, 4),
    "replaced": (Module, [ReplacesOptimizers], r"12 parameters .* shall train and are in no optimizer", 0),
}


QUICK = ("configure_optimizers, filtered", "on_fit_start", "thaw", "replaced")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_what_freezes_or_unfreezes_is_said_at_once(case):
    make, callbacks, said, steps = CASES[case]
    net = make()
    tuner = trainer(strategy(also_train=["lm_head"]), *[callback() for callback in callbacks], epochs=3)
    with pytest.raises(ValueError, match=said):
        tuner.fit(net, data())
    assert tuner.global_step == steps


def test_a_filter_that_leaves_nothing_is_explained():
    with pytest.raises(ValueError, match="shall train and are frozen"):
        trainer(strategy()).fit(FreezesAndFilters(), data())
    net = Module()
    net.configure_optimizers = lambda: torch.optim.SGD([], 0.1)
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        trainer(strategy()).fit(net, data())


@pytest.mark.slow
def test_finetuning_listed_before_trains_adapters_until_it_thaws():
    net, tuner = plain_optimizer(Module()), trainer(Finetuning(), strategy(), epochs=2)
    with pytest.raises(ValueError, match=THAWED):
        tuner.fit(net, data())
    assert tuner.global_step == 4
    assert all(adapter.b.abs().sum() > 0 for *_, adapter in lp.adapters(net))


@pytest.mark.slow
def test_what_the_user_unfroze_before_fit_trains(tmp_path):
    class Unfrozen(Module):
        def build(self):
            super().build()
            lp.inject(self.net, lp.LoRA(rank=2))
            self.net.model.norm.requires_grad_(True)

    net = Unfrozen()
    before = net.net.model.norm.weight.detach().clone()
    tuner = trainer(lp.PEFTStrategy(show_summary=False), epochs=2)
    tuner.fit(net, data())
    assert not torch.equal(net.net.model.norm.weight, before)
    tuner.save_checkpoint(tmp_path / "x.ckpt")
    loaded = lp.load_from_checkpoint(Unfrozen, tmp_path / "x.ckpt")
    assert torch.equal(loaded.eval().net(data().dataset).logits, net.eval().net(data().dataset).logits)


@pytest.mark.slow
def test_toggled_optimizers_and_switched_adapters_are_no_trouble():
    class Toggling(Module):
        automatic_optimization = False

        def configure_optimizers(self):
            layers = self.net.model.layers
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (layers[0], layers[1:])]

        def training_step(self, batch, index):
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, index))
                optimizer.step()
                self.untoggle_optimizer(optimizer)

    net = Toggling()
    lp.inject(net, lp.LoRA(rank=2))
    lp.add_adapter(net, lp.LoRA(rank=2, name="other"), "other")
    lp.activate(net, "other")
    trainer(lp.PEFTStrategy(show_summary=False), epochs=2, accumulate_grad_batches=1).fit(net, data())
    moved = {key: adapter.b.abs().sum() > 0 for _, _, key, adapter in lp.adapters(net)}
    assert moved == {"lora": False, "other": True}
