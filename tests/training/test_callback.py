"""The callback through a Trainer's life."""

import copy
import csv
import itertools
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from trainer_models import Module, data, module, trainer

import lightning_peft as lp


def strategy(**settings):
    return lp.PEFTStrategy(lp.LoRA(rank=2), show_summary=False, **settings)


def held_by(tuner):
    return [p for o in tuner.optimizers for group in o.param_groups for p in group["params"]]


@pytest.mark.filterwarnings("ignore:Fresh adapters are evaluated")
@pytest.mark.parametrize("place", ["init", "setup", "configure_model"])
def test_injection_happens_once_whatever_runs_in_whatever_order(place):
    net = module("llama", place)
    for first, second in itertools.product([strategy], repeat=2):
        tuner = trainer(first())
        tuner.validate(net, data(), verbose=False)
        tuner.fit(net, data(), data())
        tuner.test(net, data(), verbose=False)
        trainer(second()).predict(net, data())
    found = list(lp.adapters(net))
    assert len(found) == 6
    assert all(adapter.b.abs().sum() > 0 for *_, adapter in found)
    assert len(net._state_dict_hooks) == 1
    assert len(net._load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("where", ["module", "network"])
def test_what_the_user_injected_is_respected(where, tmp_path):
    net = module()
    lp.inject(net if where == "module" else net.net, lp.LoRA(rank=2))
    before = [adapter for *_, adapter in lp.adapters(net)]
    tuner = trainer(strategy())
    tuner.fit(net, data())
    assert [adapter for *_, adapter in lp.adapters(net)] == before
    tuner.save_checkpoint(tmp_path / "x.ckpt")
    assert len(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]) == 12
    with pytest.raises(ValueError, match=r"Pass the same methods, or call lightning_peft\.detach"):
        trainer(lp.PEFTStrategy(lp.LoRA(rank=3))).fit(net, data())


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=0.01)


FORMS = {
    "optimizer": adamw,
    "list": lambda net: [adamw(net)],
    "dictionary": lambda net: {"optimizer": adamw(net)},
    "pair": lambda net: ([adamw(net)], []),
    "adagrad": lambda net: torch.optim.Adagrad(net.parameters()),
    "head only": lambda net: torch.optim.AdamW(net.net.lm_head.parameters()),
    "groups": lambda net: torch.optim.AdamW([{"params": [p]} for p in net.parameters()]),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_optimizer_holds_exactly_what_trains(form):
    class Configured(Module):
        def configure_optimizers(self):
            return FORMS[form](self)

    net = Configured()
    tuner = trainer(strategy(also_train=["lm_head"]))
    tuner.fit(net, data())
    trained = [p for p in net.parameters() if p.requires_grad]
    assert len(trained) == 13
    assert sorted(map(id, held_by(tuner))) == sorted(map(id, trained))
    assert {id(p) for p in tuner.optimizers[0].state} == {id(p) for p in trained}


def test_an_optimizer_built_before_injection_trains_the_adapters():
    class Eager(Module):
        def __init__(self):
            super().__init__()
            self.optimizer = adamw(self)

        def configure_optimizers(self):
            return self.optimizer

    net = Eager()
    trainer(strategy()).fit(net, data())
    assert all(adapter.b.abs().sum() > 0 for *_, adapter in lp.adapters(net))


def test_a_function_put_on_the_instance_configures_too():
    net = module()
    optimizer = adamw(net)
    net.configure_optimizers = lambda: optimizer
    tuner = trainer(strategy())
    tuner.fit(net, data())
    assert tuner.optimizers == [optimizer]
    assert len(held_by(tuner)) == 12


def test_several_optimizers_that_forget_a_parameter_are_refused():
    class Two(Module):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net.model.layers[i].parameters(), 0.1) for i in (0, 1)]

    with pytest.raises(ValueError, match=r"2 optimizers and none holds net\.model\.layers\.2"):
        trainer(strategy(), accumulate_grad_batches=1).fit(Two(), data())


