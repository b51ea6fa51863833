"""``differences``: what has changed since a checkpoint was written, so that training cannot go on exactly."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def settings(loaders: list[Any]) -> dict[str, Any]:
    """Return what the rows and steps of a run depend on, beside its data and random numbers."""
    return {
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "loaders": [_loader_settings(loader) for loader in loaders],
    }


def differences(loaded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a sentence for each reason why a resumed run is not exact.

    Args:
        loaded: The state that was saved, with the ``settings`` of then.
        now: The ``settings`` of this run.
    """
    found = []
    if loaded["processes"] != now["processes"]:
        found.append(
            f"the checkpoint was written by {loaded['processes']} processes and is resumed by {now['processes']}, "
            f"which share rows and draw random numbers in another way"
        )
    if loaded["loaders"] and len(loaded["loaders"]) != len(now["loaders"]):  # none before training, as a finder saves
        found.append(f"there were {len(loaded['loaders'])} train loaders, and there are {len(now['loaders'])} now")
    for old, new in zip(loaded["loaders"], now["loaders"], strict=False):
        found += [
            f"{name} of the train loader was {old[name]} when the checkpoint was written and is {new[name]} now, {why}"
            for name, why in _WHY.items()
            if old[name] != new[name]
        ]
        if not new["in_order"] and new["num_workers"] > 1:
            found.append("the train loader has in_order=False, so that batches come in the order in which workers end")
    if loaded["stepped"]:
        found.append(
            "the checkpoint was written within a training step, after the optimizer's, and the step is done again"
        )
    if loaded["accumulated"]:
        found.append(
            f"the checkpoint was written between two optimizer steps, and holds no gradients of the "
            f"{loaded['accumulated']} batches since the last"
        )
    return [f"This run does not go on exactly: {sentence}." for sentence in found]


_WHY = {
    "batch_size": "so that batches hold other rows",
    "num_workers": "so that workers draw other random numbers, or share an iterable dataset in another way",
    "batches": "so that the epoch has another length",
}


def _loader_settings(loader: Any) -> dict[str, Any]:
    try:
        batches = len(loader)
    except (TypeError, NotImplementedError):
        batches = None
    return {
        "batch_size": getattr(loader, "batch_size", None),
        "num_workers": getattr(loader, "num_workers", 0),
        "batches": batches,
        "in_order": getattr(loader, "in_order", True),
    }
