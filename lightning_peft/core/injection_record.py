"""``InjectionRecord``: the methods injected into a model and their state, changed only by its methods; and queries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from .active_set import LocalActiveSet
from .adapted_module import adapters, method_name
from .adapter import Adapter
from .fingerprint import Merged
from .method import Method

_RECORD = "_peft_injection"


@dataclass
class InjectionRecord:
    """Record of an injection; it lives on the model that was given to ``inject``. Only its methods change it.

    Invariants, which hold between any two calls of public functions:

    * Method names are unique. Every adapter in the model belongs to one method: its key on the host is the method's
      name and, where it serves a part, a suffix.
    * ``default`` lists names of methods or of groups, inner before outer, that are active in threads and tasks which
      have activated nothing themselves. Their adapters are those in the ``peft_order`` of their hosts, unless merged.
      ``local`` has what a thread or task has activated itself; ``active`` are the names that count where it is read.
    * ``method_groups`` maps a name to the names of several methods that are added, activated and saved together; the
      first of them has the group's name.
    * ``trained`` are the names of parameters of the base that train. They, and the parameters of adapters that are
      active by default, are exactly those with ``requires_grad``, which a parameter has for all threads.
    * The record that ``around`` returns shares ``methods``, ``default``, ``local`` and ``method_groups`` with the inner
      record, so these are changed in place.
    * ``required_grad`` remembers ``requires_grad`` of each parameter of the base before the injection, for ``detach``.

    Args:
        methods: Methods in the order in which they were injected.
        placed: Names of the hosts of each method's adapters, by the method's name, as they were at injection.
        also_train: Patterns that were given to ``inject``.
        trained: Names of base parameters that train, in the model's order.
        required_grad: ``requires_grad`` of base parameters before the injection.
        default: Names of the methods and groups that are active by default.
        local: What threads and tasks have activated for themselves; the hosts share it.
        method_groups: Names of methods by the name of their group.
        merged: Fingerprints while adapters are merged into the base's weights, else None.
        untrained: Whether no adapter was trained or loaded yet.
        shows_base: Whether ``state_dict()`` includes the frozen base although a hook leaves it out.
    """

    methods: list[Method] = field(default_factory=list)
    placed: dict[str, list[str]] = field(default_factory=dict)
    also_train: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    required_grad: dict[str, bool] = field(default_factory=dict)
    default: list[str] = field(default_factory=list)
    local: LocalActiveSet = field(default_factory=LocalActiveSet)
    method_groups: dict[str, list[str]] = field(default_factory=dict)
    merged: Merged | None = None
    untrained: bool = True
    shows_base: bool = False

    @classmethod
    def around(cls, inner: Sequence[InjectionRecord], base: Mapping[str, nn.Parameter]) -> InjectionRecord:
        """Return the record of a module that holds adapted modules; with one of them it shares what can be switched.

        Args:
            inner: Records of the adapted modules.
            base: Parameters of the base by their name in the outer module.
        """
        shared = inner[0] if len(inner) == 1 else None
        return cls(
            methods=shared.methods if shared else [method for record in inner for method in record.methods],
            placed=shared.placed if shared else {name: hosts for r in inner for name, hosts in r.placed.items()},
            default=shared.default if shared else [name for record in inner for name in record.default],
            local=shared.local if shared else LocalActiveSet(),
            method_groups=shared.method_groups if shared else {k: v for r in inner for k, v in r.method_groups.items()},
            also_train=[pattern for record in inner for pattern in record.also_train],
            trained=[name for name, parameter in base.items() if parameter.requires_grad],
            required_grad={name: parameter.requires_grad for name, parameter in base.items()},
        )

    @property
    def active(self) -> list[str]:
        """Names of the methods and groups that are active in this thread and task, whether it is paused or not."""
        chosen = self.local.get()
        return self.default if chosen is None or chosen.names is None else list(chosen.names)

    @property
    def paused(self) -> bool:
        """Whether this thread and task is inside of ``disabled`` or ``row_adapters``."""
        chosen = self.local.get()
        return chosen is not None and chosen.paused

    @property
    def switched(self) -> bool:
        """Whether adapters are inactive, were put into another order, or share a group's name."""
        return bool(self.method_groups) or self.active != [method.name for method in self.methods]

    def add(
        self, methods: Sequence[Method], placed: Iterable[tuple[str, str]], default: Sequence[str], grouped: bool
    ) -> None:
        """Add methods that were injected together, and the names of those active by default."""
        self.methods += methods
        for method, host in placed:
            self.placed.setdefault(method, []).append(host)
        self.default += default
        if grouped:
            self.method_groups[methods[0].name] = [method.name for method in methods]

    def add_trained(self, also_train: Sequence[str], trained: set[str]) -> None:
        """Add parameters of the base that train, and the patterns that chose them."""
        self.also_train += also_train
        self.trained = [name for name in self.required_grad if name in trained or name in self.trained]

    def remove(self, name: str) -> None:
        """Remove the methods of a name or group."""
        removed = methods_named(self, name)
        self.methods[:] = [method for method in self.methods if method not in removed]
        for method in removed:
            self.placed.pop(method.name, None)
        self.method_groups.pop(name, None)
        self.default[:] = [active for active in self.default if active != name]

    def _members(self, name: str) -> list[Method]:
        return [method for method in self.methods if method.name in self.method_groups.get(name, [name])]

    def set_default(self, names: Sequence[str]) -> None:
        """Set the names of the methods and groups that are active by default, inner before outer."""
        self.default[:] = names

    def restore(self, methods: Sequence[Method], method_groups: Mapping[str, Sequence[str]]) -> None:
        """Set the methods, in their order, and the groups to those that a file describes."""
        self.methods[:] = methods
        self.method_groups.clear()
        self.method_groups.update({name: list(names) for name, names in method_groups.items()})

    def finalize(self) -> None:
        """Replace each method by the one of its finalized adapters; see ``Method.finalized``."""
        self.methods[:] = [method.finalized() for method in self.methods]

    def mark_trained(self) -> None:
        """Record that adapters were trained or loaded."""
        self.untrained = False

    def set_merged(self, merged: Merged | None) -> None:
        """Record that active adapters were merged into the base's weights; None records that they were unmerged."""
        self.merged = merged
        self.local.merged = None if merged is None else tuple(self.active)

    @contextmanager
    def show_base(self) -> Iterator[None]:
        """Context in which ``state_dict()`` includes the frozen base."""
        before, self.shows_base = self.shows_base, True
        try:
            yield
        finally:
            self.shows_base = before


