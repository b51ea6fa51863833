"""``as_current``: the random states of checkpoints that earlier versions of this package wrote."""

from __future__ import annotations

import warnings
from typing import Any

from .packing import pack


def is_older(state: dict[str, Any]) -> bool:
    """Whether an earlier version wrote a state: one of torch and Python alone."""
    return "ranks" not in state


def as_current(state: dict[str, Any]) -> dict[str, Any]:
    """Return such a state in today's form, and say what is not exact; Lightning says where in the epoch it was."""
    inside = bool(state.get("mid_epoch"))
    lost = "the order of a shuffled epoch is drawn anew, so rows of this epoch may come twice or not at all"
    warnings.warn(
        "The checkpoint was written by an earlier version of lightning_peft and holds no states of numpy's generator "
        f"and of loaders' own{', and not what drew the order of its epoch: ' + lost if inside else ''}. Weights, "
        "optimizer, dropout and the number of batches are exact; what is saved from now on resumes exactly.",
        stacklevel=4,
    )
    ranks: list[dict[str, Any]] = [
        {
            "random": {
                "python": [each["python"][0], list(each["python"][1]), each["python"][2]],
                "torch": each["torch"].cpu().numpy().tobytes().hex(),
                "cuda": None if each["cuda"] is None else each["cuda"].cpu().numpy().tobytes().hex(),
            },
            "generators": [],
            "loaders": [],
            "place": None,
            "validation_workers": [],
        }
        for each in state.get("states", [])
    ]
    return {"ranks": [pack(each) for each in ranks], "position": None}
