"""Between a LightningModule's own hooks and the core: what runs before and after them, without subclassing."""

from __future__ import annotations

import functools
import io
import os
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from .checkpoint import check_state, describe, keep_adapters_only, restore
from .inject import Injection, adapters, inject, injection
from .method import Method
from .optimizers import Rule, apply_factors, grouped, keep_trainable, optimizers_in
from .select import base_parameters, matches

_Module = TypeVar("_Module", bound=pl.LightningModule)
KEY = "lightning_peft"  # of a Lightning checkpoint's entry


def surround_hook(module: pl.LightningModule, hook: str, around: Callable[..., Any]) -> None:
    """Let ``around(module, own, *args)`` stand for a hook of this very module, where ``own`` is its own hook.

    Copies of the module keep the surrounded hook and bind it to themselves. A second call replaces the first.
    """
    before = module.__dict__.get(hook)
    before = getattr(before, "__func__", before)
    before = getattr(before, "_peft_own", before)

    def surrounded(self: pl.LightningModule, *args: Any, **kwargs: Any) -> Any:
        own = getattr(type(self), hook) if before is None else before
        return around(self, functools.partial(own, self), *args, **kwargs)

    functools.update_wrapper(surrounded, before or getattr(type(module), hook))  # so that Lightning sees an override
    surrounded.__name__ = hook  # pickling a bound method looks its function up by name
    surrounded._peft_own = before  # type: ignore[attr-defined]
    module.__dict__[hook] = types.MethodType(surrounded, module)


