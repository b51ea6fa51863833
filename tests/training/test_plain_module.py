"""After ``merge`` or ``detach`` a LightningModule is a plain one again, in every respect."""

import types

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from trainer_models import LateModule, Module, SetupModule, data, trainer

import lightning_peft as lp

METHODS = {
    "LoRA": lambda: lp.LoRA(rank=2, dropout=0.1),
    "DoRA": lambda: lp.LoRA(rank=2, decompose=True),
    "AdaLoRA": lambda: lp.AdaLoRA(initial_rank=3, target_rank=2, warmup_steps=0, final_steps=1, interval=1),
    "IA3": lp.IA3,
    "Bottleneck": lambda: lp.Bottleneck(size=3),
    "PrefixTuning": lambda: lp.PrefixTuning(length=3, hidden_size=8),
    "LLaMAAdapter": lambda: lp.LLaMAAdapter(length=3),
    "PromptTuning": lambda: lp.PromptTuning(length=3),
    "BitFit": lp.BitFit,
    "two": lambda: [lp.PromptTuning(length=2), lp.LoRA(rank=2)],
}
QUICK = ("LoRA",)
MERGEABLE = ("LoRA", "DoRA", "AdaLoRA", "IA3")


def quick_first(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


LIGHTNINGS = {"_trainer", "_current_fx_name"}  # set by any fit


def plain(value):
    """Return an attribute so that what is equal in two models compares equal."""
    if isinstance(value, types.MethodType):
        return value.__func__
    if isinstance(value, dict):
        return list(map(plain, value.values()))
    return value if isinstance(value, (bool, int, str, float, tuple, type(None))) else repr(value)


def snapshot(model):
    """Return all that modules of a model are and hold, but for the values of tensors."""
    found = {}
    for name, part in model.named_modules():
        found[name, "class"] = type(part)
        found[name, "tensors"] = [(n, p.requires_grad) for n, p in part.named_parameters(recurse=False)]
        found[name, "children"] = list(part._modules)
        own = {key: value for key, value in vars(part).items() if key not in {"_parameters", "_modules", *LIGHTNINGS}}
        found.update({(name, key): plain(value) for key, value in own.items()})
    return found


def build(cls=Module, model="bert"):
    torch.manual_seed(0)
    net = cls(model).train()
    if hasattr(net, "net"):
        next(net.net.parameters()).requires_grad_(False)  # a part that its user froze
    return net


def fit_plainly(net, folder):
    tuner = trainer()
    tuner.fit(net, data())
    tuner.save_checkpoint(folder / "plain.ckpt")
    return torch.load(folder / "plain.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("method", quick_first(METHODS))
def test_nothing_is_left_after_detach(method, tmp_path):
    net = build(model="llama" if "LLaMA" in method else "bert")
    before = snapshot(net)
    trainer(lp.PEFTStrategy(METHODS[method](), show_summary=False)).fit(net, data())
    assert snapshot(net) != before
    lp.detach(net)
    assert snapshot(net) == before
    assert fit_plainly(net, tmp_path).keys() == dict(net.state_dict()).keys()
    assert "lightning_peft" not in torch.load(tmp_path / "plain.ckpt", weights_only=True)


@pytest.mark.parametrize("method", quick_first(MERGEABLE))
def test_nothing_but_the_weights_is_left_after_merge(method, tmp_path):
    net = build()
    before, base = snapshot(net), {n: p.detach().clone() for n, p in net.named_parameters()}
    trainer(lp.PEFTStrategy(METHODS[method](), show_summary=False)).fit(net, data())
    lp.merge(net)
    assert snapshot(net) == before
    assert any(not torch.equal(p, base[n]) for n, p in net.named_parameters())
    merged = {n: p.detach().clone() for n, p in net.named_parameters()}
    assert fit_plainly(net, tmp_path).keys() == net.state_dict().keys()
    moved = [n for n, p in net.named_parameters() if not torch.equal(p, merged[n])]
    assert set(moved) <= {n for n, p in net.named_parameters() if p.requires_grad}
    assert len(moved) > len(merged) / 2


@pytest.mark.slow
def test_what_was_loaded_from_a_checkpoint_is_plain_too(tmp_path):
    tuner = trainer(lp.PEFTStrategy(METHODS["LoRA"](), show_summary=False))
    tuner.fit(build(), data())
    tuner.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(0)
    loaded, fresh = lp.load_from_checkpoint(Module, tmp_path / "x.ckpt"), Module("bert")
    assert snapshot(loaded) != snapshot(fresh)
    assert snapshot(lp.detach(loaded)) == snapshot(fresh)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_is_again_as_its_user_chose_it():
    net = build(model="llama")
    net.net.gradient_checkpointing_enable({"use_reentrant": True})
    kinds = []

    class Look(Callback):
        def on_train_batch_start(self, *args):
            kinds.append(net.net.model.layers[0]._gradient_checkpointing_func.keywords)

    trainer(lp.PEFTStrategy(METHODS["LoRA"](), show_summary=False), Look()).fit(net, data())
    assert kinds[0] == {"use_reentrant": False}
    assert net.net.model.layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": True}
    assert all(adapter.b.abs().sum() > 0 for *_, adapter in lp.adapters(net))


@pytest.mark.slow
@pytest.mark.parametrize("cls", [SetupModule, LateModule])
def test_networks_that_are_built_later_are_plain_as_well(cls):
    net, same = build(cls, "llama"), build(cls, "llama")
    trainer(lp.PEFTStrategy(METHODS["LoRA"](), show_summary=False)).fit(net, data())
    trainer().fit(same, data())
    lp.detach(net)
    assert snapshot(net) == snapshot(same)


def test_hooks_that_the_user_put_on_the_instance_come_back():
    class Helper:
        def configure(self):
            return torch.optim.SGD(net.parameters(), 0.1)

    helper, net = Helper(), build()
    net.configure_optimizers = helper.configure
    net.on_save_checkpoint = seen = lambda checkpoint: None
    tuner = trainer(lp.PEFTStrategy(METHODS["LoRA"](), show_summary=False))
    tuner.fit(net, data())
    assert isinstance(tuner.optimizers[0], torch.optim.SGD)
    lp.detach(net)
    assert net.configure_optimizers.__self__ is helper
    assert net.on_save_checkpoint is seen


@pytest.mark.slow
def test_what_was_injected_into_a_part_is_plain_too(tmp_path):
    net = build()
    before = snapshot(net)
    lp.inject(net.net, lp.LoRA(rank=2))
    trainer(lp.PEFTStrategy(show_summary=False)).fit(net, data())
    lp.detach(net)
    assert snapshot(net) == before
    assert len(fit_plainly(net, tmp_path)) == len(net.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("remove", [lp.merge, lp.detach])
def test_removing_adapters_through_a_part_is_refused_later_and_can_be_completed(remove, tmp_path):
    net = build()
    before = snapshot(net)
    trainer(lp.PEFTStrategy(METHODS["LoRA"](), show_summary=False)).fit(net, data())
    remove(net.net)
    with pytest.raises(ValueError, match=r"merge or detach was called with a part of it.*detach\(module\)"):
        trainer().fit(net, data())
    lp.detach(net)
    assert snapshot(net) == before
    assert len(fit_plainly(net, tmp_path)) == len(net.state_dict())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_modes_are_those_before_training_however_it_ends(error):
    class Breaks(Module):
        def on_train_batch_end(self, *args):
            if self.current_epoch == 1:
                raise error("stop")

    net = build(Breaks)
    net.net.bert.pooler.eval() if hasattr(net.net.bert, "pooler") and net.net.bert.pooler else None
    before = [part.training for part in net.modules()]
    tuner = trainer(lp.PEFTStrategy(METHODS["BitFit"](), show_summary=False), epochs=2)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        tuner.fit(net, data())
    assert [part.training for part in net.modules()] == before
    assert tuner.global_step > 0


def test_a_fit_that_fails_before_the_network_is_built_injects_nothing_later():
    class Broken(LateModule):
        broken = True

        def setup(self, stage):
            if self.broken:
                raise RuntimeError("no data")

    net = Broken("llama")
    with pytest.raises(RuntimeError, match="no data"):
        trainer(lp.PEFTStrategy(METHODS["LoRA"](), show_summary=False)).fit(net, data())
    net.broken = False
    trainer().fit(net, data())
    assert not any(lp.adapters(net))
    assert not {"configure_model", "setup"} & vars(net).keys()


def test_names_that_a_module_has_are_refused_before_anything_changes():
    net = build()
    before = snapshot(net)
    for name in ("training", "_x", "forward", "a.b", "call_super_init"):
        with pytest.raises(ValueError, match=f"A method cannot be named '{name}'"):
            lp.inject(net, lp.LoRA(name=name))
        assert snapshot(net) == before


@pytest.mark.slow
def test_children_named_as_the_place_of_adapters_train_beside_them(tmp_path):
    class Crowded(Module):
        def build(self):
            super().build()
            torch.manual_seed(5)
            self.net.peft, self.peft = nn.Linear(3, 3), nn.Linear(2, 2)

    torch.manual_seed(0)
    net, tuner = Crowded(), trainer(lp.PEFTStrategy(lp.LoRA(rank=2, name="peft"), show_summary=False))
    tuner.fit(net, data())
    tuner.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(0)
    loaded = lp.load_from_checkpoint(Crowded, tmp_path / "x.ckpt")
    rows = data().dataset
    assert torch.equal(loaded.eval().net(rows).logits, net.eval().net(rows).logits)
    assert len(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]) == 12
    lp.detach(net)
    assert {"peft"} <= net._modules.keys()
