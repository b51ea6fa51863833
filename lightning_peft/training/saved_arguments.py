"""Arguments of a module that a Lightning checkpoint holds: what Lightning would import because a file names it."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from torch import nn

from ..core.adapted_module import adapters
from ..core.inject import detach
from .lightning_api import INSTANTIATOR, OWN_INSTANTIATORS, SAVED_ARGUMENTS

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def check_saved_arguments(checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint from which Lightning would import a module that the program has not imported itself.

    Lightning calls the function that the arguments name as their instantiator; its own one imports every class path
    among them. Arguments without an instantiator are given to the module as they are.

    Raises:
        ValueError: It would.
    """
    arguments: dict[str, Any] = {}
    for key in SAVED_ARGUMENTS:
        saved = checkpoint.get(key)
        arguments |= saved if isinstance(saved, Mapping) else {}
    instantiator = arguments.pop(INSTANTIATOR, None)
    if instantiator is None:
        return
    if instantiator not in OWN_INSTANTIATORS:
        raise ValueError(
            f"The checkpoint wants its module built by {instantiator!r}, expected {OWN_INSTANTIATORS[0]!r} or none: "
            f"a file must not choose what runs. Build the module yourself and use lightning_peft.load_adapter."
        )
    check_names(arguments)


def leave_out_modules(module: pl.LightningModule, checkpoint: dict[str, Any], said: set[str]) -> None:
    """Take networks out of the saved arguments, with each of which all of its weights would be pickled.

    Args:
        module: The module that is saved.
        checkpoint: Its checkpoint.
        said: Names of arguments that were warned of; new ones are added.
    """
    saved = checkpoint.get(module.CHECKPOINT_HYPER_PARAMS_KEY)
    if not isinstance(saved, dict) or not (names := [name for name, value in saved.items() if _holds_module(value)]):
        return
    checkpoint[module.CHECKPOINT_HYPER_PARAMS_KEY] = {k: v for k, v in saved.items() if k not in names}
    if not said.issuperset(names):
        said.update(names)
        given = ", ".join(f"{name}=..." for name in names)
        warnings.warn(
            f"The checkpoint holds weights that train, and would hold whole networks among the arguments of "
            f"{type(module).__name__}: {', '.join(names)} are left out. There, write "
            f"self.save_hyperparameters(ignore={names}). "
            f"Give them when you load: load_from_checkpoint({type(module).__name__}, path, {given}).",
            stacklevel=2,
        )


def take_adapters_out(checkpoint: Mapping[str, Any]) -> None:
    """Make networks among saved arguments plain ones; checkpoints of earlier versions hold them with their adapters."""
    for network in (v for v in checkpoint.get(SAVED_ARGUMENTS[-1], {}).values() if isinstance(v, nn.Module)):
        if any(adapters(network)):
            detach(network).requires_grad_(True)


def _holds_module(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(map(_holds_module, value.values() if isinstance(value, dict) else value))
    return isinstance(value, nn.Module)


def check_names(arguments: Any) -> None:
    """Refuse texts among arguments of which a parser would import a module that the program has not imported itself.

    Raises:
        ValueError: There is one; says which, and what to do if it is trusted.
    """
    for text in _texts(arguments):
        if _DOTTED.fullmatch(text) and _would_import(text):
            raise ValueError(
                f"The checkpoint names {text!r}, which an installed package may hold and is not imported; a file never "
                f"causes an import. If you trust it, import it before loading; on the command line, name the class by "
                f"--model."
            )


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts among nested arguments."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from _texts(inner)


def _would_import(text: str) -> bool:
    """Whether looking up a dotted name would run a module that has not run yet; to find out runs nothing."""
    package, holder = text.partition(".")[0], sys.modules.get(text.rpartition(".")[0])
    if holder is None:
        return package in sys.modules or importlib.util.find_spec(package) is not None
    return hasattr(holder, "__path__") and text not in sys.modules and importlib.util.find_spec(text) is not None
