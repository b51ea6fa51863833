"""``ResumableLoader``: a DataLoader that continues inside an epoch, in the order that the checkpoint saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_peft.tasks.table_data import Example


class ResumableLoader(DataLoader[Example]):
    """A DataLoader that continues after the batches that a checkpoint has seen, in the order that was drawn for them.

    The order comes from torch's global generator, as a DataLoader's does; that generator itself, from which later
    orders and whatever else is random come, ``PEFTStrategy`` brings back.
    """

    num_yielded = 0  # batches of this pass
    rng_state: torch.Tensor | None = None  # the generator's state before their order was drawn
    resumed = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches, after a checkpoint the rest of them; the order is drawn when the first is asked for."""
        if self.rng_state is not None and self.resumed and self.num_yielded < len(self):
            batches = self._rest(self.rng_state)
        else:  # after the last batch a Trainer asks for the finished pass, but takes nothing of it
            self.num_yielded, self.rng_state = 0, torch.get_rng_state()
            batches = super().__iter__()
        self.resumed = False
        for batch in batches:
            self.num_yielded += 1
            yield batch

    def _rest(self, rng_state: torch.Tensor) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(rng_state)
            batches = super().__iter__()
            for _ in range(self.num_yielded):
                next(batches)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The number of yielded batches of this pass, and the generator's state before their order was drawn."""
        return {"given": self.num_yielded, "drawn": self.rng_state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after these batches.

        Args:
            state_dict: As `state_dict` returned it.
        """
        self.num_yielded, self.rng_state, self.resumed = state_dict["given"], state_dict["drawn"], True
