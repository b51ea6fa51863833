"""``Method``: a frozen dataclass that is both the user's configuration and the factory of adapters."""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .adapter import Adapter
from .setting_types import check_types


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Recipe for fine-tuning. It holds settings only; all state is in the adapters, so that checkpoints contain it.

    Args:
        name: Name of the adapters on their hosts, and in files.

    Examples:
        >>> from dataclasses import dataclass
        >>> class Shift(lp.Adapter):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.shift = nn.Parameter(torch.zeros(1))
        ...
        ...     def reset_parameters(self):
        ...         nn.init.zeros_(self.shift)
        ...
        ...     def forward(self, host, inner, x):
        ...         return inner(x) + self.shift
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Shifts(lp.Method):
        ...     name: str = "shift"
        ...
        ...     def adapters(self, model):
        ...         return [("0", Shift())]
        >>> lp.summary(lp.inject(nn.Sequential(nn.Linear(16, 8)), Shifts())).trainable
        1
    """

    name: str

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        """Yield (host's dotted name, adapter) for all adapters of a model, which may share tensors."""
        return ()

    def parameters(self, model: nn.Module) -> Iterable[str]:
        """Yield names of base parameters that train as well."""
        return ()

    def finalized(self) -> Method:
        """Return the method of the same adapters once they are finalized; see ``Adapter.finalize``."""
        return self

    def check_run(self, total_steps: int) -> None:
        """Raise if a run of so many optimizer steps (-1: unknown) cannot work; called before the first one."""

    def penalty(self, adapters: Sequence[Adapter]) -> Tensor | None:
        """Return a term of the training objective; its gradient is added before each optimizer step."""
        return None

    def after_step(self, adapters: Sequence[Adapter], step: int, total_steps: int) -> None:
        """Run after optimizer step ``step`` (from 1) of ``total_steps`` (-1: unknown), before gradients are zeroed."""

    def pair_of(self, host: str, packed: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return A (rank, in) and B (out, rank) if the update of a host is B A, from its tensors in an adapter file."""
        return None

    def metrics(self, adapters: Mapping[str, Adapter]) -> Mapping[str, Tensor]:
        """Return scalars worth logging, of adapters by host name."""
        return {}


def to_dict(method: Method) -> dict[str, Any]:
    """Return a method as plain data: its class name and its fields."""
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {"method": type(method).__name__, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}


def from_dict(data: Mapping[str, Any]) -> Method:
    """Return the method that ``to_dict`` described.

    Only classes that the program has imported are found; a file never causes an import.

    Raises:
        ValueError: No such method is known, or it does not take these fields, or not these values.
    """
    fields = dict(data)
    name = fields.pop("method", None)
    classes = methods_by_name()
    if not isinstance(name, str) or name not in classes:
        raise ValueError(
            f"Method {name!r} is not known here. Files hold the name of a class and no code: import the module that "
            f"defines {name} first (import my_module). Known: {', '.join(classes)}."
        )
    check_types(classes[name], fields)
    try:
        return classes[name](**fields)
    except TypeError as error:
        raise ValueError(
            f"The stored settings do not fit {name}: {error}. A newer version may have written them."
        ) from error


def methods_by_name() -> dict[str, type[Method]]:
    """Return the classes of all methods that the program has imported."""
    return {cls.__name__: cls for cls in _subclasses(Method)}


def as_methods(method: Any) -> list[Method]:
    """Return one method or several as a list; a ``TypeError`` if something among them is no method."""
    given: list[Any] = (
        [method] if isinstance(method, (str, Method)) or not isinstance(method, Iterable) else list(method)
    )
    for one in [method] if isinstance(method, type) else given:
        if isinstance(one, type):
            raise TypeError(f"{one.__name__} is a class; write {one.__name__}().")
        if not isinstance(one, Method):
            raise TypeError(f"method must be a Method such as LoRA(rank=8), or a list of them, got {method!r}.")
    return given


def _subclasses(cls: type[Method]) -> Iterator[type[Method]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def check_setting(condition: bool, field: str, value: object, expected: str) -> None:
    """Raise a ``ValueError`` that says what was given and what was expected, unless the condition holds.

    Examples:
        >>> from lightning_peft.core import check_setting
        >>> check_setting(False, "rank", -1, "a positive whole number")
        Traceback (most recent call last):
        ValueError: rank must be a positive whole number, got -1.
    """
    if not condition:
        raise ValueError(f"{field} must be {expected}, got {value!r}.")
