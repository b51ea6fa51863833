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


def set_class_names(model: nn.Module, names: Iterable[object]) -> bool:
    """Name the classes of the one classifier of transformers in a model; return whether it has so many classes."""
    config, by_number = _config_of_classifier(model), dict(enumerate(map(str, names)))
    if config is None or len(config.id2label) != len(by_number):
        return False
    config.id2label, config.label2id = by_number, {name: number for number, name in by_number.items()}
    return True


def _config_of_classifier(model: nn.Module) -> Any:
    networks = [net for _, net in outermost_pretrained(model) if "Classification" in type(net).__name__]
    labels = [from_config(net, "id2label") for net in networks]
    return networks[0].config if len(networks) == 1 and isinstance(labels[0], dict) else None
