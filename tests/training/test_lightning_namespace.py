"""``import lightning`` and ``import pytorch_lightning``: the callback works under the Trainer of either."""

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import strategies
from torch import nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.training import lightning_namespace
from lightning_peft.training.lightning_api import spawns_processes

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
ROWS = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def make_namespace(name):
    """Return a name space with LightningModules of it: with a network from the start, and with one built later."""
    if name == "pytorch_lightning":
        pytest.importorskip(name, reason="pytorch_lightning, the other name space, is not installed")
    package = importlib.import_module(name)

    class Early(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.build()

        def build(self):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def predict_step(self, batch, index):
            return self.net(batch)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.1)

    class Late(Early):
        def build(self):
            pass

        def configure_model(self):
            if not hasattr(self, "net"):
                super().build()

    return SimpleNamespace(package=package, Early=Early, Late=Late)


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def names(request):
    return make_namespace(request.param)


def make_trainer(names, *callbacks, method=None, **settings):
    saves = any(isinstance(callback, names.package.callbacks.ModelCheckpoint) for callback in callbacks)
    method = method or lp.LoRA(targets=["net.0"], rank=2, dropout=0.2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callbacks = [lp.PEFTStrategy(method, show_summary=False), *callbacks]
    return names.package.Trainer(callbacks=callbacks, enable_checkpointing=saves, **{**quiet, **settings})


def rows():
    return DataLoader(ROWS, batch_size=2)


@pytest.mark.parametrize("kind", ["Early", pytest.param("Late", marks=pytest.mark.slow)])
def test_fit_checkpoint_resume_and_load_agree(names, kind, tmp_path):
    cls, ends = getattr(names, kind), []
    for run in ("whole", "resumed"):
        torch.manual_seed(3)
        module = cls()
        if run == "resumed":
            saving = names.package.callbacks.ModelCheckpoint(tmp_path, save_last=True)
            make_trainer(names, saving, max_epochs=1).fit(cls(), rows())
        make_trainer(names, max_epochs=2).fit(
            module, rows(), ckpt_path=tmp_path / "last.ckpt" if run == "resumed" else None
        )
        ends.append({name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad})
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []
    assert ends[0]["net.0.peft.lora.b"].abs().min() > 0
    tuner = make_trainer(names, max_epochs=3)
    tuner.fit(module, rows())
    tuner.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {"net.0.peft.lora.a", "net.0.peft.lora.b"}
    loaded = lp.load_from_checkpoint(cls, tmp_path / "end.ckpt")
    expected = module.eval().net(ROWS)
    assert torch.equal(loaded.eval().net(ROWS), expected)
    predicted = make_trainer(names).predict(cls(), rows(), ckpt_path=tmp_path / "end.ckpt")
    assert torch.equal(torch.cat(predicted), expected)


def test_a_single_callback_is_taken_without_a_list(names):
    module, strategy = names.Early(), lp.PEFTStrategy(lp.LoRA(targets=["net.0"], rank=2), show_summary=False)
    tuner = names.package.Trainer(callbacks=strategy, fast_dev_run=True, accelerator="cpu")
    tuner.fit(module, rows())
    assert isinstance(strategy, names.package.Callback)
    assert strategy in tuner.callbacks
    assert module.net[0].peft["lora"].b.abs().min() > 0


def test_predictions_are_numbered_as_the_data_set_does(names, tmp_path):
    order = DataLoader(ROWS, batch_size=2, sampler=[3, 1, 0, 2, 7, 5, 6, 4])
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    tuner = names.package.Trainer(callbacks=lp.PredictionWriter(tmp_path / "out.jsonl"), **quiet)
    (module := names.Early()).eval()
    tuner.predict(module, order, return_predictions=False)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 9))
    torch.testing.assert_close(torch.tensor([line["prediction"] for line in lines]), module.net(ROWS).detach())


def test_what_depends_on_classes_of_lightning_is_asked_of_both(names, tmp_path):
    averaging = names.package.callbacks.StochasticWeightAveraging(0.01)
    strategy = lp.PEFTStrategy(lp.LoRA(targets=["net.0"]))
    with pytest.raises(ValueError, match="list PEFTStrategy before it"):
        names.package.Trainer(callbacks=[averaging, strategy], fast_dev_run=True, accelerator="cpu").fit(
            names.Early(), rows()
        )
    spawning = names.package.Trainer(strategy="ddp_spawn", devices=2, accelerator="cpu", logger=False)
    assert spawns_processes(spawning)
    own = names.package.strategies
    assert lightning_namespace.is_instance(own.DDPStrategy(), strategies.DDPStrategy)
    assert not lightning_namespace.is_instance(own.DDPStrategy(), strategies.FSDPStrategy)
    flattening = own.FSDPStrategy()
    with pytest.raises(TypeError, match="FSDPStrategy flattens adapters"):
        lp.training.distributed.lightning_strategies.prepare_strategy(flattening, False, {})
    assert lightning_namespace.overrides(names.Late(), "configure_model")
    assert not lightning_namespace.overrides(names.Early(), "configure_model")


def test_a_class_has_its_counterpart_where_the_other_name_space_is_imported(names):
    same = lightning_namespace.counterparts(strategies.DDPStrategy)
    assert names.package.strategies.DDPStrategy in same
    assert lightning_namespace.counterparts(lp.FSDP2Strategy) == (lp.FSDP2Strategy,)


@pytest.mark.slow
def test_the_other_name_space_is_not_imported_by_this_package():
    code = (
        "import sys, lightning_peft as lp; bases = type(lp.PEFTStrategy()).__bases__; "
        "print('pytorch_lightning' in sys.modules, bases)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert ran.stdout.split(" ", 1) == ["False", f"({pl.Callback!r},)\n"]
