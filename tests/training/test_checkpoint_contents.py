"""A checkpoint that would lack what trains is refused when it is saved; one that would hold the network stays small."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import MODELS
from trainer_models import Module, data, trainer

import lightning_peft as lp

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


def strategy(**settings):
    return lp.PEFTStrategy(lp.LoRA(rank=2), show_summary=False, **settings)


class StateOfHead(Module):
    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "lm_head" in name}


class Renames(Module):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"my.{name}": value for name, value in checkpoint["state_dict"].items()}


class Filters(pl.Callback):
    def on_save_checkpoint(self, tuner, module, checkpoint):
        checkpoint["state_dict"].pop("net.model.layers.2.self_attn.v_proj.peft.lora.b")


CASES = {"state_dict": (StateOfHead, [], 12), "renamed": (Renames, [], 13), "callback": (Module, [Filters], 1)}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_lacks_adapters_is_refused_at_the_first_save(case, tmp_path):
    make, callbacks, count = CASES[case]
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    tuner = trainer(strategy(also_train=["lm_head"]), *[callback() for callback in callbacks], saving, epochs=3)
    with pytest.raises(
        ValueError, match=rf"The checkpoint would lack {count} tensors that train: .*on_save_checkpoint"
    ):
        tuner.fit(make(), data())
    assert tuner.global_step == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_state_dict_that_adds_to_the_state_is_saved(tmp_path):
    class Adds(Module):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"]["note"] = torch.ones(1)

    tuner = trainer(strategy())
    tuner.fit(Adds(), data())
    tuner.save_checkpoint(tmp_path / "x.ckpt")
    assert len(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]) == 13


class Given(pl.LightningModule):
    """Takes its network as an argument, and saves all of its arguments."""

    def __init__(self, net, rate=0.01, parts=()):
        super().__init__()
        with warnings.catch_warnings():  # Lightning's advice to leave modules out
            warnings.simplefilter("ignore")
            self.save_hyperparameters()
        self.net = net

    def training_step(self, batch, index):
        return self.net(batch).logits.square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams["rate"])


def base():
    torch.manual_seed(3)
    return MODELS["llama"]()


def test_a_network_among_saved_arguments_is_left_out_with_a_warning(tmp_path):
    module, tuner = Given(base(), rate=0.02, parts=[base().lm_head]), trainer(strategy(), epochs=2)
    tuner.fit(module, data())
    with pytest.warns(UserWarning, match=r"save_hyperparameters\(ignore=\['net', 'parts'\]\)"):
        tuner.save_checkpoint(tmp_path / "x.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuner.save_checkpoint(tmp_path / "y.ckpt")  # said once
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"] == {"rate": 0.02}
    assert isinstance(module.hparams["net"], torch.nn.Module)
    loaded = lp.load_from_checkpoint(Given, tmp_path / "x.ckpt", net=base())
    assert loaded.hparams["rate"] == 0.02
    assert torch.equal(loaded.eval().net(data().dataset).logits, module.eval().net(data().dataset).logits)
    resumed = Given(base(), rate=0.02)
    tuner = trainer(strategy(), epochs=3)
    tuner.fit(resumed, data(), ckpt_path=tmp_path / "x.ckpt")
    assert tuner.global_step == 12


@pytest.mark.slow
def test_a_checkpoint_with_a_pickled_network_is_read_where_that_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_peft.training.lightning_checkpoint.leave_out_modules", lambda *_: None)
    module, tuner = Given(base()), trainer(strategy())  # as earlier versions saved it
    tuner.fit(module, data())
    tuner.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"objects that run code.*weights_only=False.*save_hyperparameters\(ignore"):
        lp.load_from_checkpoint(Given, tmp_path / "x.ckpt")
    expected = module.eval().net(data().dataset).logits
    for arguments in ({}, {"net": base()}):
        loaded = lp.load_from_checkpoint(Given, tmp_path / "x.ckpt", weights_only=False, **arguments)
        assert len(list(lp.adapters(loaded))) == 6
        assert torch.equal(loaded.eval().net(data().dataset).logits, expected)
