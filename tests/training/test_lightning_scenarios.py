"""What Lightning can do, with the callback in: a table of scenarios, each with the values that must come out.

`pytest -s -m "" tests/training/test_lightning_scenarios.py` prints it.
"""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import lightning_peft as lp

ROWS = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
TRAINS = {
    "net.0.peft.lora.a",
    "net.0.peft.lora.b",
    "net.2.peft.lora.a",
    "net.2.peft.lora.b",
    "head.weight",
    "head.bias",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:(`.fit.ckpt_path=None.` was called|.*there is no last checkpoint available)"),
    pytest.mark.filterwarnings("ignore:Field `model.batch_size` and `model.hparams.batch_size` are mutually exclusive"),
    pytest.mark.filterwarnings("ignore:(SWA is currently only supported|Swapping scheduler)"),
]


class Task(pl.LightningModule):
    """A small network: ``net.0`` and ``net.2`` are adapted, ``head`` trains, the rest is frozen."""

    def __init__(self, lr=0.05, batch_size=2):
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.batch_size = lr, batch_size
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, index):
        loss = (self(batch) - 1).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", (self(batch) - 1).square().mean())

    test_step = validation_step

    def predict_step(self, batch, index):
        return self(batch)

    def train_dataloader(self):
        return DataLoader(ROWS, batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(ROWS[:4], batch_size=2)

    test_dataloader = predict_dataloader = val_dataloader

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr)


def strategy(**settings):
    method = lp.LoRA(rank=2, targets=["net.0", "net.2"])
    return lp.PEFTStrategy(method, also_train=["head"], show_summary=False, **settings)


def make(*more, before=(), **settings):
    saves = any(isinstance(callback, callbacks.Checkpoint) for callback in more)
    settings = {**QUIET, "accelerator": "cpu", "max_epochs": 2, "enable_checkpointing": saves, **settings}
    return pl.Trainer(callbacks=[*before, strategy(), *more], **settings)


def fit(module=None, *more, path=None, **settings):
    tuner, module = make(*more, **settings), module or Task()
    torch.manual_seed(7)
    tuner.fit(module, ckpt_path=path)
    return tuner


def check(tuner, folder, cls=Task, moved=TRAINS, name="end.ckpt"):
    """Assert that what was declared has moved, and nothing else, and that a checkpoint holds it and loads equal."""
    module, fresh = tuner.lightning_module, Task()
    base = dict(fresh.named_parameters())
    names = {n: p for n, p in module.named_parameters() if ".peft." not in n}
    assert names.keys() == base.keys()
    assert {n for n, p in names.items() if not torch.equal(p, base[n])} == {n for n in moved if "peft" not in n}
    assert {n for n, p in module.named_parameters() if p.requires_grad} == TRAINS
    for n in moved:
        if n.endswith(".b"):
            assert module.get_parameter(n).abs().min() > 0
    tuner.save_checkpoint(folder / name)
    checkpoint = torch.load(folder / name, weights_only=True)
    assert checkpoint["state_dict"].keys() == TRAINS
    held = [p for o in tuner.optimizers for group in o.param_groups for p in group["params"]]
    if held:
        assert {n for n, p in module.named_parameters() if any(p is q for q in held)} == TRAINS
    loaded = lp.load_from_checkpoint(cls, folder / name)
    expected = module.eval()(ROWS)
    assert torch.equal(loaded.eval()(ROWS), expected)
    (predicted,) = [torch.cat(make().predict(cls(), DataLoader(ROWS, batch_size=16), ckpt_path=folder / name))]
    assert torch.equal(predicted, expected)
    return loaded


def weights(module):
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


SCENARIOS, QUICK = {}, set()


def scenario(name, quick=False):
    def add(function):
        SCENARIOS[name] = function
        if quick:
            QUICK.add(name)
        return function

    return add


@scenario("restore")
def restore(folder):
    whole = fit(max_epochs=4)
    fit(None, callbacks.ModelCheckpoint(folder, save_last=True), max_epochs=2)
    resumed = fit(max_epochs=4, path=folder / "last.ckpt")
    assert resumed.global_step == whole.global_step == 32
    assert same(weights(whole.lightning_module), weights(resumed.lightning_module))
    check(resumed, folder)
    return "4 epochs = 2 + 2, to the bit"


