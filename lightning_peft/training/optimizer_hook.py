"""``install_optimizer_hook``: the optimizers of a LightningModule hold exactly the parameters that train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer

from ..core.adapted_module import adapters
from .module_hooks import wrap_hook
from .param_groups import apply_factors, check_groups, group_rule, parameters_of, patched_add_param_group
from .plain_module import check_still_adapted
from .trained_parameters import TrainedParameters

_FUSIBLE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def install_optimizer_hook(
    module: pl.LightningModule,
    lr_factors: dict[str, float],
    no_decay: Sequence[str],
    trained: TrainedParameters,
) -> None:
    """Wrap ``configure_optimizers``, so that optimizers hold exactly what trains, in groups by factor and decay.

    Args:
        module: Module whose hook is wrapped.
        lr_factors: Factors of the learning rate by glob or name of a method; a factor of 0 freezes, at once.
        no_decay: Globs of parameter names without weight decay.
        trained: Compares what requires gradients before ``configure_optimizers`` and after it.

    Raises:
        ValueError: The pattern of a factor of 0 matches no parameter.
    """
    if 0 in lr_factors.values():
        for pattern in [pattern for pattern, factor in lr_factors.items() if factor == 0]:
            for parameter in parameters_of(module, pattern):
                parameter.requires_grad_(False)
        lr_factors = {pattern: factor for pattern, factor in lr_factors.items() if factor != 0}

    had_adapters = any(adapters(module))

    def configure(module: pl.LightningModule, original: Callable[..., Any]) -> Any:
        check_still_adapted(module, had_adapters)
        trained.note(module)
        rule = group_rule(module, lr_factors, no_decay) if lr_factors or no_decay else None
        with nullcontext() if rule is None else patched_add_param_group(rule):
            try:
                result = original()
            except ValueError:  # torch refuses an optimizer without parameters
                trained.check_flags(module)
                raise
        trained.check_flags(module)
        optimizers = optimizers_in(result)
        keep_trainable(optimizers, module)
        fuse(optimizers)
        if rule is not None:
            for optimizer in optimizers:
                check_groups(optimizer, rule)
                apply_factors(optimizer)
        return result

    wrap_hook(module, "configure_optimizers", configure)


def keep_trainable(optimizers: Sequence[Optimizer], module: nn.Module) -> None:
    """Edit optimizers in place: frozen parameters leave, trainable ones that none holds join.

    Raises:
        ValueError: A trainable parameter is in no optimizer and there are several to choose from.
    """
    present = set[int]()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    optimizer.state.pop(parameter, None)
            group["params"][:] = [parameter for parameter in group["params"] if parameter.requires_grad]
            present.update(map(id, group["params"]))
    missing = {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) not in present}
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
