"""``ExactResume``: what a checkpoint holds beside weights and optimizer, so that training resumes exactly."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from .. import lightning_loaders as loaders
from .. import lightning_loops as loops
from .differences import differences, settings
from .older_checkpoints import as_current, is_older
from .packing import pack, unpack
from .random_state import global_state, set_global_state
from .watched_loader import TrainWatch, ValidationWatch


class ExactResume:
    """Saves where training stands, and has a resumed fit go on there.

    A place in an epoch is the state of all random generators before the epoch's loaders were iterated, and the number
    of batches since. When training resumes, the loaders are iterated anew from that state, what was seen is left out,
    and the generators are set to where they were when the checkpoint was written, right before the next batch.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._callback: pl.Callback | None = None
        self._loaded: dict[str, Any] | None = None  # from a checkpoint, until training has resumed from it
        self._waiting: dict[str, Any] | None = None  # states of generators, until training goes on to draw from them
        self._fits = False
        self._step = 0  # optimizer steps before the batch in work
        self._train = TrainWatch(self._is_awaited, self._before_fetch)
        self._validation = ValidationWatch(self._before_validation)

    def attach(self, trainer: pl.Trainer, callback: pl.Callback, stage: str) -> None:
        """Follow the loaders of a Trainer's fit, before ``configure_optimizers`` may ask for them."""
        if stage == "fit":
            self._trainer, self._callback = trainer, callback
            loaders.watch_loaders(trainer, self._train, self._validation)

    @staticmethod
    def reopen_epoch(checkpoint: dict[str, Any], state_dict: dict[str, Any]) -> None:
        """Have Lightning go on in an epoch that was cut short, as the same run with a later limit does."""
        if (state_dict.get("position") or [None])[0] == "stopped":
            loops.reopen_epoch(checkpoint)

    def start_fit(self) -> None:
        """Set the global generators, for what draws before training goes on."""
        self._fits = True
        self._restore_global()

    def start_training(self, trainer: pl.Trainer) -> None:
        """Go on where the loaded checkpoint was written."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or not self._train.loaders:
            return
        state = {**_of_rank(loaded["ranks"]), "loader_states": loaded.get("loader_states")}
        at = loops.position(trainer) if loaded["position"] is None else loops.Position(*loaded["position"])
        if loaded["position"] is not None:
            loops.set_reload_epoch(trainer, loaded["reloaded"])
            loops.keep_monitored(trainer, loaded["monitored"])
            for sentence in differences(loaded, settings(self._train.loaders)):
                warnings.warn(sentence, stacklevel=2)
        self._validation.set_running(state["validation_workers"])
        self._go_on(trainer, at, state)
        self._waiting = state

    def restore(self) -> None:
        """Set the generators that wait, once training goes on: a hook that drew before has left no trace."""
        state, self._waiting = self._waiting, None
        if state is not None:
            if state["random"] is not None:
                set_global_state(state["random"])
            self._train.set_generators(state["generators"])

    def end_fit(self) -> None:
        """Let go of the Trainer; a checkpoint that is loaded from now on is not resumed at once."""
        self._fits = False
        if self._trainer is not None:
            loaders.unwatch_loaders(self._trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return where training stands in all processes; all of them have to call it."""
        if self._loaded is not None:
            return self._loaded  # nothing was trained since
        at = loops.Position("between epochs", 0, True) if self._trainer is None else loops.position(self._trainer)
        first = at.phase == "between epochs" and self._trainer is not None and self._trainer.current_epoch == 0
        inside = first or at.phase not in ("between epochs", "epoch end")
        state = {
            **self._random_states(at.phase),
            "loaders": self._train.states(),
            "place": self._train.place(at.batches) if inside else None,
            "validation_workers": self._validation.running(),
        }
        ahead = self._train.loader_states(at.batches) if inside else None
        return {"ranks": _gathered(pack(state)), "position": list(at), "loader_states": ahead, **self._settings(at)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        self._loaded = as_current(state_dict) if is_older(state_dict) else state_dict
        if self._fits:  # strategies that shard load after on_fit_start
            self._restore_global()

    def _is_awaited(self) -> bool:
        """Whether this callback will open the loaders; a learning-rate finder trains without it."""
        callbacks: list[Any] = getattr(self._trainer, "callbacks", [])
        return self._loaded is not None and any(callback is self._callback for callback in callbacks)

    def _before_fetch(self) -> None:
        self.restore()
        self._step = 0 if self._trainer is None else self._trainer.global_step

    def _before_validation(self) -> None:
        if self._trainer is not None and self._trainer.validating:  # Lightning also opens what it then leaves out
            self.restore()

    def _random_states(self, phase: str) -> dict[str, Any]:
        """Return the states from which training goes on: those of now, or from before what is done again."""
        generators = [state["generators"] for state in self._train.states()]
        if phase == "step" and (before := self._train.before_step()) is not None:
            return before
        if phase == "validation" and self._validation.start is not None:
            return {"random": self._validation.start, "generators": generators}
        return {"random": global_state(), "generators": generators}

    def _settings(self, at: loops.Position) -> dict[str, Any]:
        if self._trainer is None:
            return {"accumulated": 0, "stepped": False, "reloaded": -1, "monitored": {}, **settings([])}
        return {
            "accumulated": 0 if at.is_last else at.batches % self._trainer.accumulate_grad_batches,
            "stepped": at.phase == "step" and self._trainer.global_step > self._step,
            "reloaded": loops.reload_epoch(self._trainer),
            "monitored": {} if at.phase == "validation" else loops.monitored(self._trainer),  # asking ends an average
            **settings(self._train.loaders),
        }

    def _restore_global(self) -> None:
        if self._loaded is not None and (random := _of_rank(self._loaded["ranks"])["random"]) is not None:
            set_global_state(random)

    def _go_on(self, trainer: pl.Trainer, at: loops.Position, state: dict[str, Any]) -> None:
        if at.phase == "epoch end" or (at.phase == "between epochs" and trainer.current_epoch > 0):
            self._end_passes(trainer, state)
            loops.start_next_epoch(trainer, at.phase == "epoch end")
        elif at.phase == "between epochs":  # the first epoch, whose loaders Lightning iterates before it starts
            self._waiting = state if state["place"] is None else None
            self.restore()
            self._open_at(trainer, at, state)
            loops.start_next_epoch(trainer, False)
        elif at.is_last:
            self._end_passes(trainer, state)
            loops.continue_epoch(trainer, at)
        else:
            self._open_at(trainer, at, state)
            loops.continue_epoch(trainer, at)

    def _open_at(self, trainer: pl.Trainer, at: loops.Position, state: dict[str, Any]) -> None:
        loaders.load_loader_states(trainer, state["loader_states"])
        self._train.begin_at(state["place"], at.batches)
        loaders.reopen_loaders(trainer)

    def _end_passes(self, trainer: pl.Trainer, state: dict[str, Any]) -> None:
        """Bring the loaders to the end of their passes, from which the next ones follow."""
        loaders.load_loader_states(trainer, None)
        self._train.finish()  # what resumes by itself begins the pass that has ended
        loaders.reopen_loaders(trainer)
        self._train.end_passes(state["loaders"])


def _of_rank(ranks: list[Any]) -> dict[str, Any]:
    """Return the state of this process; of another number of processes none fits."""
    count, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if len(ranks) != count:
        return {"random": None, "generators": [], "loaders": [], "place": None, "validation_workers": []}
    state: dict[str, Any] = unpack(ranks[rank])
    return state


def _gathered(packed: Any) -> list[Any]:
    if not dist.is_initialized():
        return [packed]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, packed)
    return ranks