@scenario("best checkpoint, then test")
def best(folder):
    saving = callbacks.ModelCheckpoint(folder, monitor="val_loss")
    tuner = fit(None, saving, max_epochs=3)
    ((fitted),) = tuner.test(tuner.lightning_module, ckpt_path="best", verbose=False)
    ((fresh),) = make().test(Task(), ckpt_path=saving.best_model_path, verbose=False)
    assert fitted == fresh
    assert fitted["val_loss"] == pytest.approx(saving.best_model_score.item())
    return "a fresh Trainer measures the same"


class Two(Task):
    automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net.parameters(), 0.1), torch.optim.AdamW(self.head.parameters(), 0.05)]

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward((self(batch) - 1).square().mean())
            optimizer.step()
            self.untoggle_optimizer(optimizer)


@scenario("several optimizers, manual", quick=True)
def several(folder):
    tuner = fit(Two())
    assert tuner.global_step == 32
    assert [len(o.param_groups[0]["params"]) for o in tuner.optimizers] == [4, 2]
    check(tuner, folder, Two)
    resumed = fit(Two(), max_epochs=3, path=folder / "end.ckpt")
    assert same(weights(resumed.lightning_module), weights(fit(Two(), max_epochs=3).lightning_module))
    return "4 and 2 parameters, 32 steps; resumed to the bit"


class ByHand(Task):
    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers(use_pl_optimizer=False)
        loss = (self(batch) - 1).square().mean() / 4
        loss.backward()
        if index % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


@scenario("manual optimization with torch alone")
def raw(folder):
    tuner = fit(ByHand())
    check(tuner, folder, ByHand)
    assert (tuner.global_step, tuner.callbacks[0].state_dict()["steps"]) == (0, [4])
    resumed = fit(ByHand(), max_epochs=3, path=folder / "end.ckpt")
    assert resumed.callbacks[0].state_dict()["steps"] == [6]
    return "4 steps counted, of which Lightning knows none"


def scheduled(make_scheduler, interval, **more):
    class Scheduled(Task):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            entry = {"scheduler": make_scheduler(optimizer), "interval": interval, **more}
            return {"optimizer": optimizer, "lr_scheduler": entry}

    return Scheduled


SCHEDULERS = {
    "step": (scheduled(lambda o: lr_scheduler.StepLR(o, 4, 0.5), "step"), 0.1 * 0.5**4),
    "epoch": (scheduled(lambda o: lr_scheduler.ExponentialLR(o, 0.5), "epoch"), 0.1 * 0.5**2),
    "OneCycleLR": (scheduled(lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=17), "step"), None),
    "ReduceLROnPlateau": (
        scheduled(lambda o: lr_scheduler.ReduceLROnPlateau(o, "max", 0.1, 0), "epoch", monitor="val_loss"),
        None,
    ),
}


def schedule(name):
    def run(folder):
        cls, expected = SCHEDULERS[name]
        tuner = fit(cls())
        rate = tuner.optimizers[0].param_groups[0]["lr"]
        assert tuner.lr_scheduler_configs[0].scheduler.optimizer is tuner.optimizers[0]
        if expected is not None:
            assert rate == pytest.approx(expected)
        else:
            assert rate != pytest.approx(0.1)
        check(tuner, folder, cls)
        return f"rate {rate:.4g} at the end"

    return run


for _name in SCHEDULERS:
    scenario(f"scheduler: {_name}")(schedule(_name))


@scenario("LBFGS")
def lbfgs(folder):
    class Quasi(Task):
        def configure_optimizers(self):
            return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad], lr=0.1, max_iter=3)

    tuner = fit(Quasi(), max_epochs=1)
    assert tuner.global_step == 8
    assert tuner.callbacks[0].state_dict()["steps"] == [8]
    check(tuner, folder, Quasi)
    return "8 steps of 3 closures"


@scenario("EMAWeightAveraging")
def ema(folder):
    averaging = callbacks.EMAWeightAveraging(decay=0.5)
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, tuner, module, *args):
            seen.append(weights(module))

    tuner = fit(None, Watch(), averaging, callbacks.ModelCheckpoint(folder, save_last=True))
    expected = seen[0]
    for values in seen[1:]:
        expected = {n: 0.5 * expected[n] + 0.5 * values[n] for n in expected}
    last = torch.load(folder / "last.ckpt", weights_only=True)
    for name, value in weights(tuner.lightning_module).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-3)
        assert torch.equal(last["state_dict"][name], value)
    assert last["current_model_state"].keys() == TRAINS
    check(tuner, folder)
    whole = fit(None, callbacks.EMAWeightAveraging(decay=0.5), max_epochs=3)
    resumed = fit(None, callbacks.EMAWeightAveraging(decay=0.5), max_epochs=3, path=folder / "last.ckpt")
    assert same(weights(whole.lightning_module), weights(resumed.lightning_module))
    return "the average by hand; resumed to the bit"


