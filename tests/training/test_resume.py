"""A run that is resumed anywhere goes on with the same rows, random numbers and weights."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from resume_cases import KINDS, ROWS, SETTINGS, NoisyRows, Rows, Task, fit, loader, outcome, saving, seeded
from torch.utils.data import DataLoader, IterableDataset
from trainer_models import data, module, trainer

import lightning_peft as lp

QUICK = ["shuffled", "two loaders"]
pytestmark = pytest.mark.filterwarnings("ignore:Length of IterableDataset")


def resumed(folder, kind, reads):
    """Return what each continuation of a run over a kind of loader comes to, by where the run stopped."""
    settings = SETTINGS.get(kind, {})
    whole = fit(KINDS[kind], reads, *saving(folder), **settings)
    steps = len(whole.seen) // 3
    stops = {"step=2": 2, f"step={steps}": steps, "end-epoch=0": steps, f"step={steps + 2}": steps + 2}
    stops["end-epoch=1"] = 2 * steps
    found = {}
    for stop, done in stops.items():
        again = fit(KINDS[kind], reads, path=folder / f"{stop}.ckpt", seed=99, **settings)
        found[stop] = outcome(whole, again, done)
    return dict(zip(("inside", "last batch", "end", "in the second", "its end"), found.values(), strict=True))


@pytest.mark.parametrize("kind", QUICK)
def test_a_sample_resumes_with_the_same_rows_and_weights(kind, tmp_path):
    found = resumed(tmp_path, kind, reads=QUICK.index(kind) % 2 == 0)
    assert {stop: what for stop, what in found.items() if what != "equal"} == {}


@pytest.mark.slow
def test_every_loader_resumes_with_the_same_rows_and_weights_wherever_it_stopped(tmp_path, capsys):
    """Run with ``-s`` to see the matrix."""
    pairs = [(i, kind, reads) for i, kind in enumerate(KINDS) for reads in (0, 1)]
    pairs = [pair for pair in pairs if "workers" not in pair[1] or pair[0] % 2 == pair[2]]  # they take longest
    found = {(kind, reads): resumed(tmp_path / f"{i}{reads}", kind, reads) for i, kind, reads in pairs}
    with capsys.disabled():
        print(f"\n{'loader':38} reads the schedule  inside | last batch | end | in the second | its end")
        for (kind, reads), cells in found.items():
            print(f"{kind:38} {('no', 'yes')[reads]:18} {' | '.join(cells.values())}")
    assert len(KINDS) >= 14
    assert {(*key, stop): what for key, cells in found.items() for stop, what in cells.items() if what != "equal"} == {}


class SaveEverywhere(pl.Callback):
    """Saves at each hook; a file's name says how many batches were trained."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def save(self, name, run, module):
        self.count += 1
        if not run.sanity_checking:
            run.save_checkpoint(self.folder / f"{self.count} {name} {len(module.seen)}.ckpt")

    def on_train_epoch_start(self, run, module):
        self.save("epoch start", run, module)

    def on_train_batch_start(self, run, module, *_):
        self.save("batch start", run, module)

    def on_train_batch_end(self, run, module, *_):
        self.save("batch end", run, module)

    def on_validation_batch_end(self, run, module, *_):
        self.save("validation batch", run, module)

    def on_validation_end(self, run, module):
        self.save("validation end", run, module)

    def on_train_epoch_end(self, run, module):
        self.save("epoch end", run, module)


class Drawing(Task):
    """Draws random numbers in its hooks."""

    def draw(self, *_):
        torch.rand(3)

    on_fit_start = on_train_start = on_train_epoch_start = on_validation_start = on_validation_epoch_end = draw


class Plateau(Task):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def validation():
    return DataLoader(Rows(8), 4)