def test_factors_survive_schedulers_and_no_decay_is_a_group():
    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.5)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=8, cycle_momentum=False)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    rates = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, tuner, net, optimizer):
            self.before = {
                n: (p.detach().clone(), p.grad.clone()) for n, p in net.named_parameters() if p.requires_grad
            }
            self.lr = optimizer.param_groups[0]["lr"]

        def on_train_batch_end(self, tuner, net, *args):
            if tuner.global_step > len(rates):
                rates.append({})
                for name, (value, gradient) in self.before.items():
                    decay = 0.0 if name.endswith(".b") else 0.5
                    step = gradient + decay * value
                    moved = value - net.get_parameter(name).detach()
                    rates[-1][name] = (moved.norm() / step.norm()).item() / self.lr

    trainer(strategy(lr_factors={"*.b": 16.0}, no_decay=["*.b"]), Watch()).fit(Scheduled(), data())
    assert len(rates) == 4
    for step in rates[1:]:  # in the first step, A has no gradient
        for name, rate in step.items():
            assert rate == pytest.approx(16.0 if name.endswith(".b") else 1.0, rel=0.02)


@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.01), True),
        (lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True), True),
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), True),
        (lambda p: torch.optim.AdamW(p, lr=0.01, fused=False), False),
        (lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True), None),
        (lambda p: torch.optim.RMSprop(p, lr=0.01), None),
    ],
)
def test_optimizers_take_one_kernel_unless_told_otherwise(make, fused):
    ends = []
    for callback in ([strategy()], []):

        class Own(Module):
            def configure_optimizers(self):
                return make([p for p in self.parameters() if p.requires_grad])

        torch.manual_seed(0)
        net = Own()
        if not callback:
            torch.manual_seed(0)
            lp.inject(net, strategy().methods)
        else:
            torch.manual_seed(0)
        tuner = trainer(*callback)
        tuner.fit(net, data())
        ends.append({n: p.detach() for n, p in net.named_parameters() if p.requires_grad})
        if callback:
            assert [group.get("fused") for group in tuner.optimizers[0].param_groups] == [fused]
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-3)


def test_a_factor_of_zero_freezes_and_survives_a_checkpoint(tmp_path):
    """LoRA-FA: A stays as it starts, has no gradient and no optimizer state, and is saved."""
    net = Module()
    tuner = trainer(strategy(lr_factors={"lora.a": 0.0, "lora.b": 16.0}))
    tuner.fit(net, data())
    adapters = [adapter for *_, adapter in lp.adapters(net)]
    assert all(not a.a.requires_grad and a.b.requires_grad for a in adapters)
    held = {id(p) for group in tuner.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(a.b) for a in adapters}
    assert {group["lr_factor"] for group in tuner.optimizers[0].param_groups if group["params"]} == {16.0}
    tuner.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert {key.rpartition(".")[2] for key in state} == {"a", "b"}
    again = lp.load_from_checkpoint(Module, tmp_path / "one.ckpt")
    with torch.no_grad():
        assert torch.equal(again.eval().net(data().dataset).logits, net.eval().net(data().dataset).logits)


PARTS = {
    "lora": (lp.LoRA(rank=2), lambda name: True),
    "lora.b": (lp.LoRA(rank=2), lambda name: name.endswith(".b")),
    "prefix_tuning": (lp.PrefixTuning(length=2, hidden_size=8), lambda name: True),
}


@pytest.mark.parametrize("pattern", PARTS)
def test_the_name_of_a_method_means_all_parts_of_its_hosts(pattern):
    """GPT-2 computes query, key and value at once, so that its adapters are named lora_query and lora_value."""
    method, meant = PARTS[pattern]
    net = module("gpt2")
    tuner = trainer(lp.PEFTStrategy(method, lr_factors={pattern: 4.0}, show_summary=False))
    tuner.fit(net, data())
    fast = {id(p) for g in tuner.optimizers[0].param_groups if g.get("lr_factor") == 4.0 for p in g["params"]}
    expected = {name: p for name, p in net.named_parameters() if ".peft." in name and meant(name)}
    assert len(expected) >= 6
    assert fast == {id(p) for p in expected.values()}