@scenario("WeightAveraging")
def averaging(folder):
    tuner = fit(None, callbacks.WeightAveraging())
    check(tuner, folder)
    return "averages what trains"


@scenario("StochasticWeightAveraging")
def swa(folder):
    tuner = fit(None, callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1), max_epochs=4)
    check(tuner, folder)
    return "averages what trains"


@scenario("averaging listed before")
def averaging_before(folder):
    for average in (callbacks.EMAWeightAveraging(), callbacks.StochasticWeightAveraging(0.01)):
        with pytest.raises(ValueError, match="list PEFTStrategy before it"):
            make(before=[average]).fit(Task())
    return "refused: list PEFTStrategy before it"


@scenario("learning-rate finder")
def rate_finder(folder):
    module, tuner = Task(), make()
    torch.manual_seed(7)
    found = Tuner(tuner).lr_find(module, num_training=16, min_lr=1e-4, max_lr=0.5, update_attr=True)
    assert len(found.results["loss"]) == 16
    assert module.lr == found.suggestion() != 0.05
    tuner.fit(module)
    assert tuner.global_step == 16
    assert tuner.callbacks[0].state_dict()["steps"] == [16]
    same_run = fit(Task(lr=module.lr))
    assert same(weights(module), weights(same_run.lightning_module))
    check(tuner, folder)
    return "finds a rate, and trains as if never asked"


@scenario("LearningRateFinder callback")
def rate_finder_callback(folder):
    tuner = fit(None, callbacks.LearningRateFinder(num_training_steps=16, max_lr=0.5))
    assert tuner.callbacks[1].state_dict()["steps"] == [16]
    check(tuner, folder)
    return "16 steps counted, none of the finder's"


@scenario("batch-size finder")
def size_finder(folder):
    module, tuner = Task(), make()
    size = Tuner(tuner).scale_batch_size(module, mode="power", max_trials=3, steps_per_trial=2)
    assert size == module.batch_size > 2
    assert all(adapter.b.abs().sum() == 0 for *_, adapter in lp.adapters(module))
    tuner.fit(module)
    check(tuner, folder)
    return f"size {size}, the adapters untouched by trials"


@scenario("barebones")
def barebones(folder):
    module, tuner = Task(), pl.Trainer(barebones=True, callbacks=[strategy()], accelerator="cpu", max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*barebones.*")
        torch.manual_seed(7)
        tuner.fit(module)
        check(tuner, folder)
    assert same(weights(module), weights(fit().lightning_module))
    return "the weights of an ordinary run"


class Broken(Task):
    error = RuntimeError

    def on_train_batch_end(self, outputs, batch, index):
        if self.global_step == 12:
            raise self.error("stop")


def interrupted(error):
    def run(folder):
        module, tuner = Broken(), make(callbacks.OnExceptionCheckpoint(folder, "broken"))
        module.error = error
        torch.manual_seed(7)
        with pytest.raises((error, SystemExit)):
            tuner.fit(module)
        assert all(part.training for part in module.modules())
        checkpoint = torch.load(folder / "broken.ckpt", weights_only=True)
        assert checkpoint["state_dict"].keys() == TRAINS
        assert checkpoint["callbacks"]["PEFTStrategy"]["steps"] == [12]
        plain = Task()
        again = make(max_epochs=3)
        again.fit(plain, ckpt_path=folder / "broken.ckpt")
        assert again.global_step == 24
        check(again, folder)
        before = weights(module)
        module.on_train_batch_end = lambda *args: None
        check(fit(module, max_epochs=1), folder, Broken)
        assert not same(before, weights(module))
        return "saved at step 12; resumes, and the module fits again"

    return run


scenario("exception")(interrupted(RuntimeError))
scenario("KeyboardInterrupt", quick=True)(interrupted(KeyboardInterrupt))


@scenario("gradient clipping")
def clipping(folder):
    tuner = fit(None, gradient_clip_val=1e-3)
    small = weights(tuner.lightning_module)
    norms = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, tuner, module, optimizer):
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            if gradients:
                norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())

    fit(None, Watch(), gradient_clip_val=1e-3)
    assert max(norms) == pytest.approx(1e-3, rel=0.01)
    assert not same(small, weights(fit().lightning_module))
    check(tuner, folder)
    return "norm 0.001 over what trains alone"


