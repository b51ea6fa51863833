"""Batches in an order that a checkpoint inside an epoch remembers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_peft.tasks.table_data import Example


class ResumableLoader(DataLoader[Example]):
    """A DataLoader that goes on after the batches that a checkpoint has seen, in the order that was drawn for them.

    The order comes from torch's global generator, as a DataLoader's does; that generator itself, from which later
    orders and whatever else is random come, ``PEFTStrategy`` brings back.
    """

    given = 0  # batches of this pass
    drawn: torch.Tensor | None = None  # the generator's state before their order was drawn
    resumed = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Give the batches, after a checkpoint the rest of them; nothing is drawn before the first is asked for."""
        if self.drawn is not None and self.resumed and self.given < len(self):
            batches = self._rest(self.drawn)
        else:  # after the last batch a Trainer asks for the finished pass, but takes nothing of it
            self.given, self.drawn = 0, torch.get_rng_state()
            batches = super().__iter__()
        self.resumed = False
        for batch in batches:
            self.given += 1
            yield batch

    def _rest(self, drawn: torch.Tensor) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(drawn)
            batches = super().__iter__()
            for _ in range(self.given):
                next(batches)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """How many batches of this pass were given, and from what their order was drawn."""
        return {"given": self.given, "drawn": self.drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after these batches.

        Args:
            state_dict: As `state_dict` returned it.
        """
        self.given, self.drawn, self.resumed = state_dict["given"], state_dict["drawn"], True
