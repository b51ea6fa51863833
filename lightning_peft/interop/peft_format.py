"""What a family of adapters is called here and there: the correspondence that its file states."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Method

State = dict[str, Tensor]
# Settings of no effect on what a trained adapter computes.
_COMMON = frozenset(
    ("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version")
)


@dataclass(frozen=True)
class Base:
    """A base model as both sides see it.

    Args:
        model: The whole model.
        name: Name of the network within it that the other side knows.
        network: That network; names in files are relative to it.
    """

    model: nn.Module
    name: str
    network: nn.Module


@dataclass(frozen=True)
class File:
    """What a folder holds.

    Args:
        config: Settings by name.
        state: Tensors by host's name and by what the family calls them.
    """

    config: Mapping[str, Any]
    state: Mapping[str, State]

    def get(self, setting: str, default: Any) -> Any:
        """Return a setting; the default where it is missing or empty."""
        value = self.config.get(setting)
        return default if value is None else value


class Refused(ValueError):
    """What the other side cannot express."""


class PeftFormat(ABC):
    """How adapters of one kind are written by HF PEFT."""

    kind: str  # what the file calls it
    method: type[Method]
    tensors: tuple[str, ...]  # ends of keys, behind the host's name
    settings: tuple[str, ...] = ()  # that are read
    ignored_settings: tuple[str, ...] = ()  # that have no effect on what a trained adapter computes
    prefix = "base_model.model."  # of all keys
    by_task = False  # whether adapters work through what HF PEFT does for a task

    @property
    def name(self) -> str:
        """The name that methods have unless they are given one."""
        return next(str(field.default) for field in dataclasses.fields(self.method) if field.name == "name")

    @abstractmethod
    def write(self, base: Base, method: Any, hosts: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], State]:
        """Return settings and tensors of one method's adapters, by host's name; ``Refused`` says why not."""

    @abstractmethod
    def read(self, base: Base, file: File, name: str) -> Iterator[tuple[Method, Mapping[str, State]]]:
        """Yield methods and, by host's name, what their adapters' ``import_state`` takes."""

    def expected(self, base: Base, file: File) -> Iterator[str]:
        """Yield the names of hosts that the settings ask for."""
        return iter(())

    def pair_of(self, config: Mapping[str, Any], host: str, own: State) -> tuple[Tensor, Tensor] | None:
        """Return A (rank, in) and B (out, rank), if the update of a host is B A, from what a file holds of it."""
        return None

    def unknown(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings in use that this package knows nothing of."""
        known = {*_COMMON, *self.settings, *self.ignored_settings}
        return {key: value for key, value in config.items() if key not in known and not _is_empty(value)}


def _is_empty(value: object) -> bool:
    return value is None or value is False or value in ({}, [], "", "none")


def check_supported(condition: bool, what: str, why: str) -> None:
    """Raise ``Refused`` where something cannot be expressed."""
    if condition:
        raise Refused(f"{what} cannot be exchanged with HF PEFT: {why}.")


def check_not_torch_attention(adapter: Adapter, host: str) -> None:
    """Refuse an adapter of a host that the other side adapts otherwise."""
    layer = getattr(adapter, "layer", None)
    read = layer is not None and layer.weight_read_by_parent
    check_supported(
        read, host, "torch's attention reads its weight, which HF PEFT stores for all of the attention at once"
    )