def get_record(model: nn.Module) -> InjectionRecord | None:
    """Return the record on this module; None if nothing was injected into it."""
    return model.__dict__.get(_RECORD)


def set_record(model: nn.Module, record: InjectionRecord | None) -> None:
    """Set the record of a module, or remove it."""
    if record is None:
        model.__dict__.pop(_RECORD, None)
    else:
        model.__dict__[_RECORD] = record


def require_record(model: nn.Module) -> InjectionRecord:
    """Return the record on this module; raise a ``ValueError`` if nothing was injected into it."""
    if (record := get_record(model)) is None:
        raise ValueError(f"Nothing was injected into this {type(model).__name__}; pass the module given to inject.")
    return record


def methods_named(record: InjectionRecord, name: str) -> list[Method]:
    """Return the methods of a name or group; raise a ``ValueError`` if the model has no such name."""
    members = {member for names in record.method_groups.values() for member in names[1:]}
    names = [method.name for method in record.methods if method.name not in members]
    if name not in names:
        raise ValueError(f"This model has no adapter named {name!r}; it has {', '.join(map(repr, names))}.")
    return record._members(name)


def adapters_of(model: nn.Module, *methods: Method) -> dict[str, Adapter]:
    """Return the adapters of methods by the name of their host, with the part of a fused host appended."""
    names = {method.name for method in methods}
    return {
        f"{name}.{adapter.part}" if adapter.part else name: adapter
        for name, _, key, adapter in adapters(model)
        if method_name(key, adapter) in names
    }
