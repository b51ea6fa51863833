"""``PeftFormat``: how HF PEFT writes the adapters of one method; a file for each method subclasses it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import Method

StateDict = dict[str, Tensor]
# Settings that do not change what a trained adapter computes.
COMMON_SETTINGS = frozenset(
    ("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version")
)


@dataclass(frozen=True)
class Base:
    """A base model, and the module in it that HF PEFT knows.

    Args:
        model: The whole model.
        name: Name of the network within it that HF PEFT knows; empty for the model itself.
        network: That network; names in files are relative to it.
    """

    model: nn.Module
    name: str
    network: nn.Module


@dataclass(frozen=True)
class PeftFile:
    """The content of a HF PEFT folder.

    Args:
        config: Settings by name.
        state: Tensors by host's name and by their names in the format.
    """

    config: Mapping[str, Any]
    state: Mapping[str, StateDict]

    def get(self, setting: str, default: Any) -> Any:
        """Return a setting; the default where it is missing or empty."""
        value = self.config.get(setting)
        return default if value is None else value


class NotExpressible(ValueError):
    """HF PEFT cannot express an adapter, or this package cannot."""


class PeftFormat(ABC):
    """How HF PEFT writes the adapters of one method."""

    kind: str  # the file's peft_type
    method: type[Method]
    tensors: tuple[str, ...]  # ends of keys, behind the host's name
    settings: tuple[str, ...] = ()  # settings that are read
    ignored_settings: tuple[str, ...] = ()  # settings that do not change what a trained adapter computes
    prefix = "base_model.model."  # of all keys
    holds_tokens = False  # whether its files can hold rows of tokens beside the adapters
    by_task = False  # whether adapters need the model class that HF PEFT has for a task

    @property
    def name(self) -> str:
        """Default name of the method."""
        return next(str(field.default) for field in dataclasses.fields(self.method) if field.name == "name")

    @abstractmethod
    def to_peft(self, base: Base, method: Any, hosts: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], StateDict]:
        """Return settings and tensors of one method's adapters, by host's name; ``NotExpressible`` says why not."""

    @abstractmethod
    def from_peft(self, base: Base, file: PeftFile, name: str) -> Iterator[tuple[Method, Mapping[str, StateDict]]]:
        """Yield methods and, by host's name, what their adapters' ``import_state`` takes."""

    def expected(self, base: Base, file: PeftFile) -> Iterator[str]:
        """Yield the names of hosts that the settings ask for."""
        return iter(())

    def pair_of(self, config: Mapping[str, Any], host: str, tensors: StateDict) -> tuple[Tensor, Tensor] | None:
        """Return A (rank, in) and B (out, rank), if the update of a host is B A, from what a file holds of it."""
        return None

    def unknown(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings that are set and that this package does not know."""
        known_settings = {*COMMON_SETTINGS, *self.settings, *self.ignored_settings}
        return {key: value for key, value in config.items() if key not in known_settings and not _is_empty(value)}


def _is_empty(value: object) -> bool:
    return value is None or value is False or value in ({}, [], "", "none")


def check_supported(unsupported: bool, subject: str, reason: str) -> None:
    """Raise ``NotExpressible`` if ``unsupported``, saying that the subject cannot be exchanged, and why."""
    if unsupported:
        raise NotExpressible(f"{subject} cannot be exchanged with HF PEFT: {reason}.")


def check_not_torch_attention(adapter: Adapter, host: str) -> None:
    """Refuse an adapter inside of torch's attention, which HF PEFT adapts as a whole."""
    layer = getattr(adapter, "layer", None)
    is_read = layer is not None and layer.weight_read_by_parent
    check_supported(
        is_read, host, "torch's attention reads its weight, which HF PEFT stores for all of the attention at once"
    )


def check_convolution(host: nn.Module, name: str, groups: bool = True, dilation: bool = True) -> None:
    """Refuse a convolution that HF PEFT's adapter does not follow; hosts of other types pass.

    Args:
        host: Layer.
        name: Its name, for the message.
        groups: Whether the adapter has the groups of its host.
        dilation: Whether it has its dilation.
    """
    if not isinstance(host, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return
    subject = f"An update of {name}"
    check_supported(not groups and host.groups > 1, subject, "its convolution has groups, which it splits otherwise")
    dilated = any(step > 1 and size > 1 for step, size in zip(host.dilation, host.kernel_size, strict=True))
    check_supported(not dilation and dilated, subject, "its convolution is dilated, and its adapter would not be")
    pads = host.padding_mode != "zeros" and (isinstance(host.padding, str) or any(host.padding))
    check_supported(pads, subject, f"its convolution pads by {host.padding_mode}, and its adapter would by zeros")
