"""``row_adapters`` lets each row of one batch use another adapter, while the base runs once for all rows."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..core.active_adapters import trained_by
from ..core.active_on_host import inactive
from ..core.adapted_module import AdaptedModule, method_name
from ..core.adapter import Adapter, Call
from ..core.checks import check_not_paused
from ..core.injection_record import methods_named, require_record
from ..core.per_row import BatchableAdapter, BatchableLayerAdapter
from ..structure.base_model import list_base_modules
from ..structure.read_weights import read_weight_attribute
from .row_dispatch import BatchedLayerCall, BatchedModuleCall, RowAssignment


class RowAdapters(Adapter):
    """Runs a host with another adapter n(r) for each row r: y_r = post_forward_n(r)(x_r, host(pre_forward_n(r)(x_r))).

    Args:
        batched_calls: For each projection of the host, the adapters of all rows; inner before outer.
    """

    persistent = False

    def __init__(self, batched_calls: Sequence[BatchedLayerCall | BatchedModuleCall]) -> None:
        super().__init__()
        self.batched_calls = batched_calls

    def reset_parameters(self) -> None:
        """Do nothing: the adapters in the calls have all parameters."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        for batched_call in self.batched_calls:
            inner = functools.partial(batched_call, host, inner)
        return inner(*args, **kwargs)


@contextmanager
def row_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Context in which each row of a batch uses the adapter named for it, in training, inference and generation.

    Equal to running each row with its adapter alone. The base runs once for all rows. On linear layers, LoRA, AdaLoRA,
    IA3 and bottlenecks are stacked by rows, anew in each call, so that the cost grows with rows and not with adapters;
    others, and LoRA while it drops inputs, run one after the other on their rows; so do layers whose parameters an
    adapter replaces. Which adapters are active does not matter, but inactive ones do not train: ``activate`` those that
    shall. A call with more rows than names takes each name for as many neighbours, as beams and returned sequences are.
    The batch is the first dimension.

    The names hold in the thread and asyncio task that enter the context, so that requests can be served side by side,
    and where backward computes a part under gradient checkpointing again, after the context has ended, too.

    Prompts can differ by row as well where all rows have one, and all are of one length.

    Args:
        model: A model with adapters that act on the input and output of one layer or feed-forward block: LoRA, AdaLoRA,
            FedPara, KronA, IA3, ``Bottleneck``, ``ParallelAdapter``, ``KronABlock``, and an adapter's copies of
            parameters, such as heads; or with prompts for one task each: ``PromptTuning``, ``PTuning`` without a
            template, ``MultitaskPromptTuning``.
        names: The adapter's name for each row; None for the base alone.

    Raises:
        ValueError: A name is unknown, or there is none, some rows alone have prompts, or a module takes (tokens, batch,
            features).
        TypeError: An adapter acts on more than that, as prefixes do, or on a weight that is read and never called.
        RuntimeError: Adapters are disabled, or each row has one already.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> for task in ("billing", "complaints"):
        ...     _ = lp.add_adapter(model, lp.LoRA(rank=2, init="orthogonal", targets=["0"]), name=task)
        >>> x = torch.ones(3, 16)  # three equal rows
        >>> with lp.row_adapters(model, ["billing", "complaints", None]):
        ...     y = model(x)
        >>> [bool((row == y[0]).all()) for row in y]
        [True, False, False]
    """
    modules = list_base_modules(model)
    rows = [(host, RowAdapters(batched_calls)) for host, batched_calls in _plan(model, modules, names)]
    hosts = (module for module in modules if isinstance(module, AdaptedModule))
    with inactive(hosts, rows, require_record(model).local):
        yield


def _plan(
    model: nn.Module, modules: Sequence[nn.Module], names: Sequence[str | None]
) -> list[tuple[Any, list[BatchedLayerCall | BatchedModuleCall]]]:
    """Return hosts with their batched calls, inner before outer."""
    record = require_record(model)
    check_not_paused(record)
    if isinstance(names, str) or not names:
        raise ValueError(f"row_adapters needs a list of names, one for each row of the batch, got {names!r}.")
    used = dict[str, str]()  # the name in `names` for each method's name
    for name in dict.fromkeys(name for name in names if name is not None):
        methods = methods_named(record, name)
        used |= {method.name: name for method in methods}
        if record.trained and (trained := trained_by(model, methods)):
            raise TypeError(f"{name!r} trains {trained[0]} in the base itself, which all rows share.")
    device = next(model.parameters()).device
    plan: list[tuple[Any, list[BatchedLayerCall | BatchedModuleCall]]] = []
    assign = functools.cache(lambda at_host: RowAssignment(_numbers(at_host, names), device))  # most hosts share one
    for module in modules:
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and not module.batch_first:
            raise ValueError(
                f"{_name_of(model, module)} takes (tokens, batch, features); row_adapters needs batch_first=True."
            )
        if isinstance(module, AdaptedModule) and (groups := _group_by_projection(model, module, used)):
            plan.append((module, [_batched_call(list(by_name.values()), assign(tuple(by_name))) for by_name in groups]))
    return plan


def _batched_call(adapters: list[Any], rows: RowAssignment) -> BatchedLayerCall | BatchedModuleCall:
    by_layer = {isinstance(adapter, BatchableLayerAdapter) for adapter in adapters}
    if len(by_layer) > 1:
        kinds = " and ".join(sorted({type(adapter).__name__ for adapter in adapters}))
        raise TypeError(f"Rows of one batch cannot have {kinds} around one module.")
    return BatchedLayerCall(adapters, rows) if by_layer == {True} else BatchedModuleCall(adapters, rows)


def _group_by_projection(model: nn.Module, host: Any, used: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the adapters by name for each projection of a host, copies of its parameters before all others."""
    groups: dict[str | None, dict[str, Any]] = {}
    is_read = read_weight_attribute(type(host)) is not None
    for key, adapter in host.peft.items():
        if name := used.get(method_name(key, adapter)):
            if is_read or not isinstance(adapter, BatchableAdapter):
                raise TypeError(
                    f"{key!r} at {_name_of(model, host)} is a {type(adapter).__name__} on a {type(host).__name__}; "
                    f"rows can have different adapters only where these act row by row on a called layer."
                )
            # Copies of all names are one group, whatever their methods are called: they split the rows between them.
            group = groups.setdefault(None if adapter.needs_separate_call else key[len(name) :], {})
            if name in group:
                raise TypeError(
                    f"{name!r} has copies of parameters of {_name_of(model, host)} by two methods; use one."
                )
            group[name] = adapter
    return sorted(groups.values(), key=lambda group: not any(adapter.needs_separate_call for adapter in group.values()))


def _name_of(model: nn.Module, searched: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is searched), "")


def _numbers(names_at_host: Iterable[str], names: Sequence[str | None]) -> tuple[int, ...]:
    """Return the number of each row's adapter among those of a host, -1 where it has none."""
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names_at_host)}
    return tuple(numbers.get(name, -1) for name in names)
