"""``class_names`` and ``set_class_names``: the names of classes in the configuration of a transformers classifier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .transformers_api import from_config, outermost_pretrained


def class_names(model: nn.Module) -> list[str] | None:
    """Return the names of the classes of the one classifier of transformers in a model, by number.

    None where there is no such classifier, or it has only the names that transformers gives (``LABEL_0``).
    """
    config = _config_of_classifier(model)
    if config is None:
        return None
    by_number = {int(number): str(name) for number, name in config.id2label.items()}
    if sorted(by_number) != list(range(len(by_number))) or by_number == {n: f"LABEL_{n}" for n in by_number}:
        return None
    return [by_number[number] for number in range(len(by_number))]


def set_class_names(model: nn.Module, names: Iterable[object]) -> None:
    """Give the one classifier of transformers in a model the names of its classes; others have no place for names.

    Raises:
        ValueError: It has another number of classes.
    """
    config, by_number = _config_of_classifier(model), dict(enumerate(map(str, names)))
    if config is None:
        return
    if len(config.id2label) != len(by_number):
        shown = ", ".join(list(by_number.values())[:5])
        raise ValueError(
            f"There are names of {len(by_number)} classes ({shown}), and the network has {len(config.id2label)}. Build "
            f"it with num_labels={len(by_number)}."
        )
    config.id2label, config.label2id = by_number, {name: number for number, name in by_number.items()}


def _config_of_classifier(model: nn.Module) -> Any:
    networks = [net for _, net in outermost_pretrained(model) if "Classification" in type(net).__name__]
    labels = [from_config(net, "id2label") for net in networks]
    return networks[0].config if len(networks) == 1 and isinstance(labels[0], dict) else None
