"""``bare_copy``: a copy of a module on which neither hooks nor adapters act."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..base_model import holds_adapters
from ..transformers_api import HAS_HOOKS

_LEFT_OUT = ("forward", "_trainer", HAS_HOOKS)  # of instances: what replaces a call, or leads to other objects


def bare_copy(module: Any, memo: dict[int, Any], computed: Mapping[str, nn.Parameter] | None = None) -> Any:
    """Return a deep copy of a module, of the class that it has without adapters.

    Args:
        module: The module.
        memo: Of ``copy.deepcopy``: what stands for tensors and children, by their ids.
        computed: Parameters in place of those that parametrizations compute.
    """
    cls: Any = getattr(type(module), "_host_class", type(module))
    children = {name: child for name, child in module._modules.items() if not holds_adapters(module, name)}
    own = {name: value for name, value in vars(module).items() if name not in _LEFT_OUT}
    if computed:
        cls = cls.__bases__[0]  # parametrizations give each module a class of its own
        children.pop("parametrizations")
        own["_parameters"] = {**own["_parameters"], **computed}
    bare = cls.__new__(cls)
    hooks = {name: OrderedDict[int, Any]() for name in own if name.endswith("_hooks")}
    bare.__dict__ = {**own, **hooks, "_modules": children}
    return copy.deepcopy(bare, memo)
