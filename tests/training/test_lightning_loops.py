"""The private parts of Lightning's loops and loaders that exact resuming trusts are there in the installed release."""

import inspect

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loops import evaluation_loop, fit_loop, training_epoch_loop
from torch.utils.data import DataLoader
from trainer_models import trainer

from lightning_peft.training import lightning_loaders as loaders
from lightning_peft.training import lightning_loops as loops

ATTRIBUTES = {
    "": "epoch_progress _combined_loader _combined_loader_states_to_load _data_fetcher _data_source _restart_stage "
    "_restarting _resuming_from_checkpoint _last_train_dl_reload_epoch restarted_mid_epoch",
    "epoch_loop": "done batch_progress _restart_stage _batches_that_stepped restarting _num_ready_batches_reached "
    "_should_check_val_fx _should_accumulate _get_monitor_value update_lr_schedulers",
    "epoch_loop.val_loop": "batch_progress _restart_stage restarting _data_source",
}


@pytest.mark.parametrize("loop", ATTRIBUTES)
def test_a_loop_has_what_resuming_reads_and_sets(loop):
    found = trainer().fit_loop
    for name in filter(None, loop.split(".")):
        found = getattr(found, name)
    assert [name for name in ATTRIBUTES[loop].split() if not hasattr(found, name)] == []


def test_stages_of_a_restart_have_the_names_that_are_set():
    """Else a resumed epoch validates twice or not at all."""
    assert fit_loop.RestartStage.NONE == "none"
    assert training_epoch_loop.RestartStage.RESTARTED_ON_LAST == "restarted_on_last"
    assert evaluation_loop.RestartStage.RESTARTED_MID_EVALUATION == "restarted_mid_evaluation"


def test_lightning_iterates_loaders_where_it_is_expected():
    """Else random states are restored before or after the epoch's order is drawn."""
    assert "iter(self._data_fetcher)" in inspect.getsource(fit_loop._FitLoop.setup_data)
    source = inspect.getsource(training_epoch_loop._TrainingEpochLoop.on_run_start)
    assert "self.trainer.current_epoch > 0 and not self.trainer.fit_loop.is_resuming and not self.restarting" in source
    assert "_request_dataloader(source)" in inspect.getsource(fit_loop._FitLoop.setup_data)


class Noted:
    """Notes what it is told."""

    def __init__(self):
        self.calls = []

    def open(self, combined, original):
        self.calls.append("open")
        with loaders.iterating_over(combined, [["a", "b"]]):
            return original()

    def fetch(self, original):
        self.calls.append("fetch")
        return original()

    def close(self):
        self.calls.append("close")


def test_a_combined_loader_tells_its_watch_and_stays_of_its_class():
    run, train, validation = trainer(), Noted(), Noted()
    own = pl.utilities.CombinedLoader(DataLoader([1, 2, 3]), "min_size")
    run.fit_loop._data_source.instance = own
    loaders.watch_loaders(run, train, validation)
    combined = run.fit_loop._data_source.dataloader()
    assert combined is own
    assert isinstance(combined, pl.utilities.CombinedLoader)
    assert [batch for batch, *_ in combined] == ["a", "b"]
    assert loaders.has_length(combined)
    assert isinstance(combined.flattened[0], DataLoader)
    combined.reset()
    assert train.calls == ["open", "fetch", "fetch", "fetch", "close"]
    run.fit_loop._combined_loader = combined
    loaders.unwatch_loaders(run)
    assert type(own) is pl.utilities.CombinedLoader
    assert "dataloader" not in vars(run.fit_loop._data_source)
    assert validation.calls == []


def test_a_cycle_of_loaders_is_counted_on():
    combined = pl.utilities.CombinedLoader({"a": [1, 2], "b": [3]}, "max_size_cycle")
    iter(combined)
    loaders.set_consumed(combined, [False, True], 5)
    assert loaders.consumed(combined) == [False, True]
    assert next(combined)[1] == 5


def test_a_trainer_that_has_not_begun_stands_between_epochs():
    assert loops.position(trainer()) == ("between epochs", 0, True)
    assert loops.reload_epoch(trainer()) < 0
