"""Keeps torch's encoders from bypassing adapted children in evaluation, where calls run adapters in this thread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..structure.base_model import is_adapted
from .active_on_host import is_called


class AdapterDict(nn.ModuleDict):
    """The adapters of a host.

    In evaluation, torch's encoder layers read the weights of their children and do not call them, unless a module
    below has a hook. While calls run adapters in this thread, this shows one, which is never called, as this is not.
    """

    def __init__(self, host: nn.Module) -> None:
        self.__dict__["host"] = host  # no child of this module
        super().__init__()

    @property
    def _forward_pre_hooks(self) -> Any:
        own = self.__dict__["own_hooks"]
        return own if own or not is_called(self.__dict__["host"]) else OrderedDict({0: _noop_hook})

    @_forward_pre_hooks.setter
    def _forward_pre_hooks(self, hooks: Any) -> None:
        self.__dict__["own_hooks"] = hooks

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, "ModuleDict", 1)


def _noop_hook(module: nn.Module, args: Any) -> None:
    """Change nothing."""


class PacksRows:
    """Stands for ``nn.TransformerEncoder.use_nested_tensor``: false while calls run adapters in this thread.

    The encoder packs padded rows into nested tensors, for which torch's attention runs a fused kernel that has no
    gradient.

    Args:
        hosts: Adapted modules of the encoder.
    """

    def __init__(self, hosts: list[Any]) -> None:
        self.hosts = hosts

    def __bool__(self) -> bool:
        return not any(is_adapted(host) and is_called(host) for host in self.hosts)


def disable_fast_path(modules: Iterable[nn.Module]) -> None:
    """Let torch's encoders pack padded rows only where none of their adapters is active."""
    for module in modules:
        if isinstance(module, nn.TransformerEncoder) and vars(module).get("use_nested_tensor", False) is not False:
            hosts = [inner for inner in module.modules() if is_adapted(inner)]
            module.__dict__["use_nested_tensor"] = PacksRows(hosts) if hosts else True


def restore_fast_path(module: nn.Module) -> None:
    """Undo ``disable_fast_path``."""
    if isinstance(vars(module).get("use_nested_tensor"), PacksRows):
        module.__dict__["use_nested_tensor"] = True
