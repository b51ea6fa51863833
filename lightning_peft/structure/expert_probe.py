"""``measure_products``: how a module multiplies its 3-D parameters, from a call in which nothing is computed."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.lazy_weights import LazyWeight, Product


class Use(NamedTuple):
    """What a call showed of a parameter (experts, a, b).

    Args:
        transposed: Whether it stores (in, out): whether inputs are multiplied along ``a``.
        downstream: Whether what it is multiplied with was computed from another product.
    """

    transposed: bool
    downstream: bool


def with_parameters(host: nn.Module, values: dict[str, Any]) -> Any:
    """Return a view of a module that reads these values in place of some parameters, and shares all else.

    The module itself is not changed, so that other calls of it, in other threads too, see what it holds.
    """
    view = type(host).__new__(type(host))
    view.__dict__ = {**vars(host), "_parameters": {**host._parameters, **values}}
    return view


@torch.no_grad()
def measure_products(host: nn.Module, weights: list[str]) -> dict[str, Use] | None:
    """Return the use of each of these 3-D parameters; None unless one call, as experts are called, shows all of them.

    The forward of the module's class runs on a few tokens, with recorders in the place of the weights, which return
    random outputs of the right shape; so neither the size nor the device of the weights matters.
    """
    shapes = [host.get_parameter(name).shape for name in weights]
    for width in dict.fromkeys(itertools.chain.from_iterable(shape[1:] for shape in shapes)):
        for inputs in _inputs(shapes[0][0], width):
            recorders = {name: _Recorder(shape, []) for name, shape in zip(weights, shapes, strict=True)}
            if _runs(host, recorders, inputs) and all(len(set(r.uses)) == 1 for r in recorders.values()):
                return {name: recorder.uses[0] for name, recorder in recorders.items()}
    return None


def _runs(host: nn.Module, recorders: dict[str, _Recorder], inputs: tuple[Tensor, ...]) -> bool:
    """Return whether a call with these inputs works and returns tokens that depend on products."""
    forward: Any = inspect.unwrap(type(host).forward)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            y = forward(_stand_in(host, recorders), *inputs)
    except Exception:  # whatever foreign code raises for inputs that are not its own
        return False
    return isinstance(y, Tensor) and y.shape == inputs[0].shape and y.requires_grad


def _inputs(experts: int, width: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield arguments as experts are called with: tokens, and which experts they go to with what weight."""
    x = torch.zeros(experts, width)
    index, scores = torch.tensor([[0, 1]]).expand(experts, 2), torch.full((experts, 2), 0.5)
    probabilities = torch.full((experts, experts), 1 / experts)
    for rest in ((index, scores), (scores, index), (), (probabilities,), (index, probabilities)):
        yield x, *rest
    yield x[None], index, scores


def _stand_in(host: nn.Module, recorders: dict[str, Any]) -> Any:
    """Return a view whose other parameters are zeros on the CPU, and whose children with parameters do nothing."""
    others = {
        name: torch.zeros(p.shape)
        for name, p in host._parameters.items()
        if p is not None and name not in recorders and p.numel() < 2**24
    }
    view = with_parameters(host, {**others, **recorders})
    view.__dict__["_modules"] = {
        name: nn.Identity() if any(True for _ in child.parameters()) else child for name, child in host.named_children()
    }
    return view


class _Recorder(LazyWeight):
    """Weight without values that remembers the products in which it is asked for."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, shape: torch.Size, uses: list[Use], flipped: bool = False) -> None:
        self.shape, self.uses, self.flipped = shape, uses, flipped

    def product(self, product: Product) -> Tensor:
        from_left = not product.from_right
        x, side = product.x, -1 if from_left else -2
        linear = product.times is torch.nn.functional.linear
        along = x.shape[-2] if from_left and not linear else x.shape[-1]
        if along != self.shape[side]:
            raise ValueError(f"{tuple(x.shape)} does not fit {tuple(self.shape)}")
        self.uses.append(Use(transposed=(side == -2) != self.flipped, downstream=x.requires_grad))
        features = self.shape[-2 if from_left else -1]
        shape = (*x.shape[:-2], features, x.shape[-1]) if from_left and not linear else (*x.shape[:-1], features)
        return torch.randn(shape).requires_grad_()

    def full(self) -> Tensor:
        raise TypeError("not a product")

    def __getitem__(self, index: Any) -> _Recorder:
        if isinstance(index, Tensor) and index.dim():
            shape = torch.Size((*index.shape, *self.shape[1:]))
        elif isinstance(index, int | Tensor):
            shape = self.shape[1:]
        else:
            raise TypeError("not an expert")
        return _Recorder(shape, self.uses, self.flipped)

    @property
    def mT(self) -> _Recorder:  # noqa: N802
        shape = torch.Size((*self.shape[:-2], self.shape[-1], self.shape[-2]))
        return _Recorder(shape, self.uses, not self.flipped)

    def data_ptr(self) -> int:
        """Return an address that is aligned."""
        return 0
