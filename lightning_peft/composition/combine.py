"""``combine`` makes one LoRA of several updates of the same weights: sums, TIES and DARE, of weights or of factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..core.inject import add_inactive
from ..core.injection_record import adapters_of, methods_named, require_record
from ..core.method import Method, check_setting
from ..core.weight_update import WeightUpdate
from ..methods import LoRA
from ..methods.families.low_rank import LowRankUpdate

CombineRule = Literal["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]


def combine(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    name: str,
    rule: CombineRule = "linear",
    of: Literal["weights", "factors"] = "weights",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> nn.Module:
    """Add a LoRA that combines others, inactive as after ``add_adapter``; those and the base stay as they are.

    With updates D_i (of LoRA: s_i B_i A_i) and the given weights w_i, entry by entry:

    * ``linear``: sum_i w_i D_i (task arithmetic, https://arxiv.org/abs/2212.04089).
    * ``magnitude_prune``: keep of each D_i the share ``density`` of largest magnitude, then sum.
    * ``ties``: keep of each D_i the share ``density`` of largest magnitude, elect the sign of their sum, and average
      the w_i D_i that have this sign over those that have it (https://arxiv.org/abs/2306.01708).
    * ``dare_linear``: keep entries of D_i at random with probability ``density`` and divide them by it, then sum
      (https://arxiv.org/abs/2311.03099); ``dare_ties``: the same before the election of signs.

    The result is written as B A of the given rank, the best there is (truncated SVD); a sum is exact from rank sum_i
    r_i on. Of factors, the rule applies to A_i with sign(w_i) sqrt(s_i |w_i|) and to B_i with sqrt(s_i |w_i|) in place
    of D_i and w_i: cheap, and the product of two sums has cross terms, so that it approximates at best.

    Args:
        model: A model with the adapters, active or not.
        names: Names of adapters that add to weights, at the same places: LoRA without ``decompose``, AdaLoRA, FedPara,
            KronA. Factors have those of low rank alone, LoRA and AdaLoRA.
        weights: A number w_i for each, of either sign.
        name: Name of the new adapters.
        rule: How they are combined.
        of: Whether weights or factors are.
        rank: Rank of the new adapters; the largest of the others if not given and all have one. Factors keep theirs.
        density: Share of entries that is kept, of all rules but ``linear``.
        seed: Of what DARE keeps.

    Returns:
        The model.

    Raises:
        ValueError: A name is unknown or taken, numbers do not fit, or the adapters lie at different places.
        TypeError: Adapters add nothing to a weight, or have no factors.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> for task in ("one", "other"):
        ...     _ = lp.add_adapter(model, lp.LoRA(rank=2, init="gaussian", targets=["0"]), name=task)
        >>> _ = lp.combine(model, ["one", "other"], weights=[0.5, 0.5], name="both", rank=4)
        >>> model[0].peft["both"].a.shape  # 2 + 2 ranks hold the sum exactly
        torch.Size([4, 16])
    """
    check_setting(rule in get_args(CombineRule), "rule", rule, f"one of {', '.join(get_args(CombineRule))}")
    check_setting(of in ("weights", "factors"), "of", of, "weights or factors")
    check_setting(0 < density <= 1, "density", density, "a share in (0, 1]")
    check_setting(len(names) == len(weights) > 0, "weights", weights, f"one number for each of {list(names)}")
    check_setting(all(map(math.isfinite, weights)), "weights", weights, "finite")
    methods = [methods_named(require_record(model), adapter_name) for adapter_name in names]
    updates = [_updates(model, group, of) for group in methods]
    for adapter_name, by_host in zip(names, updates, strict=True):
        if unshared := by_host.keys() ^ updates[0].keys():
            raise ValueError(
                f"{names[0]!r} and {adapter_name!r} must lie at the same places; only one is at {min(unshared)}."
            )
    rank = _result_rank([update for by_host in updates for update in by_host.values()], of, rank)
    first_method: Any = methods[0][0]
    method = LoRA(
        name=name, targets=list(first_method.targets), exclude=list(first_method.exclude), rank=rank, alpha=float(rank)
    )
    add_inactive(model, [method])
    generator = torch.Generator().manual_seed(seed)
    combine_pairs = _combine_factors if of == "factors" else _truncated_svd
    for host, target in adapters_of(model, method).items():
        a, b = combine_pairs([by_host[host] for by_host in updates], weights, rule, density, rank, generator)
        target.load_state_dict({"a": a.view(target.get_parameter("a").shape), "b": b})
    return model


def _updates(model: nn.Module, methods: Sequence[Method], of: str) -> dict[str, Any]:
    adapters = adapters_of(model, *methods)
    name = methods[0].name
    if not adapters:
        raise TypeError(f"{name!r} has no adapters: {type(methods[0]).__name__} adds nothing to a weight.")
    for host, adapter in adapters.items():
        described = f"{type(adapter).__name__} of {name!r} at {host}"
        if not isinstance(adapter, WeightUpdate) or adapter.exclusive:
            raise TypeError(
                f"{described} is no update W + D of a weight; LoRA without decompose and its kin can be combined, but "
                f"not on experts."
            )
        if of == "factors" and not isinstance(adapter, LowRankUpdate):
            raise TypeError(f"{described} has no factors B and A; combine weights.")
    if len(methods) > 1:
        kinds = " and ".join(type(method).__name__ for method in methods)
        raise TypeError(f"{name!r} is {kinds} under one name; only names of one method each can be combined.")
    return dict(adapters)


def _result_rank(updates: Sequence[WeightUpdate], of: str, rank: int | None) -> int:
    """Return the rank of the result."""
    ranks = {len(update.pair()[0]) if isinstance(update, LowRankUpdate) else None for update in updates}
    if of == "factors":
        check_setting(
            len(ranks) == 1 and rank in (None, *ranks), "rank", rank or sorted(map(str, ranks)), "one for all factors"
        )
    check_setting(rank is not None or None not in ranks, "rank", rank, "given, since not all updates have one")
    return rank or max(r for r in ranks if r is not None)


def _truncated_svd(
    updates: Sequence[Any], weights: Sequence[float], rule: CombineRule, density: float, rank: int, generator: Any
) -> tuple[Tensor, Tensor]:
    """Return A and B of the best approximation to the combined updates."""
    if rule == "linear" and all(isinstance(update, LowRankUpdate) for update in updates):  # of factors, which is small
        pairs = [(update.pair(), weight * update.scale) for update, weight in zip(updates, weights, strict=True)]
        q_b, r_b = torch.linalg.qr(torch.cat([b * scale for (_, b), scale in pairs], 1).detach().double())
        q_a, r_a = torch.linalg.qr(torch.cat([a.flatten(1) for (a, _), _ in pairs]).detach().double().T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        u, v = q_b @ u, v @ q_a.T
    else:
        deltas = [update.delta().detach().flatten(1).double() for update in updates]
        total = combine_tensors(deltas, weights, rule, density, generator)
        u, s, v = torch.linalg.svd(total, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    missing = rank - len(root)
    return nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))


def _combine_factors(
    updates: Sequence[Any], weights: Sequence[float], rule: CombineRule, density: float, rank: int, generator: Any
) -> tuple[Tensor, Tensor]:
    """Return A and B, each combined from the factors of the updates."""
    pairs = [[factor.detach().flatten(1).double() for factor in update.pair()] for update in updates]
    scales = [weight * update.scale for update, weight in zip(updates, weights, strict=True)]
    signed = [math.copysign(math.sqrt(abs(scale)), scale) for scale in scales]
    a = combine_tensors([pair[0] for pair in pairs], signed, rule, density, generator)
    return a, combine_tensors([pair[1] for pair in pairs], [abs(factor) for factor in signed], rule, density, generator)


def combine_tensors(
    tensors: Sequence[Tensor], weights: Sequence[float], rule: CombineRule, density: float, generator: torch.Generator
) -> Tensor:
    """Return what a rule of ``combine`` makes of tensors of one shape."""
    if rule in ("ties", "magnitude_prune"):
        tensors = [_largest(x, density) for x in tensors]
    elif rule != "linear":
        tensors = [x * (torch.rand(x.shape, generator=generator).to(x.device) < density) / density for x in tensors]
    stack = torch.stack(list(tensors))
    weighted = stack * torch.tensor(weights, dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.dim() - 1))
    if rule in ("linear", "magnitude_prune", "dare_linear"):
        return weighted.sum(0)
    agrees = stack.sign() == torch.where(stack.sum(0) >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(x: Tensor, density: float) -> Tensor:
    """Return the share of a tensor's entries that are largest in magnitude, zero elsewhere."""
    kept = torch.zeros_like(x).flatten()
    kept[x.abs().flatten().topk(int(density * x.numel())).indices] = 1
    return x * kept.view(x.shape)
