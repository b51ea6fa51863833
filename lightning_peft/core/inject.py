"""``inject`` and ``detach``: an ``InjectionPlan`` is built, checked and applied once; a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..structure.base_model import base_modules, base_parameters
from ..structure.bitsandbytes_api import check_not_repacked, keep_differentiable
from ..structure.selection import select_parameters
from ..structure.structure_of import measure, structure_of
from .active_on_host import activate_here, persistent_keys
from .adapted_module import active_adapters, adapters, attach, method_name, remove, replaced_names
from .check_keys import check_keys_differ, check_names
from .checks import check_host, check_not_paused, check_not_read, check_trainable
from .coverage import warn_of_untouched_blocks
from .detach_hooks import run_detach_hooks
from .fast_path import disable_fast_path, restore_fast_path
from .injection_record import InjectionRecord, get_record, set_record
from .method import Method, as_methods
from .placements import Placement, copies_of, placements_of
from .refuse_saving import refuse_saving
from .shared_hosts import check_shared_host, check_trains_once
from .tensor_parallel import check_tensor_parallel_support, mesh_of, shard_adapters


def inject(
    model: nn.Module,
    method: Method | Sequence[Method],
    also_train: Sequence[str] = (),
    example_inputs: Any = None,
) -> nn.Module:
    """Freeze ``model`` and adapt it in place; nothing is changed if anything is wrong.

    Args:
        model: Any module. Its own parameters keep their names, its layers their types.
        method: One method or several; of two on one host, the later is the outer.
        also_train: Patterns or roles of base modules and parameters that train too, such as a new head.
        example_inputs: Inputs of the model's forward, a tensor, a tuple by position or a dictionary by name, by which
            roles are measured. Models of transformers, and those with an ``example_input_array``, need none.

    Returns:
        The model.

    Raises:
        ValueError: A pattern matches nothing, a setting does not fit a layer, or a name is taken.
        TypeError: A host cannot be adapted; the message says what to do instead.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = lp.inject(model, lp.LoRA(rank=2, targets=["0"]), also_train=["2"])
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.peft.lora.a', '0.peft.lora.b', '2.weight', '2.bias']
    """
    methods = as_methods(method)
    if example_inputs is not None:
        measure(model, example_inputs)
    return InjectionPlan.build(model, methods, also_train).apply()


def add_inactive(model: nn.Module, methods: Sequence[Method], also_train: Sequence[str] = ()) -> nn.Module:
    """Add adapters as a group under the name of the first method; they do nothing until they are activated.

    Parameters of the base that would train become copies, by ``OwnParameters``.
    """
    return InjectionPlan.build(model, methods, also_train, active=False).apply()


def inject_group(model: nn.Module, methods: Sequence[Method]) -> nn.Module:
    """Inject methods that are activated together under the name of the first, as copies of parameters beside it."""
    return InjectionPlan.build(model, methods, (), grouped=True).apply()


def detach(model: nn.Module) -> nn.Module:
    """Remove every adapter, restore classes and ``requires_grad``; base parameters that trained keep their values.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 8)), lp.LoRA(rank=2, targets=["0"]))
        >>> list(lp.detach(model).state_dict())
        ['0.weight', '0.bias']
    """
    check_not_paused(get_record(model) or InjectionRecord())
    for _, host, key, _ in list(adapters(model)):
        remove(host, key)
    for part in model.modules():  # outer before inner, whose records know more of their parameters
        restore_fast_path(part)
        run_detach_hooks(part)
        if (record := get_record(part)) is not None:
            for name, parameter in base_parameters(part).items():
                parameter.requires_grad_(record.required_grad.get(name, True))
            set_record(part, None)
    return model


@dataclass(frozen=True)
class InjectionPlan:
    """All that one injection will do to a model. ``build`` raises for what cannot work, before anything is changed."""

    model: nn.Module
    record: InjectionRecord  # of the model, which ``apply`` extends
    modules: dict[str, nn.Module]  # of the base by name, the root included
    methods: Sequence[Method]  # to add
    also_train: Sequence[str]  # patterns of base parameters
    placements: list[Placement]  # adapters with their hosts, inner before outer
    trained: set[str]  # names of base parameters that will train because of this injection
    active: bool  # whether the adapters are active from now on
    grouped: bool  # whether the methods form a group under the name of the first

    @classmethod
    def build(
        cls,
        model: nn.Module,
        methods: Sequence[Method],
        also_train: Sequence[str],
        active: bool = True,
        grouped: bool = False,
    ) -> InjectionPlan:
        """Return a checked plan."""
        modules = {"": model, **base_modules(model)}
        record = get_record(model)
        if record is None:
            record = InjectionRecord(required_grad={n: p.requires_grad for n, p in base_parameters(model).items()})
        check_not_paused(record)
        placements, trained = list[Placement](), set[str]()
        for method in methods:
            placements += placements_of(model, modules, method)
            trained.update(method.parameters(model))
        trained.update(select_parameters(model, also_train))
        trained -= replaced_names((placement.name, placement.adapter) for placement in placements)
        if trained and not active:
            copies, more = copies_of(model, modules, methods[0].name, trained)
            methods, placements, trained = [*methods, copies], placements + more, set()
        grouped = grouped or (not active and len(methods) > 1)
        plan = cls(model, record, modules, methods, also_train, placements, trained, active, grouped)
        plan.check()
        return plan

    def check(self) -> None:
        """Raise for what cannot work."""
        check_names([method.name for method in [*self.record.methods, *self.methods]], self.modules)
        check_not_repacked(self.modules)
        split, read = self._mesh() is not None, structure_of(self.model).names.get("read", ())
        placed = []
        for name, host, key, adapter in self.placements:
            if not adapter.replaces:
                check_not_read(host, name, read)
            check_host(host, name, key, adapter)
            if split:
                check_tensor_parallel_support(host, name, key, adapter)
            placed.append((name, adapter))
        for name in sorted(self.trained | replaced_names(placed)):
            check_trainable(self.model, name)
        check_keys_differ(self.placements)
        check_shared_host((list(active_adapters(self.model)) if self.active else []) + placed)
        if self.active and not self.grouped:
            check_trains_once(self.model, self.record, self.trained, placed)
        if not self.placements and not self.trained:
            raise ValueError("Nothing would train: the methods add no adapter and choose no parameter.")

    def apply(self) -> nn.Module:
        """Freeze the base but for what trains, and attach the adapters."""
        by_default = not self.active or self.record.local.sets_default()
        names = [method.name for method in (self.methods[:1] if self.grouped else self.methods)] if self.active else []
        active = (*self.record.active, *names)
        placed = [(method_name(key, adapter), name) for name, _, key, adapter in self.placements]
        self.record.add(self.methods, placed, names if by_default else (), self.grouped)
        self.record.add_trained(self.also_train if self.active else (), self.trained)  # else copies train
        set_record(self.model, self.record)
        trained = set(self.record.trained)
        for name, parameter in base_parameters(self.model).items():
            parameter.requires_grad_(name in trained)
        orders = self._attach(by_default)
        if not by_default:
            activate_here(active, orders, self.record.local)
        if (mesh := self._mesh()) is not None:
            shard_adapters(self.model, mesh)
        disable_fast_path(self.modules.values())
        keep_differentiable(self.modules.values())
        refuse_saving(self.model)
        warn_of_untouched_blocks(self.model, self.methods, [placement.name for placement in self.placements])
        return self.model

    def _attach(self, by_default: bool) -> list[tuple[Any, tuple[str, ...]]]:
        """Attach the adapters; return the hosts of the model with the keys of what is active with them."""
        orders = {id(host): (host, persistent_keys(host)) for _, host, *_ in adapters(self.model)}
        for _, host, key, adapter in self.placements:
            if not self.active:
                adapter.requires_grad_(False)
            attach(host, key, adapter, self.active and by_default, self.record.local)
            orders[id(host)] = host, (*orders.get(id(host), (host, ()))[1], key)
        return list(orders.values())

    def _mesh(self) -> DeviceMesh | None:
        """Return the mesh of tensor parallelism, which needs a process group."""
        return mesh_of(self.model) if dist.is_available() and dist.is_initialized() else None
