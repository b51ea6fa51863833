"""Between a LightningModule's own hooks and the core: what runs before and after them, without subclassing."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from ..checkpoints.adapter_state import strip_wrapper_names
from ..core.adapted_module import adapters
from ..core.inject import inject
from ..core.injection_record import InjectionRecord, get_record, set_record
from ..core.method import Method
from ..core.weight_backup import check_not_merged
from ..structure.base_model import ADAPTERS_ATTRIBUTE, base_parameters, matches
from .param_groups import Rule, apply_factors, fuse, keep_trainable, optimizers_in, patched_add_param_group


def wrap_hook(module: pl.LightningModule, hook: str, around: Callable[..., Any]) -> None:
    """Let ``around(module, own, *args)`` stand for a hook of this very module, where ``own`` is its own hook.

    Copies of the module keep the surrounded hook and bind it to themselves. A second call replaces the first.
    """
    before: Any = module.__dict__.get(hook)
    if isinstance(before, types.MethodType):
        before = getattr(before.__func__, "_peft_own", before.__func__)
    elif before is not None:  # a function that was put on the instance knows no self
        before = functools.partial(_without_self, before)

    def surrounded(self: pl.LightningModule, *args: Any, **kwargs: Any) -> Any:
        own = getattr(type(self), hook) if before is None else before
        return around(self, functools.partial(own, self), *args, **kwargs)

    functools.update_wrapper(surrounded, before or getattr(type(module), hook))  # so that Lightning sees an override
    surrounded.__name__ = hook  # pickling a bound method looks its function up by name
    surrounded._peft_own = before  # type: ignore[attr-defined]
    module.__dict__[hook] = types.MethodType(surrounded, module)


def _without_self(function: Callable[..., Any], module: pl.LightningModule, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def after_build(module: pl.LightningModule, hook: str, then: Callable[[pl.LightningModule], None]) -> None:
    """Call ``then(module)`` once, after the hook in which the module builds its network."""

    def around(self: pl.LightningModule, own: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        unwrap_hook(self, hook)
        own(*args, **kwargs)
        then(self)

    wrap_hook(module, hook, around)


def unwrap_hook(module: pl.LightningModule, hook: str) -> None:
    """Undo ``wrap_hook``."""
    own = module.__dict__.pop(hook).__func__._peft_own
    if own is not None:
        module.__dict__[hook] = types.MethodType(own, module)


def ensure_injected(module: pl.LightningModule, methods: Sequence[Method], also_train: Sequence[str]) -> None:
    """Inject, or take over what the user injected, below this module or into it.

    Raises:
        TypeError: The module is sharded already.
        ValueError: Something else was injected, or no method is given and nothing was.
        RuntimeError: Adapters below are merged into the weights.
    """
    record = get_record(module)
    below = [found for part in module.modules() if (found := get_record(part)) is not None and found is not record]
    if record is None and not below:
        if not methods:
            raise ValueError(
                "PEFTStrategy without a method trains what was injected before, and nothing was: give it a method, or "
                "call lightning_peft.inject, or add_adapter and activate, first."
            )
        if any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in module.modules()):
            raise TypeError(
                "The model is sharded and has no adapters yet; each rank would train its own. Call "
                "lightning_peft.inject(self, method) in configure_model, before fully_shard."
            )
        inject(module, methods, also_train)
        return
    if record is None:
        check_not_merged(module)
        record = InjectionRecord.around(below, base_parameters(module))
        set_record(module, record)
    if methods and record.methods not in (list(methods), [method.finalized() for method in methods]):
        raise ValueError(
            f"The model holds {record.methods}, PEFTStrategy was given {list(methods)}. Pass the same methods, or call "
            f"lightning_peft.detach(model) first."
        )


def install_optimizer_hook(module: pl.LightningModule, lr_factors: dict[str, float], no_decay: Sequence[str]) -> None:
    """Make optimizers hold exactly what trains, in groups by factor and decay; a factor of 0 freezes."""
    names, others = dict(module.named_parameters()), _by_method(module)
    for pattern in [p for p, factor in lr_factors.items() if factor == 0]:
        for parameter in _named_by(pattern, names, others):
            parameter.requires_grad_(False)
    lr_factors = {pattern: factor for pattern, factor in lr_factors.items() if factor != 0}

    def configured(self: pl.LightningModule, own: Callable[..., Any]) -> Any:
        rule = group_rule(self, lr_factors, no_decay)
        if rule is None:
            result = own()
        else:
            with patched_add_param_group(rule):
                result = own()
        optimizers = optimizers_in(result)
        keep_trainable(optimizers, self)
        fuse(optimizers)
        for optimizer in optimizers:
            if rule is not None:
                _check_groups(optimizer.param_groups, rule)
                apply_factors(optimizer)
        return result

    wrap_hook(module, "configure_optimizers", configured)


def group_rule(module: pl.LightningModule, lr_factors: dict[str, float], no_decay: Sequence[str]) -> Rule | None:
    """Return what is special about each trainable parameter, or None if nothing is.

    Raises:
        ValueError: A pattern matches no trainable parameter.
    """
    if not lr_factors and not no_decay:
        return None
    names = {strip_wrapper_names(name): p for name, p in module.named_parameters() if p.requires_grad}
    others = _by_method(module)
    special: dict[int, dict[str, float]] = {}
    settings = [(p, "lr_factor", f) for p, f in lr_factors.items()] + [(p, "weight_decay", 0.0) for p in no_decay]
    for pattern, field, value in settings:
        for parameter in _named_by(pattern, names, others):
            special.setdefault(id(parameter), {})[field] = value

    def rule(parameter: Tensor) -> dict[str, float]:
        return special.get(id(parameter), {})

    return rule


def _by_method(module: pl.LightningModule) -> dict[str, str]:
    """Return the names of adapters' parameters without the parts that they serve: lora for lora_query."""
    return {
        strip_wrapper_names(
            f"{name}.{ADAPTERS_ATTRIBUTE}.{key}.{own}".lstrip(".")
        ): f"{name}.{ADAPTERS_ATTRIBUTE}.{key.removesuffix(f'_{adapter.part}')}.{own}"
        for name, _, key, adapter in adapters(module)
        for own, _ in adapter.named_parameters()
    }


def _named_by(pattern: str, names: dict[str, nn.Parameter], others: dict[str, str]) -> list[nn.Parameter]:
    """Return parameters by a glob of their names or the name of their method."""
    both = {name: (name, others.get(name, name)) for name in names}
    found = [
        names[name]
        for name, known in both.items()
        if any(matches(one, pattern) or f".{ADAPTERS_ATTRIBUTE}.{pattern}." in f".{one}" for one in known)
    ]
    if not found:
        raise ValueError(f"{pattern!r} is no trainable parameter or method. Parameters: {', '.join(list(names)[:10])}.")
    return found


def _check_groups(groups: list[dict[str, Any]], rule: Rule) -> None:
    for group in groups:
        for parameter in group["params"]:
            if any(group.get(field) != value for field, value in rule(parameter).items()):
                raise ValueError(
                    "The optimizer was built before lr_factors and no_decay could group its parameters; build it "
                    "inside configure_optimizers (PEFTCLI does)."
                )