RUNS = {
    "validation": {"valid": True},
    "validation inside epochs": {"valid": True, "val_check_interval": 2, "num_sanity_val_steps": 2},
    "validation across epochs": {"valid": True, "val_check_interval": 4, "check_val_every_n_epoch": None},
    "fewer batches": {"limit_train_batches": 4, "valid": True},
    "until a step": {"max_steps": 15, "epochs": None, "valid": True},
    "hooks that draw": {"task": Drawing, "valid": True, "val_check_interval": 3},
    "a plateau": {"task": Plateau, "valid": True},
    "loaders made anew in each second epoch": {"reload_dataloaders_every_n_epochs": 2},
}


def every_stop(folder, kind, reads, run, only=""):
    """Return by which continuation of a run what differs, and how many continuations there were."""

    def once(*callbacks, **more):
        settings = {**run, "valid": validation()} if run.get("valid") else run
        return fit(KINDS[kind], reads, *callbacks, **settings, **more)

    folder.mkdir()
    whole = once(SaveEverywhere(folder))
    files = [path for path in sorted(folder.glob("*.ckpt")) if only in path.name]
    found = {f.name: outcome(whole, once(path=f, seed=99), int(f.stem.split()[-1])) for f in files}
    return {name: what for name, what in found.items() if what != "equal"}, len(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_of_any_hook_resumes_with_the_same_rows_and_weights(name, tmp_path):
    kind, reads = ("iterable", False) if list(RUNS).index(name) % 2 else ("shuffled", True)
    differ, count = every_stop(tmp_path / kind, kind, reads, RUNS[name])
    assert count >= 35
    assert differ == {}


@pytest.mark.slow
def test_a_checkpoint_within_validation_resumes_with_the_same_rows_and_weights(tmp_path):
    differ, count = every_stop(tmp_path / "x", "shuffled", False, {**RUNS["validation"], "epochs": 2}, "validation")
    assert count == 6
    assert differ == {}


def test_nothing_is_loaded_again_where_a_sampler_can_be_advanced(tmp_path):
    fit(KINDS["shuffled"], False, *saving(tmp_path), epochs=1)
    rows = Rows()
    again = fit(lambda: DataLoader(rows, 4, shuffle=True), path=tmp_path / "step=4.ckpt", epochs=1)
    assert len(again.seen) == 2
    assert rows.loaded == 8


class Stop(pl.Callback):
    """Stops early, after some batches of the second epoch."""

    def on_train_batch_end(self, run, module, *_):
        run.should_stop = len(module.seen) == 8


CUTS = {
    "steps in the first epoch": (2, {"max_steps": 2}),
    "steps late in the first epoch": (5, {"max_steps": 5}),
    "steps": (8, {"max_steps": 8}),
    "steps at an epoch's end": (6, {"max_steps": 6}),
    "stopping early": (8, {}),
}


def continuations(folder, kind, cut, settings):
    """Return what goes on from a run that was cut short comes to, by where the checkpoint was written."""
    done, limit = CUTS[cut]
    whole = fit(KINDS[kind], True, **{**settings, "max_steps": 17})
    ends = [SaveEverywhere(folder), *([] if limit else [Stop()])]
    short = fit(KINDS[kind], True, *ends, **{"max_steps": 17, **settings, **limit})
    assert len(short.seen) == done
    short.trainer.save_checkpoint(folder / f"after {done}.ckpt")
    files = [*folder.glob(f"* epoch end {done}.ckpt"), folder / f"after {done}.ckpt"]
    assert len(files) == 2
    again = [fit(KINDS[kind], True, path=path, seed=99, **{**settings, "max_steps": 17}) for path in files]
    return [outcome(whole, each, done) for each in again]


@pytest.mark.parametrize("cut", ["steps", *(pytest.param(n, marks=pytest.mark.slow) for n in CUTS if n != "steps")])
def test_an_epoch_that_was_cut_short_goes_on(cut, tmp_path):
    assert continuations(tmp_path, "shuffled", cut, {}) == ["equal"] * 2


@pytest.mark.slow
def test_an_epoch_of_any_loader_that_was_cut_short_goes_on(tmp_path):
    checks = {"": {}, "validation": {"valid": validation(), "val_check_interval": 2}}
    found = {
        (kind, check, cut): continuations(tmp_path / f"{kind} {check} {cut}", kind, cut, settings)
        for kind in ("iterable", "own state_dict", "two loaders", "a dict of loaders", "shuffled, 2 persistent workers")
        for check, settings in checks.items()
        for cut in ("steps in the first epoch", "steps late in the first epoch")
    }
    assert found == dict.fromkeys(found, ["equal"] * 2)


@pytest.mark.slow
def test_two_accumulated_batches_resume_after_their_step(tmp_path):
    whole = fit(KINDS["shuffled"], True, *saving(tmp_path), accumulate_grad_batches=2)
    again = fit(KINDS["shuffled"], True, path=tmp_path / "step=4.ckpt", accumulate_grad_batches=2, seed=99)
    assert outcome(whole, again, 8) == "equal"
    assert len(again.seen) == 10


class Unlike(IterableDataset):
    """Yields other rows each time that it is made."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.first = 100 * self.made

    def __iter__(self):
        return ({"row": self.first + i, "x": torch.full((6,), float(self.first + i))} for i in range(ROWS))


SAID = {
    "an iterable dataset that is not deterministic": (
        lambda: DataLoader(Unlike(), 4),
        {},
        "returned another batch 2 than",
    ),
    "fewer rows": (lambda: DataLoader([Rows()[0]] * 4, 4), {}, "batches of the train loader was 6 .* and is 1 now"),
    "another batch size": (loader(batch_size=3), {}, "batch_size of the train loader was 4 .* and is 3 now"),
    "another number of workers": (loader(num_workers=1), {}, "num_workers of the train loader was 0 .* is 1 now"),
}


@pytest.mark.filterwarnings("ignore:This run does not go on exactly")  # another batch size has several consequences
@pytest.mark.parametrize(
    "change", [next(iter(SAID)), *(pytest.param(n, marks=pytest.mark.slow) for n in list(SAID)[1:])]
)
def test_what_is_not_exact_is_said(change, tmp_path):
    make, settings, words = SAID[change]
    fit(make if "iterable" in change else loader(), False, *saving(tmp_path), epochs=1, **settings)
    with pytest.warns(UserWarning, match=words):
        fit(make, False, path=tmp_path / "step=2.ckpt", epochs=2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
@pytest.mark.parametrize("random", [True, False])
def test_rows_that_workers_draw_are_said(workers, random, tmp_path):
    make = loader(NoisyRows if random else Rows, shuffle=True, **workers)
    whole = fit(make, False, *saving(tmp_path), epochs=2)
    for stop, done in (("step=2", 2), ("step=8", 8)):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            again = fit(make, False, path=tmp_path / f"{stop}.ckpt", epochs=2)
        said = ["workers draw random numbers for their rows" in str(each.message) for each in found]
        assert any(said) == random, stop
        assert again.seen == whole.seen[done:]


class SaveHalfway(pl.Callback):
    """Saves between two optimizer steps, and within one."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, run, module, *_):
        run.save_checkpoint(self.folder / f"{len(module.seen)}.ckpt")

    def on_before_zero_grad(self, run, module, optimizer):
        run.save_checkpoint(self.folder / f"within {len(module.seen)}.ckpt")


@pytest.mark.slow
def test_gradients_that_are_not_in_a_checkpoint_are_said(tmp_path):
    fit(loader(), False, SaveHalfway(tmp_path), epochs=1, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="holds no gradients of the 1 batches since the last"):
        fit(loader(), False, path=tmp_path / "3.ckpt", epochs=1, accumulate_grad_batches=2)
    with warnings.catch_warnings(record=True) as found:
        fit(loader(), False, path=tmp_path / "4.ckpt", epochs=1, accumulate_grad_batches=2)
    assert [str(each.message) for each in found if "go on exactly" in str(each.message)] == []


@pytest.mark.slow
def test_another_number_of_processes_is_said(tmp_path):
    fit(loader(), False, *saving(tmp_path), epochs=1)
    change(tmp_path / "step=2.ckpt", lambda state: {**state, "processes": 2, "ranks": state["ranks"] * 2})
    with pytest.warns(UserWarning, match="was written by 2 processes and is resumed by 1"):
        again = fit(loader(), False, path=tmp_path / "step=2.ckpt", epochs=1)
    assert len(again.seen) == 4


def change(path, edit):
    """Edit the state of where training stands in a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    own = checkpoint["callbacks"]["PEFTStrategy"]
    found = edit(own.pop("resume"))
    own |= found if "states" in found else {"resume": found}
    torch.save(checkpoint, path)


def earlier(inside):
    """Return what turns a state into one of version 0.1, which knew the generators of Python and torch alone."""
    generator = seeded(3).get_state()
    python = (3, tuple([1] * 624 + [624]), None)
    return lambda state: {"states": [{"python": python, "torch": generator, "cuda": None}], "mid_epoch": inside}


@pytest.mark.parametrize(
    ("stop", "inside", "words"),
    [("step=2", True, "rows of this epoch"), pytest.param("end-epoch=0", False, "", marks=pytest.mark.slow)],
)
def test_a_checkpoint_of_an_earlier_version_resumes_and_says_what_is_not_exact(stop, inside, words, tmp_path):
    whole = fit(loader(), False, *saving(tmp_path), epochs=2)
    change(tmp_path / f"{stop}.ckpt", earlier(inside))
    with pytest.warns(UserWarning, match=f"written by an earlier version of lightning_peft.*{words}"):
        again = fit(loader(), False, path=tmp_path / f"{stop}.ckpt", epochs=2)
    assert again.seen == whole.seen[2 if inside else 6 :]  # nothing is shuffled here, so rows are exact


def test_the_state_is_small_and_holds_no_pickled_class(tmp_path):
    fit(KINDS["two loaders"], True, *saving(tmp_path), epochs=1)
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"]["PEFTStrategy"]["resume"]
    assert [rank.dtype for rank in state["ranks"]] == [torch.uint8]
    assert 1_000 < state["ranks"][0].numel() < 16_000


@pytest.mark.slow
def test_the_ranks_of_adalora_resume_in_the_middle_of_an_epoch(tmp_path):
    method = lp.AdaLoRA(
        targets=["net.0", "net.3"], initial_rank=2, target_rank=1, warmup_steps=2, final_steps=4, interval=1
    )
    whole = fit(KINDS["shuffled"], True, *saving(tmp_path), method=method)
    for stop, done in (("step=4", 4), ("end-epoch=0", 6), ("step=9", 9)):
        again = fit(KINDS["shuffled"], True, path=tmp_path / f"{stop}.ckpt", seed=99, method=method)
        assert outcome(whole, again, done) == "equal", stop


GATES = lp.LLaMAAdapter(length=2, layers=2, gate_warmup_steps=5)
HEAVY = {
    "gates in their warm-up": ("llama", GATES, {"frozen_mode": "train"}),
    "a cache of what is frozen": ("bert", lp.LastLayers(count=1), {"cache_frozen": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
def test_what_else_counts_steps_resumes_in_the_middle_of_an_epoch(name, tmp_path):
    model, method, settings = HEAVY[name]

    def run(*callbacks, path=None):
        pl.seed_everything(7 if path is None else 99, verbose=False)
        net, strategy = module(model), lp.PEFTStrategy(method, show_summary=False, **settings)
        trainer(strategy, *callbacks, epochs=3).fit(net, data(shuffle=True), ckpt_path=path)
        return net.state_dict()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory|Be aware that when using|.*in the cache of")
        whole = run(*saving(tmp_path))
        for stop in ("step=3", "step=6", "end-epoch=0"):
            again = run(path=tmp_path / f"{stop}.ckpt")
            assert whole.keys() == again.keys()
            assert [name for name, value in whole.items() if not torch.equal(value, again[name])] == [], stop