@pytest.mark.parametrize("settings", [{"lr_factors": {"lroa": 2.0}}, {"no_decay": ["*.bias"]}], ids=str)
def test_a_pattern_without_a_trained_parameter_is_an_error(settings):
    with pytest.raises(ValueError, match="is no trainable parameter or method"):
        trainer(strategy(**settings)).fit(module(), data())


def test_a_trained_parameter_without_a_gradient_is_named():
    class Unused(Module):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(32, 32)

    with pytest.warns(UserWarning, match=r"2 trained parameters got no gradient in 4 steps: spare\.weight"):
        trainer(strategy(also_train=["spare"])).fit(Unused(), data())


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_modules_evaluate_and_frozen_statistics_stay(affine):
    class Normed(Module):
        def build(self):
            self.net = nn.Sequential(
                nn.Embedding(64, 8),
                nn.Dropout(0.5),
                nn.Flatten(),
                nn.BatchNorm1d(56, affine=affine),
                nn.Linear(56, 8),
                nn.Linear(8, 3),
            )

    for mode in ("eval", "train"):
        net = Normed().train()
        modes = {}

        class Look(pl.Callback):
            def on_train_batch_start(self, tuner, net, batch, index, modes=modes):
                modes.update({name: part.training for name, part in net.named_modules()})

        method = lp.LoRA(rank=2, dropout=0.3, targets=["net.4"])
        trainer(lp.PEFTStrategy(method, also_train=["net.5"], frozen_mode=mode), Look()).fit(net, data())
        assert torch.equal(net.net[3].running_mean, torch.zeros(56))
        assert modes["net.4.peft.lora"]
        assert modes["net.5"]
        assert not modes["net.3"]
        assert modes["net.4"] == (mode == "train")


def test_a_base_that_changes_is_noticed():
    class Writes(Module):
        def on_train_batch_end(self, *args):
            with torch.no_grad():
                self.net.model.norm.weight.add_(0.1)

    with pytest.raises(RuntimeError, match="Frozen base weights changed during fit"):
        trainer(strategy()).fit(Writes(), data())


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_gates_open_after_the_warm_up_and_are_logged(tmp_path):
    opened = []

    class Look(pl.Callback):
        def on_train_batch_end(self, tuner, net, *args):
            gates = [adapter.gate.abs().min().item() for *_, adapter in lp.adapters(net)]
            opened.append((tuner.global_step, min(gates)))

    class Stop(pl.Callback):
        def on_train_epoch_end(self, tuner, net):
            tuner.should_stop = True

    def run(epochs, path=None):
        net = module()
        method = lp.LLaMAAdapter(length=3, layers=2, gate_warmup_steps=6)
        logger = CSVLogger(tmp_path, name=None, version=str(epochs))
        stops = [Stop()] if epochs == 1 else []
        tuner = trainer(lp.PEFTStrategy(method), Look(), *stops, epochs=2, logger=logger)
        tuner.fit(net, data(), ckpt_path=path)
        tuner.save_checkpoint(tmp_path / "x.ckpt")
        return net

    run(1)
    run(2, tmp_path / "x.ckpt")
    assert {step for step, _ in opened} == set(range(9))
    assert all((gate > 0) == (step > 6) for step, gate in opened)
    with (tmp_path / "2" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train_loss"]]
    name = "llama_adapter/gate/net.model.layers.2.self_attn"
    assert [float(row[name]) > 0 for row in rows] == [False, False, True, True]


def test_penalties_steps_and_metrics_of_ones_own_method():
    from dataclasses import dataclass

    calls = []

    @dataclass(frozen=True, kw_only=True)
    class Shrinking(lp.LoRA):
        name: str = "shrinking"

        def penalty(self, adapters):
            return sum(adapter.a.square().sum() for adapter in adapters)

        def after_step(self, adapters, step, total_steps):
            calls.append((len(adapters), step, total_steps))

    class Penalized(Module):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss + sum(adapter.a.square().sum() for *_, adapter in lp.adapters(self))

    results = []
    for make, method in ((Module, Shrinking(rank=2)), (Penalized, lp.LoRA(rank=2, name="shrinking"))):
        pl.seed_everything(1, verbose=False)
        net = make()
        trainer(lp.PEFTStrategy(method)).fit(net, data())
        results.append({key: value for key, value in net.state_dict().items() if "peft" in key})
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)
    assert calls == [(6, step, 4) for step in (1, 2, 3, 4)]


