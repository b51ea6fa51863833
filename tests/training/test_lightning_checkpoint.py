"""Checkpoints hold what trains and nothing else, and a resumed run ends where an uninterrupted one does."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import MODELS
from sampling import diagonal
from trainer_models import Module, Resumable, data, module, trainer

import lightning_peft as lp
from lightning_peft.core.fingerprint import fingerprint

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
METHODS = {
    "LoRA": lambda: lp.LoRA(rank=2, dropout=0.2),
    "DoRA": lambda: lp.LoRA(rank=2, dropout=0.2, decompose=True),
    "FedPara": lambda: lp.FedPara(rank=2, jacobian_weight=0.1),
    "IA3": lp.IA3,
    "Bottleneck": lambda: lp.Bottleneck(size=3),
    "ParallelAdapter": lambda: lp.ParallelAdapter(size=3, dropout=0.2),
    "KronA": lp.KronA,
    "KronABlock": lambda: lp.KronABlock(residual=True),
    "AdaLoRA": lambda: lp.AdaLoRA(
        targets=["attention.query", "attention.value"],
        initial_rank=3,
        target_rank=2,
        dropout=0.2,
        warmup_steps=1,
        interval=1,
    ),
    "LLaMAAdapter": lambda: lp.LLaMAAdapter(length=3, gate_warmup_steps=2),
    "PTuning": lambda: lp.PTuning(length=3, dropout=0.2),
    "LLaMAAdapter, version 2": lambda: lp.LLaMAAdapter(length=3, train_norms=True, bias_and_scale=True),
    "PrefixTuning": lambda: lp.PrefixTuning(length=3, hidden_size=8, dropout=0.2),
    "PTuningV2": lambda: lp.PTuningV2(length=3, dropout=0.2),
    "PromptTuning": lambda: lp.PromptTuning(length=3),
    "MultitaskPromptTuning": lambda: lp.MultitaskPromptTuning(length=3),
    "BitFit": lambda: lp.BitFit(add_missing=True),
    "FullFineTuning": lp.FullFineTuning,
    "OutputLayers": lp.OutputLayers,
    "LastLayers": lambda: lp.LastLayers(count=2),
    "two": lambda: [lp.PromptTuning(length=2), lp.LoRA(rank=2, dropout=0.1)],
}
BASES = ["bert", "llama", "gpt2"]
# Quick: those with dropout, penalties, counted steps, encoders, new parameters or parameters of the base.
AMONG = ["LoRA", "FedPara", "AdaLoRA", "LLaMAAdapter", "PTuning", "PrefixTuning", "BitFit", "LastLayers", "two"]


def strategy(name, **settings):
    return lp.PEFTStrategy(METHODS[name](), show_summary=False, **settings)


class OneEpoch(pl.Callback):
    """Ends a run after its first epoch, which the run itself does not know beforehand."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def fit(name, base, epochs, *callbacks, path=None, place="init"):
    pl.seed_everything(7, verbose=False)
    net = module(base, place)
    trainer(strategy(name), *callbacks, epochs=epochs).fit(net, data(shuffle=True), ckpt_path=path)
    return net


@diagonal(("name", "base"), METHODS, BASES, among=AMONG)
def test_resuming_ends_with_the_same_weights(name, base, tmp_path):
    whole = fit(name, base, 2)
    fit(name, base, 2, OneEpoch(), ModelCheckpoint(tmp_path, save_last=True))
    resumed = fit(name, base, 2, path=tmp_path / "last.ckpt", place="configure_model")
    with lp.full_state_dict(whole), lp.full_state_dict(resumed):
        expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    different = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert not different
    assert fingerprint(whole) == fingerprint(resumed)


