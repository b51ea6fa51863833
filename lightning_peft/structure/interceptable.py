"""``interceptable``: which attention modules call attention that adapters can change; the others, with the reason."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from .attention_interface import takes_more_keys
from .attention_probe import probe_attention
from .transformers_api import attention_implementation, attention_interface

_INTERFACE = {"get_interface"}
_CALLS = {*_INTERFACE, "ALL_ATTENTION_FUNCTIONS", "scaled_dot_product_attention", "multi_head_attention_forward"}
_CHUNKS = "attends in chunks of neighbouring keys, without one softmax over all keys"
_RECURRENT = "is a recurrence, without a softmax over keys"
_REASONS = {  # by the beginning of a class's name, since these run and would be changed wrongly, or in part
    "Deberta": "adds products with relative positions to its scores (disentangled attention)",
    "DisentangledSelfAttention": "adds products with relative positions to its scores (disentangled attention)",
    "XLNet": "adds products with relative positions to its scores, in two streams",
    "Longformer": _CHUNKS,
    "LEDEncoder": _CHUNKS,
    "LongT5Local": _CHUNKS,
    "LongT5TransientGlobal": _CHUNKS,
    "Reformer": "attends within buckets of hashed keys",
    "LocalSelfAttention": _CHUNKS,
    "LSHSelfAttention": "attends within buckets of hashed keys",
    "BigBirdBlockSparse": "attends to blocks of keys; build the model with attention_type='original_full'",
    "BigBirdPegasusBlockSparse": "attends to blocks of keys; build the model with attention_type='original_full'",
}
_RECURRENCES = (
    *("Mamba", "Rwkv", "GatedDelta", "DeltaAttention", "LinearAttention", "LightningAttention", "ShortConv"),
    *("RecurrentBlock", "Rglru", "LSTM"),
)


def interceptable(model: nn.Module, hosts: Mapping[str, nn.Module], joins: bool) -> dict[str, nn.Module]:
    """Return the attention modules whose attention can be changed; a warning names those that are left out.

    Args:
        model: Model that holds the modules.
        hosts: Attention modules by name.
        joins: Whether keys are added to the calls.

    Raises:
        TypeError: None of them can be changed; the message says why, and what to do.
    """
    reasons = {name: reason for name, host in hosts.items() if (reason := _known_reason(model, name, host, joins))}
    unknown = [name for name, host in hosts.items() if name not in reasons and not _names_attention(model, name)]
    probed = probe_attention(model, unknown) if unknown else {}
    for name in unknown:
        if name in probed and probed[name] is None:
            reasons[name] = "calls no attention function, and computes no softmax of plain scores between two products"
    described = "; ".join(
        f"{name} ({type(hosts[name]).__name__}) {reason}" for name, reason in _by_class(hosts, reasons)
    )
    if reasons and len(reasons) == len(hosts):
        raise TypeError(f"No attention module can be changed: {described}. Choose other targets or another method.")
    if reasons:
        warnings.warn(f"{len(reasons)} of {len(hosts)} attention modules are left out: {described}.", stacklevel=2)
    return {name: host for name, host in hosts.items() if name not in reasons}


def _by_class(hosts: Mapping[str, nn.Module], reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the first name, with its reason, of each class."""
    first: dict[type[nn.Module], tuple[str, str]] = {}
    for name, reason in reasons.items():
        first.setdefault(type(hosts[name]), (name, reason))
    return list(first.values())


def _known_reason(model: nn.Module, name: str, host: nn.Module, joins: bool) -> str | None:
    """Return why attention cannot be changed, as far as names and settings tell; None if they do not."""
    kinds = [cls.__name__ for cls in type(host).__mro__ if cls.__module__.startswith("transformers.")]
    for kind, start in itertools.product(kinds, _REASONS):
        if kind.startswith(start):
            return _REASONS[start]
    if any(word in kind for kind, word in itertools.product(kinds, _RECURRENCES)):
        return _RECURRENT
    implementation = _implementation(model, name)
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
    implementation, parent = attention_implementation(model.get_submodule(name)), name
    while implementation is None and parent:
        parent = parent.rpartition(".")[0]
        implementation = attention_implementation(model.get_submodule(parent))
    return implementation


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
    return frozenset(name for code in codes for name in code.co_names) & _CALLS
