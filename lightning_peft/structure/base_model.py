"""``base_modules`` and ``base_parameters``: the modules and parameters of the base model by name, without adapters."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatchcase, translate
from typing import Any

from torch import Tensor, nn

ADAPTERS_ATTRIBUTE = "peft"  # the child of an adapted module below which its adapters live; a base may use it, too


def matches(name: str, pattern: str) -> bool:
    """Return whether a glob matches the end of a dotted name: ``q_proj`` matches ``layers.0.attn.q_proj``."""
    return fnmatchcase("." + name, "*." + pattern)


def matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether one of several globs matches the end of a dotted name; faster than one after the other."""
    return _expression(patterns).match("." + name) is not None


@functools.cache
def _expression(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?s:.*)\.(?:{'|'.join(map(translate, patterns))})")


def is_inside(name: str, module: str) -> bool:
    """Return whether a name is that of a module, or of something inside of it."""
    return name == module or not module or name.startswith(f"{module}.")


def outwards(name: str) -> Iterator[str]:
    """Yield a dotted name and the names of the modules around it, innermost first, without the root."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def name_pattern(name: str) -> str:
    """Return a name with ``*`` in place of numbers, which is the same for one layer in all blocks."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module is a host: its class is the one that runs adapters, whatever its children are called."""
    return hasattr(type(module), "_host_class")


def holds_adapters(module: nn.Module, child: str) -> bool:
    """Return whether the child of this name holds the adapters of a module, and is no part of the base."""
    return child == ADAPTERS_ATTRIBUTE and is_adapted(module)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the base model by name, adapters and the root left out."""
    return {name: module for name, module in _walk(model) if name}


def list_base_modules(model: nn.Module) -> list[Any]:
    """Return the modules of the base, the root included; faster than ``base_modules``, as it builds no names."""
    modules, seen = [model], {id(model)}
    for module in modules:  # the list grows during the loop
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen and not holds_adapters(module, name):
                modules.append(child)
                seen.add(id(child))
    return modules


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the base model by name, adapters left out; a shared one appears once."""
    parameters, seen = dict[str, nn.Parameter](), set[int]()
    for name, module in _walk(model):
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters[f"{name}.{key}" if name else key] = parameter
    return parameters


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the base in the order of ``named_modules``."""
    stack, seen = [("", model)], set[int]()
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        prefix = f"{name}." if name else ""
        for key, child in reversed(list(module._modules.items())):
            if child is not None and not (key == ADAPTERS_ATTRIBUTE and is_adapted(module)):
                stack.append((prefix + key, child))


def base_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the base and its root, a shared module under each of its names."""
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        yield name, module
        prefix = f"{name}." if name else ""
        for key, child in module._modules.items():
            if child is not None and not holds_adapters(module, key):
                stack.append((prefix + key, child))


def adapter_host(model: nn.Module) -> Callable[[str], str | None]:
    """Return a function from the name of a module or tensor to the host of its adapter; None for what is the base's."""
    hosts = {name for name, module in model.named_modules(remove_duplicate=False) if is_adapted(module)}

    def host_of(name: str) -> str | None:
        if ADAPTERS_ATTRIBUTE not in name:
            return None
        words = name.split(".")
        found = (".".join(words[:i]) for i, word in enumerate(words) if word == ADAPTERS_ATTRIBUTE)
        return next((host for host in found if host in hosts), None)

    return host_of


def split_adapter_key(key: str, methods: Collection[str]) -> tuple[str, str, str] | None:
    """Return (host, key of the adapter, tensor) for a key in a file of methods of these names; None for the base's.

    ``inject`` refuses names with which this would not be clear.
    """
    words = key.split(".") if ADAPTERS_ATTRIBUTE in key else []
    for i in range(len(words) - 3, -1, -1):
        if words[i] == ADAPTERS_ATTRIBUTE and any(f"{words[i + 1]}_".startswith(f"{name}_") for name in methods):
            return ".".join(words[:i]), words[i + 1], ".".join(words[i + 2 :])
    return None


def own_tensors(module: nn.Module) -> dict[str, Any]:
    """Return the parameters and buffers registered on the module itself, not on its children; empty ones are None."""
    return {**module._parameters, **module._buffers}


def stored_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter that a module holds; ``get_parameter`` returns what an active adapter puts in its place."""
    owner, _, key = name.rpartition(".")
    parameter = model.get_submodule(owner)._parameters.get(key)
    if parameter is None:
        raise AttributeError(f"{type(model).__name__} has no parameter {name!r}.")
    return parameter


def computed_from(host: nn.Module) -> list[str]:
    """Return the names of the parameters from which a layer computes its weight in each call; empty if it stores it.

    ``torch.nn.utils.parametrizations``, ``weight_norm``, ``spectral_norm`` and ``prune`` make layers compute it.
    """
    if "weight" in own_tensors(host) or not isinstance(getattr(host, "weight", None), Tensor):
        return []
    return [name for name, _ in host.named_parameters() if "weight" in name]


def count_owners(model: nn.Module) -> Counter[int]:
    """Return the number of modules that hold each parameter, by the parameter's id."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