def test_resuming_in_the_middle_of_an_epoch_ends_with_the_same_weights(tmp_path):
    def run(steps, *callbacks, path=None):
        pl.seed_everything(7, verbose=False)
        net = module()
        rows = data().dataset
        trainer(strategy("LoRA"), *callbacks, epochs=None, max_steps=steps).fit(net, Resumable(rows, 2), ckpt_path=path)
        return net

    whole = run(3)
    run(1, ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True))
    resumed = run(3, path=tmp_path / "last.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_resuming_from_the_best_validation_ends_with_the_same_weights(tmp_path):
    def run(epochs, *callbacks, path=None):
        pl.seed_everything(7, verbose=False)
        net = module()
        trainer(strategy("LoRA"), *callbacks, epochs=epochs).fit(net, data(shuffle=True), data(), ckpt_path=path)
        return net

    whole = run(2, ModelCheckpoint(tmp_path / "whole", monitor="val_loss"))
    saved = ModelCheckpoint(tmp_path / "half", monitor="val_loss")
    run(1, saved)
    resumed = run(2, ModelCheckpoint(tmp_path / "half", monitor="val_loss"), path=saved.best_model_path)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


@diagonal(("name", "weights_only"), METHODS, [False, True], among=AMONG)
def test_a_checkpoint_holds_exactly_what_trains_and_what_adapters_count(name, weights_only, tmp_path):
    net = fit(name, "llama", 1, ModelCheckpoint(tmp_path, save_last=True, save_weights_only=weights_only))
    trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
    counted = {key: b for key, b in net.named_buffers() if ".peft." in key}
    assert bool(counted) == (name == "AdaLoRA")
    for path in tmp_path.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["state_dict"].keys() == trained.keys() | counted.keys()
        assert checkpoint["lightning_peft"]["base"] == fingerprint(net)
        numbers = sum(p.numel() + 300 for p in trained.values()) * (1 if weights_only else 3)  # with AdamW's averages
        numbers += sum(b.numel() + 300 for b in counted.values())  # each tensor has a name and a place as well
        assert path.stat().st_size < 4 * numbers + 20_000
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    fresh = lp.load_from_checkpoint(Module, path)
    assert torch.equal(fresh.net.eval()(data().dataset).logits, net.net.eval()(data().dataset).logits)


@pytest.mark.parametrize("place", ["init", "setup", "configure_model"])
def test_a_fresh_trainer_tests_a_checkpoint(place, tmp_path):
    saved = ModelCheckpoint(tmp_path)
    pl.seed_everything(7, verbose=False)
    net = module("llama", place)
    first = trainer(strategy("two"), saved)
    first.fit(net, data())
    expected = first.test(net, data(), verbose=False)
    fresh = trainer(strategy("two"))
    assert fresh.test(module("llama", place), data(), ckpt_path=saved.best_model_path, verbose=False) == expected
    assert fresh.global_step == 0


def test_what_the_module_keeps_and_what_thaws_later_stays_in(tmp_path):
    class Keeper(Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

    net = Keeper()
    tuner = trainer(strategy("LoRA"))
    tuner.fit(net, data())
    net.seen += 3
    net.net.model.norm.requires_grad_(True)
    tuner.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert state["seen"] == 3
    assert "net.model.norm.weight" in state
    assert "net.model.embed_tokens.weight" not in state
    with lp.full_state_dict(net):
        assert MODELS["llama"]().state_dict().keys() <= {key.removeprefix("net.") for key in net.state_dict()}


def test_a_full_checkpoint_holds_the_base(tmp_path):
    tuner = trainer(strategy("LoRA", full_checkpoint=True))
    net = module()
    tuner.fit(net, data())
    tuner.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert {f"net.{key}" for key in MODELS["llama"]().state_dict()} < state.keys()


@pytest.fixture
def saved(tmp_path):
    tuner = trainer(strategy("LoRA"))
    tuner.fit(module(), data())
    tuner.save_checkpoint(tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def change(path, edit):
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, path)


KEY = "net.model.layers.0.self_attn.q_proj.peft.lora.a"
BAD = {
    "missing": (lambda c: c["state_dict"].pop(KEY), rf"lacks {KEY} \(1 in all\)"),
    "extra": (lambda c: c["state_dict"].update({f"{KEY}x": torch.ones(1)}), rf"no place for {KEY}x"),
    "shape": (
        lambda c: c["state_dict"].update({KEY: torch.ones(5, 5)}),
        rf"another shape of {KEY} \(5, 5\) instead of \(2, 32\)",
    ),
    "base": (lambda c: c["lightning_peft"].update(base="0123"), "belongs to another base model: fingerprint 0123"),
    "settings": (lambda c: c["lightning_peft"]["methods"][0].update(rank=3), "other settings than this model's"),
    "format": (lambda c: c["lightning_peft"].update(format=99), "format 99; this version reads 1"),
    "no adapters": (lambda c: c.pop("lightning_peft"), "written without PEFTStrategy"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changed(case, saved):
    edit, said = BAD[case]
    change(saved, edit)
    net = module()
    tuner = trainer(strategy("LoRA"), epochs=2)
    with pytest.raises((ValueError, RuntimeError), match=said):
        tuner.fit(net, data(), ckpt_path=saved)
    assert fingerprint(net) == fingerprint(lp.inject(module(), METHODS["LoRA"]()))
    assert all(adapter.b.abs().sum() == 0 for *_, adapter in lp.adapters(net))


def test_another_base_may_be_allowed(saved):
    change(saved, BAD["base"][0])
    tuner, steps = trainer(strategy("LoRA", check_base=False), epochs=2), torch.load(saved)["global_step"]
    tuner.fit(module(), data(), ckpt_path=saved)
    assert tuner.global_step == 2 * steps > 0


def flipped(value):
    """Return a tensor with its last bit flipped, whatever its type is."""
    other = value.clone()
    other.view(torch.uint8).flatten()[-1] ^= 1
    return other


FLIPS = {
    "adapter": lambda c: c["state_dict"].update({KEY: flipped(c["state_dict"][KEY])}),
    "optimizer": lambda c: c["optimizer_states"][0]["state"][0].update(
        exp_avg=flipped(c["optimizer_states"][0]["state"][0]["exp_avg"])
    ),
}


@pytest.mark.parametrize("case", FLIPS)
def test_one_flipped_bit_of_tensors_is_refused_unless_there_is_no_checksum(case, saved):
    change(saved, FLIPS[case])
    said = "The checkpoint was changed since it was saved: .* has another checksum"
    with pytest.raises(ValueError, match=said):
        trainer(strategy("LoRA"), epochs=2).fit(module(), data(), ckpt_path=saved)
    with pytest.raises(ValueError, match=said):
        lp.load_from_checkpoint(Module, saved)
    change(saved, lambda c: c["lightning_peft"].pop("sha256"))  # as earlier versions wrote it
    assert lp.load_from_checkpoint(Module, saved).state_dict().keys() == torch.load(saved)["state_dict"].keys()


def test_another_value_of_the_frozen_base_in_a_checkpoint_is_refused(saved):
    key = "net.model.layers.0.self_attn.q_proj.weight"
    base = MODELS["llama"]().state_dict()[key.removeprefix("net.")]
    change(saved, lambda c: (c["state_dict"].update({key: base + 1}), c["lightning_peft"].pop("sha256")))
    net = module()
    with pytest.raises(ValueError, match=f"holds other values of {key}, which belongs to the frozen base"):
        trainer(strategy("LoRA"), epochs=2).fit(net, data(), ckpt_path=saved)
    assert torch.equal(net.get_parameter(key), base)
    with pytest.raises(ValueError, match=f"holds other values of {key}"):
        lp.load_from_checkpoint(Module, saved)
    change(saved, lambda c: c["state_dict"].update({key: base}))
    assert torch.equal(lp.load_from_checkpoint(Module, saved).get_parameter(key), base)