@scenario("gradient accumulation")
def accumulation(folder):
    class Summed(Task):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    tuner = fit(Summed(), accumulate_grad_batches=4)
    large = fit(Summed(batch_size=8))
    assert tuner.global_step == large.global_step == 4
    for name, value in weights(tuner.lightning_module).items():
        torch.testing.assert_close(value, large.lightning_module.get_parameter(name), atol=1e-6, rtol=1e-4)
    check(tuner, folder, Summed)
    return "4 batches of 2 = 1 of 8"


@scenario("fast_dev_run", quick=True)
def fast_dev_run(folder):
    tuner = fit(fast_dev_run=True)
    assert tuner.global_step == 1
    check(tuner, folder)
    return "1 step"


@scenario("predict, test and validate alone", quick=True)
def evaluation(folder):
    for function in ("validate", "test", "predict"):
        module = Task()
        with pytest.warns(UserWarning, match="Fresh adapters are evaluated"):
            getattr(make(), function)(module, **({} if function == "predict" else {"verbose": False}))
        assert torch.equal(module.eval()(ROWS), Task().eval()(ROWS))
        assert len(list(lp.adapters(module))) == 2
    return "the base's outputs, with a warning that nothing was trained"


@scenario("validate before fit")
def validate_first(folder):
    module, tuner = Task(), make()
    with pytest.warns(UserWarning, match="Fresh adapters"):
        tuner.validate(module, verbose=False)
    torch.manual_seed(7)
    tuner.fit(module)
    check(tuner, folder)
    assert len(list(lp.adapters(module))) == 2
    return "adapted once"


@scenario("several fits of one callback")
def several_fits(folder):
    one, modules = strategy(), [Task(), Task()]
    runs = []
    for module in modules:
        tuner = pl.Trainer(callbacks=[one], accelerator="cpu", max_epochs=2, enable_checkpointing=False, **QUIET)
        torch.manual_seed(7)
        tuner.fit(module)
        runs.append(weights(module))
        check(tuner, folder)
    assert same(*runs)
    tuner.fit_loop.max_epochs = 3
    tuner.fit(modules[1])
    assert tuner.global_step == 24
    assert one.state_dict()["steps"] == [24]
    assert not same(runs[1], weights(modules[1]))
    assert same(runs[0], weights(modules[0]))
    return "two modules alike, then one epoch more"


@scenario("one module in two Trainers")
def two_trainers(folder):
    module = Task()
    first = fit(module, max_epochs=1)
    half = weights(module)
    check(first, folder)
    second = fit(module, max_epochs=1)
    assert len(list(lp.adapters(module))) == 2
    assert not same(half, weights(module))
    check(second, folder)
    return "goes on from the weights of the first"


@scenario("a copy of the module")
def copied(folder):
    module = Task()
    tuner = fit(module)
    other = copy.deepcopy(module)
    before = weights(module)
    fit(other, max_epochs=1)
    assert same(before, weights(module))
    assert not same(before, weights(other))
    check(tuner, folder)
    return "trains apart"


@scenario("callbacks of the module")
def module_callbacks(folder):
    class Configured(Task):
        def configure_callbacks(self):
            return [strategy(), callbacks.EarlyStopping("val_loss", patience=0, min_delta=9.0)]

    tuner = pl.Trainer(accelerator="cpu", max_epochs=5, enable_checkpointing=False, **QUIET)
    tuner.fit(Configured())
    assert tuner.current_epoch == 2  # stopped early
    check(tuner, folder, Configured)
    return "from configure_callbacks, stopped early"


@scenario("accumulation schedule, max_time, limits")
def limits(folder):
    schedule = callbacks.GradientAccumulationScheduler({0: 1, 1: 4})
    tuner = fit(None, schedule, max_time="00:01:00:00", limit_train_batches=4, limit_val_batches=1)
    assert tuner.global_step == 5
    check(tuner, folder)
    return "4 + 1 steps"


RESULTS = {}


@pytest.fixture(scope="module", autouse=True)
def _table():
    yield
    width = max(map(len, RESULTS), default=0)
    print("\n\nscenario".ljust(width + 3), "| result")
    for name, result in RESULTS.items():
        print(name.ljust(width + 1), "|", result)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCENARIOS]
)
def test_scenario(name, tmp_path):
    RESULTS[name] = SCENARIOS[name](tmp_path)
    assert RESULTS[name]