def after_build(module: pl.LightningModule, hook: str, then: Callable[[pl.LightningModule], None]) -> None:
    """Call ``then(module)`` once, after the hook in which the module builds its network."""

    def around(self: pl.LightningModule, own: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        release_hook(self, hook)
        own(*args, **kwargs)
        then(self)

    surround_hook(module, hook, around)


def release_hook(module: pl.LightningModule, hook: str) -> None:
    """Undo ``surround_hook``."""
    own = module.__dict__.pop(hook).__func__._peft_own
    if own is not None:
        module.__dict__[hook] = types.MethodType(own, module)


def adopt(module: pl.LightningModule, methods: Sequence[Method], also_train: Sequence[str]) -> None:
    """Inject, or take over what the user injected, below this module or into it.

    Raises:
        TypeError: The module is sharded already.
        ValueError: Something else was injected.
    """
    record = injection(module)
    below = [found for part in module.modules() if (found := injection(part)) is not None and found is not record]
    if record is None and not below:
        if any(isinstance(part, FSDPModule) for part in module.modules()):
            raise TypeError(
                "The model is sharded and has no adapters yet; each rank would train its own. Call "
                "lightning_peft.inject(self, method) in configure_model, before fully_shard."
            )
        inject(module, methods, also_train)
        return
    if record is None:
        record = Injection(
            methods=[method for found in below for method in found.methods],
            also_train=[pattern for found in below for pattern in found.also_train],
            trained=[name for name, p in base_parameters(module).items() if p.requires_grad],
            required_grad=dict.fromkeys(base_parameters(module), True),
        )
        module.__dict__["_peft_injection"] = record
    if record.methods != list(methods):
        raise ValueError(
            f"The model holds {record.methods}, PEFTStrategy was given {list(methods)}. Pass the same methods, or call "
            f"lightning_peft.detach(model) first."
        )


def wire_checkpoints(module: pl.LightningModule, check_base: bool) -> None:
    """Make checkpoints hold what training can change, and loading strict about it."""
    keep_adapters_only(module)

    def saved(self: pl.LightningModule, own: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        own(checkpoint)
        checkpoint[KEY] = describe(self)

    def loaded(self: pl.LightningModule, own: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        check_checkpoint(self, checkpoint, check_base)
        own(checkpoint)

    surround_hook(module, "on_save_checkpoint", saved)
    surround_hook(module, "on_load_checkpoint", loaded)


def check_checkpoint(module: pl.LightningModule, checkpoint: dict[str, Any], check_base: bool) -> None:
    """Compare a Lightning checkpoint with an adapted module, before anything of it is loaded."""
    if KEY not in checkpoint:
        raise ValueError(
            "The checkpoint was written without PEFTStrategy and holds no adapters. Load it into the base model before "
            "training, not as ckpt_path."
        )
    restore(module, checkpoint[KEY], "The checkpoint", strict=check_base)
    if "state_dict" in checkpoint:  # strategies that load in shards have taken it out
        check_state(module, checkpoint["state_dict"], "The checkpoint")


def wire_optimizers(module: pl.LightningModule, lr_factors: dict[str, float], no_decay: Sequence[str]) -> None:
    """Make optimizers hold exactly what trains, in groups by factor and decay."""

    def configured(self: pl.LightningModule, own: Callable[..., Any]) -> Any:
        rule = group_rule(self, lr_factors, no_decay)
        if rule is None:
            result = own()
        else:
            with grouped(rule):
                result = own()
        optimizers = optimizers_in(result)
        keep_trainable(optimizers, self)
        for optimizer in optimizers:
            if rule is not None:
                _require_groups(optimizer.param_groups, rule)
                apply_factors(optimizer)
        return result

    surround_hook(module, "configure_optimizers", configured)


def group_rule(module: pl.LightningModule, lr_factors: dict[str, float], no_decay: Sequence[str]) -> Rule | None:
    """Return what is special about each trainable parameter, or None if nothing is.

    Raises:
        ValueError: A pattern matches no trainable parameter.
    """
    if not lr_factors and not no_decay:
        return None
    names = {name: p for name, p in module.named_parameters() if p.requires_grad}
    owners = {id(p): key for _, _, key, adapter in adapters(module) for p in adapter.parameters()}
    special: dict[int, dict[str, float]] = {}
    settings = [(p, "lr_factor", f) for p, f in lr_factors.items()] + [(p, "weight_decay", 0.0) for p in no_decay]
    for pattern, field, value in settings:
        found = [p for name, p in names.items() if matches(name, pattern) or owners.get(id(p)) == pattern]
        if not found:
            raise ValueError(
                f"{pattern!r} is no trainable parameter or method. Parameters: {', '.join(list(names)[:10])}."
            )
        for parameter in found:
            special.setdefault(id(parameter), {})[field] = value

    def rule(parameter: Tensor) -> dict[str, float]:
        return special.get(id(parameter), {})

    return rule


def _require_groups(groups: list[dict[str, Any]], rule: Rule) -> None:
    for group in groups:
        for parameter in group["params"]:
            if any(group.get(field) != value for field, value in rule(parameter).items()):
                raise ValueError(
                    "The optimizer was built before lr_factors and no_decay could group its parameters; build it "
                    "inside configure_optimizers (PEFTCLI does)."
                )


def load_from_checkpoint(
    module_class: type[_Module], path: str | os.PathLike[str], check_base: bool = True, **kwargs: Any
) -> _Module:
    """Build a LightningModule and load an adapter-only checkpoint into it, without a Trainer.

    Args:
        module_class: Class of the module; it must bring the same base weights again.
        path: Checkpoint that a Trainer with PEFTStrategy wrote.
        check_base: Whether the base must be the one that was trained on.
        kwargs: For the class's own ``load_from_checkpoint``: ``map_location``, or arguments that were not saved.

    Raises:
        ValueError: The checkpoint was written without PEFTStrategy, or for another base.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    shell = {key: value for key, value in checkpoint.items() if key != KEY} | {"state_dict": {}}
    file = io.BytesIO()
    torch.save(shell, file)
    file.seek(0)
    with warnings.catch_warnings():  # Lightning builds the module from its saved arguments; values follow below
        warnings.filterwarnings("ignore", "(Found keys that are in the model state dict|The state dict in)")
        module = module_class.load_from_checkpoint(file, strict=False, **kwargs)
    inject_from_checkpoint(module, checkpoint, check_base)
    module.load_state_dict(checkpoint["state_dict"])
    return module


def inject_from_checkpoint(module: pl.LightningModule, checkpoint: dict[str, Any], check_base: bool = True) -> None:
    """Inject what an adapter-only checkpoint says into a module that has no adapters yet.

    Called in a module's own ``on_load_checkpoint``, it makes the module's ``load_from_checkpoint`` read such files.

    Raises:
        ValueError: The checkpoint does not fit; says how.
    """
    if KEY in checkpoint and injection(module) is None:
        if is_overridden("configure_model", module):
            module.configure_model()
        restore(module, checkpoint[KEY], "The checkpoint", strict=check_base)
        wire_checkpoints(module, check_base)
    check_checkpoint(module, checkpoint, check_base)
