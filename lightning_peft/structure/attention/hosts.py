"""``attention_hosts``: attention modules that call attention which adapters can change; the others, with the reason."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..base_model import base_modules, outwards
from ..pattern_errors import LISTING
from ..roles import ROLES
from ..selection import select_modules
from ..transformers_api import attention_implementation, attention_interface
from .batched_products import PRODUCTS
from .interface import reach_interface, takes_more_keys
from .probe import probe_attention

_INTERFACE = {"get_interface"}
_CALLS = {*_INTERFACE, "ALL_ATTENTION_FUNCTIONS", "scaled_dot_product_attention", "multi_head_attention_forward"}
_WRITTEN_OUT = {*PRODUCTS, "softmax", "einsum"}  # in the code of modules that compute attention themselves
_CHUNKS = "attends in chunks of neighbouring keys, without one softmax over all keys"
_RECURRENT = "is a recurrence, without a softmax over keys"
_DISENTANGLED = "adds products with relative positions to its scores (disentangled attention)"
_SPARSE = "attends to blocks of keys; build the model with attention_type='original_full'"
_REASONS = {  # by what the name of a class begins with, since these run and would be changed wrongly, or in part
    **dict.fromkeys(("DisentangledSelfAttention", "DebertaAttention", "DebertaV2Attention"), _DISENTANGLED),
    "XLNetRelativeAttention": "adds products with relative positions to its scores, in two streams",
    **dict.fromkeys(("LongformerSelfAttention", "LongformerAttention", "LEDEncoder"), _CHUNKS),
    **dict.fromkeys(("LongT5Local", "LongT5TransientGlobal", "LocalSelfAttention"), _CHUNKS),
    "LSHSelfAttention": "attends within buckets of hashed keys",
    **dict.fromkeys(("BigBirdBlockSparse", "BigBirdPegasusBlockSparse"), _SPARSE),
}
_RECURRENCES = (  # parts of names
    *("MambaMixer", "Mamba2Mixer", "MambaLayer", "RwkvSelfAttention", "GatedDeltaNet", "DeltaAttention", "ShortConv"),
    *("LinearAttention", "LightningAttention", "RecurrentBlock", "Rglru", "xLSTMLayer"),
)


def attention_hosts(
    model: nn.Module, targets: Sequence[str], exclude: Sequence[str], joins: bool
) -> dict[str, nn.Module]:
    """Return the targeted attention modules whose attention can be changed; a warning names those that are left out.

    Args:
        model: Model that holds the modules.
        targets: Globs of attention modules, or roles.
        exclude: Globs of modules to leave out.
        joins: Whether keys are added to the calls.

    Raises:
        ValueError: A target matches nothing.
        TypeError: None of them can be changed; the message says why, and what to do.
    """
    reach_interface()  # before anything is compiled, since functions that change during a trace are no graph
    try:
        hosts = select_modules(model, targets, exclude)
    except ValueError:
        kinds = base_modules(model) if "attention" in targets and not ROLES["attention"](model) else {}
        reasons = {name: reason for name, module in kinds.items() if (reason := _reason_by_class(module))}
        if reasons:
            raise TypeError(_refusal(kinds, reasons)) from None
        raise
    reasons = _reasons(model, hosts, joins)
    if reasons and len(reasons) == len(hosts):
        raise TypeError(_refusal(hosts, reasons))
    if reasons:
        counts = f"{len(reasons)} of {len(hosts)} attention modules are left out"
        warnings.warn(f"{counts}: {_described(hosts, reasons)}.", stacklevel=2)
    return {name: host for name, host in hosts.items() if name not in reasons}


def _reasons(model: nn.Module, hosts: Mapping[str, nn.Module], joins: bool) -> dict[str, str]:
    """Return why attention cannot be changed, by the names of the modules where that is so."""
    reasons = {
        name: reason
        for name, host in hosts.items()
        if (reason := _reason_by_class(host) or _reason_by_implementation(_implementation(model, name), joins))
    }
    unknown = [name for name in hosts if name not in reasons and not _names_attention(model, name)]
    probed = probe_attention(model, unknown) if unknown else {}
    for name in unknown:
        if name in probed and probed[name] is None:
            reasons[name] = "calls no attention function, and computes no softmax of plain scores between two products"
    return reasons


def _refusal(hosts: Mapping[str, nn.Module], reasons: Mapping[str, str]) -> str:
    described = _described(hosts, reasons)
    return f"No attention module can be changed: {described}. Choose other targets or another method. {LISTING}"


def _described(hosts: Mapping[str, nn.Module], reasons: Mapping[str, str]) -> str:
    """Return the first name of each class with its reason."""
    first: dict[type[nn.Module], str] = {}
    for name, reason in reasons.items():
        first.setdefault(type(hosts[name]), f"{name} ({type(hosts[name]).__name__}) {reason}")
    return "; ".join(first.values())


def _reason_by_class(host: nn.Module) -> str | None:
    """Return why attention cannot be changed, as far as a class of transformers tells by its name."""
    kinds = [cls.__name__ for cls in type(host).__mro__ if cls.__module__.startswith("transformers.")]
    for kind, start in itertools.product(kinds, _REASONS):
        if kind.startswith(start):
            return _REASONS[start]
    return _RECURRENT if any(word in kind for kind, word in itertools.product(kinds, _RECURRENCES)) else None


def _reason_by_implementation(implementation: str | None, joins: bool) -> str | None:
    """Return why attention cannot be changed, as far as the configuration tells."""
    if implementation in (None, "sdpa", "eager"):
        return None
    if attention_interface() is None:
        return (
            f"uses attn_implementation={implementation!r}, which transformers before release 5 calls out of reach; "
            f"load the model with attn_implementation='sdpa'"
        )
    if joins and not takes_more_keys(implementation):
        return (
            f"uses attn_implementation={implementation!r}, whose windows, packed rows and cache would be wrong with "
            f"added keys; load the model with attn_implementation='sdpa', 'eager' or 'flex_attention'"
        )
    return None


def _implementation(model: nn.Module, name: str) -> str | None:
    """Return the attention implementation of a module, by its configuration or the nearest one around it."""
    found = (attention_implementation(model.get_submodule(module)) for module in (*outwards(name), ""))
    return next((implementation for implementation in found if implementation is not None), None)


def _names_attention(model: nn.Module, name: str) -> bool:
    """Return whether the code of a module, or of one inside of it, names an attention function that it reaches."""
    names = set[str]()
    for module in model.get_submodule(name).modules():
        if isinstance(module, nn.MultiheadAttention):
            return True
        cls: Any = type(module)
        names |= _names_in_code(cls)
    # Under other implementations, modules may write attention out, as all do before transformers 5.
    reached = _CALLS if _implementation(model, name) in (None, "sdpa") else _INTERFACE
    return not names.isdisjoint(reached)


@functools.cache
def _names_in_code(cls: Any) -> frozenset[str]:
    """Return those of the attention functions that the methods of a class name."""
    bases = [base for base in cls.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    methods = {name: f for base in reversed(bases) for name, f in vars(base).items() if callable(f)}
    functions = [inspect.unwrap(f) for f in methods.values()]
    codes = [f.__code__ for f in functions if inspect.isfunction(f)]
    return frozenset(name for code in codes for name in code.co_names) & (_CALLS | _WRITTEN_OUT)


def asks_interface(host: nn.Module) -> bool:
    """Return whether an attention module reaches attention through transformers' interface, and in no other way.

    It is read from the code of the classes of the module and of those inside of it.
    """
    if attention_interface() is None:
        return False
    names = set[str]()
    for module in (host, *base_modules(host).values()):
        cls: Any = type(module)
        names |= _names_in_code(cls)
    return "get_interface" in names and names <= {*_INTERFACE, "ALL_ATTENTION_FUNCTIONS"}