def test_narrow_precision_keeps_wide_adapters():
    net = module()
    trainer(strategy(), precision="bf16-true").fit(net, data())
    assert net.net.model.norm.weight.dtype == torch.bfloat16
    assert {p.dtype for *_, adapter in lp.adapters(net) for p in adapter.parameters()} == {torch.float32}


def test_evaluation_with_fresh_adapters_warns():
    with pytest.warns(UserWarning, match="Fresh adapters are evaluated: give ckpt_path"):
        trainer(strategy()).validate(module(), data(), verbose=False)


def test_what_is_no_method_is_refused():
    with pytest.raises(TypeError, match=r"method must be a Method such as LoRA"):
        lp.PEFTStrategy("LoRA")


def test_the_summary_is_printed_once(capsys):
    trainer(lp.PEFTStrategy(lp.LoRA(rank=2))).fit(module(), data())
    assert capsys.readouterr().out.count("parameters train") == 1


@pytest.mark.filterwarnings("ignore:(SWA is currently only supported|Swapping scheduler)")
@pytest.mark.parametrize("place", ["init", "configure_model"])
def test_weight_averaging_averages_the_adapters(place):
    class Watch(pl.Callback):
        def on_train_epoch_end(self, tuner, net):
            epochs.append([adapter.b.detach().clone() for *_, adapter in lp.adapters(net)])

    epochs = []
    net = module("llama", place)
    averaging = pl.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)
    trainer(strategy(), averaging, Watch(), epochs=4, accumulate_grad_batches=1).fit(net, data())
    final = [adapter.b for *_, adapter in lp.adapters(net)]
    start = [torch.zeros_like(b) for b in final]  # averaging samples the weights that each epoch starts with
    for values, average in zip(zip(start, *epochs[:3], strict=True), final, strict=True):
        torch.testing.assert_close(average, torch.stack(values).mean(0), atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="list PEFTStrategy before it"):
        trainer(pl.callbacks.StochasticWeightAveraging(0.01), strategy()).fit(module(), data())


def test_a_run_without_a_last_step_trains():
    class Stop(pl.Callback):
        def on_train_epoch_end(self, tuner, net):
            tuner.should_stop = True

    net = module()
    trainer(strategy(), Stop(), epochs=-1).fit(net, data())
    assert all(adapter.b.abs().sum() > 0 for *_, adapter in lp.adapters(net))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda strategy: pickle.loads(pickle.dumps(strategy))])
def test_the_callback_can_be_copied_and_its_checkpoint_keeps_its_keys(copied):
    strategy = copied(lp.PEFTStrategy(lp.LoRA(rank=2), show_summary=False))
    assert type(strategy) is lp.PEFTStrategy
    assert type(strategy).__bases__[0] is pl.Callback  # after it, the Callback of another name space, if imported
    net, tuner = module(), trainer(strategy)
    tuner.fit(net, data())
    assert lp.summary(net).trainable > 0
    assert tuner._checkpoint_connector.dump_checkpoint()["callbacks"].keys() == {"PEFTStrategy"}
    assert strategy.state_dict().keys() == {"resume", "steps", "quantize"}
