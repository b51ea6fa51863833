"""Optimizers hold exactly the parameters that train, in groups that a method or the user asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_FUSIBLE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
Rule = Callable[[Tensor], dict[str, float]]  # what is special about a parameter's group: lr_factor, weight_decay


def keep_trainable(optimizers: Sequence[Optimizer], module: nn.Module) -> None:
    """Edit optimizers in place: frozen parameters leave, trainable ones that none holds join.

    Raises:
        ValueError: A trainable parameter is in no optimizer and there are several to choose from.
    """
    held = set[int]()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    optimizer.state.pop(parameter, None)
            group["params"][:] = [parameter for parameter in group["params"] if parameter.requires_grad]
            held |= {id(parameter) for parameter in group["params"]}
    missing = {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) not in held}
    if missing and len(optimizers) > 1:
        raise ValueError(
            f"configure_optimizers returns {len(optimizers)} optimizers and none holds {', '.join(list(missing)[:5])}; "
            f"give these parameters to one of them."
        )
    if missing and optimizers:
        optimizers[0].param_groups[0]["params"].extend(missing.values())


def fuse(optimizers: Sequence[Optimizer]) -> None:
    """Let torch's own optimizers step over all tensors in one kernel, unless their user chose an implementation.

    Adapters are many small tensors, over which the default takes three times as long.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups if type(optimizer) in _FUSIBLE else ():
            free = group.get("fused") is None and group.get("foreach") is None
            other = group.get("capturable") or group.get("differentiable")
            plain = all(type(p) is nn.Parameter and p.device.type in ("cpu", "cuda") for p in group["params"])
            if free and plain and not other:
                group["fused"] = True


def optimizers_in(configured: Any) -> list[Optimizer]:
    """Return the optimizers in whatever form ``configure_optimizers`` returned them."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return optimizers_in(configured.get("optimizer"))
    if isinstance(configured, (list, tuple)):
        return [optimizer for part in configured for optimizer in optimizers_in(part)]
    return []


@contextmanager
def patched_add_param_group(rule: Rule) -> Iterator[None]:
    """Context in which new optimizers split their groups by a rule, so that schedulers see the final groups."""
    original = Optimizer.add_param_group

    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        for part in _split(param_group, rule):
            original(self, part)

    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.add_param_group = original  # type: ignore[method-assign]


def apply_factors(optimizer: Optimizer) -> None:
    """Multiply each group's learning rate by its ``lr_factor`` during steps only.

    Schedulers and the learning-rate finder write one rate for all groups; the factor survives both.
    """
    optimizer.register_step_pre_hook(_scale)
    optimizer.register_step_post_hook(_unscale)


def _split(group: dict[str, Any], rule: Rule) -> list[dict[str, Any]]:
    parameters = group["params"]
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    parts: dict[tuple[tuple[str, float], ...], list[Any]] = {}
    for entry in parameters:
        special = rule(entry[1] if isinstance(entry, tuple) else entry)
        parts.setdefault(tuple(sorted(special.items())), []).append(entry)
    return [{**group, **dict(special), "params": chosen} for special, chosen in parts.items()] or [group]


def _scale(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if "lr_factor" in group:
            group["lr_before_factor"] = group["lr"]
            group["lr"] = group["lr"] * group["lr_factor"]


def _unscale(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if "lr_before_factor" in group:
            group["lr"] = group.pop("lr_before_factor")


def check_gradients(module: nn.Module, optimizer: Optimizer, unchecked: set[int]) -> set[int]:
    """Return which parameters of an optimizer (by id, of those unchecked) were looked at.

    Raises:
        ValueError: One has no gradient; names it.
    """
    here = {id(p) for group in optimizer.param_groups for p in group["params"]} & unchecked
    names = [name for name, p in module.named_parameters() if id(p) in here and p.grad is None and p.numel()]
    if names:
        raise ValueError(
            f"{len(names)} trained parameters got no gradient in the first step: {', '.join(names[:5])}. Their "
            f"modules do not take part in the loss; leave them out of targets or also_train. With gradient "
            f"checkpointing, use use_reentrant=False."
        )
    return here


def add_gradient(penalty: Tensor, optimizer: Optimizer) -> None:
    """Add a penalty's gradient to those of an optimizer's parameters; unscaled, and unseen by DDP's hooks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
