"""``QuantizedExperts``: modules of experts whose weights are frozen codes, decoded anew in each product."""

from __future__ import annotations

import copyreg
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.autograd_function import records_gradients
from ..ops.lazy_weights import LazyWeight, Product
from ..ops.sharded_tensors import global_shape
from .expert_probe import with_parameters
from .original_weight import original_of
from .quantized_linear import Int8Linear, KeepsStatistics, NF4Linear

_CHUNK = 2**26  # values that are decoded at once


class Codes(ABC):
    """How weights (experts, a, b) are stored: codes, and statistics of each expert; some are shared by all."""

    statistics: tuple[str, ...]
    shared: tuple[str, ...] = ()

    @abstractmethod
    def decode(self, codes: Tensor, *statistics: Tensor) -> Tensor:
        """Return the weights (..., a, b) in float32."""


class Int8Codes(Codes):
    """W = scale * codes, with codes from -127 to 127 and one scale for each output of each expert."""

    statistics = ("scale",)

    def decode(self, codes: Tensor, *statistics: Tensor) -> Tensor:
        return Int8Linear.decode(codes, *statistics)


class NF4Codes(Codes):
    """Two codes in a byte, as in ``NF4Linear``, with statistics of each expert."""

    statistics = ("codes8", "factor", "mean", "codebook")
    shared = ("codebook",)

    def decode(self, codes: Tensor, *statistics: Tensor) -> Tensor:
        return NF4Linear.decode(codes, *statistics)


class _QuantizedClass(type):
    """Class of the classes that ``quantized_class`` makes, which pickle finds by calling it again."""

    experts_class: Any
    codes: Codes


class QuantizedExperts(KeepsStatistics):
    """First base class of modules of experts that are stored as codes; the second one is the module's own class."""

    experts_class: Any
    codes: Codes
    expert_weights: Mapping[str, Any]  # ``ExpertWeight`` by parameter
    compute_dtype: torch.dtype  # type that the weights would have now

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward, which reads stand-ins of the weights."""
        lazy = {part: self.factor(part) for part in self.quantized_parts()}
        return self.experts_class.forward(with_parameters(self, lazy), *args, **kwargs)

    def quantized_parts(self) -> list[str]:
        """Return the names of the parameters that hold codes."""
        return [part for part in self.expert_weights if original_of(self, part) is not None]

    def shape_of(self, part: str) -> torch.Size:
        """Return the shape (experts, a, b) of a weight, before it was quantized if it is."""
        original, parameter = original_of(self, part), self._parameters[part]
        return torch.Size(original.shape) if original is not None else global_shape(parameter)  # type: ignore[arg-type]

    def factor(self, part: str) -> Any:
        """Return what products are taken with: codes that are decoded, a sum that an adapter put there, or a weight."""
        parameter: Any = self._parameters[part]
        if isinstance(parameter, LazyWeight) or original_of(self, part) is None:
            return parameter
        statistics = [self._buffers[f"{part}_{name}"] for name in self.codes.statistics]
        return _Decoded(self.codes, [parameter, *statistics], self.shape_of(part), self.compute_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(fn, recurse)


@functools.cache
def quantized_class(cls: Any, codes: type[Codes]) -> Any:
    """Return the subclass of ``cls`` for experts that are stored as codes."""
    namespace = {"experts_class": cls, "codes": codes(), "__module__": cls.__module__, "__doc__": cls.__doc__}
    return _QuantizedClass(cls.__name__, (QuantizedExperts, cls), namespace)


def _reduce(cls: _QuantizedClass) -> Any:
    return quantized_class, (cls.experts_class, type(cls.codes))


copyreg.pickle(_QuantizedClass, _reduce)


class _Decoded(LazyWeight):
    """Weights that are decoded in each pass of each product, so that none is saved.

    Args:
        codes: How they are stored.
        stored: Codes and statistics.
        shape: Shape as stored, (..., a, b).
        dtype: Their type.
        flipped: Whether the last two dimensions are exchanged.
    """

    def __init__(
        self, codes: Codes, stored: list[Any], shape: torch.Size, dtype: torch.dtype, flipped: bool = False
    ) -> None:
        self.codes, self.stored, self.stored_shape, self.dtype, self.flipped = codes, stored, shape, dtype, flipped
        self.shape = torch.Size((*shape[:-2], shape[-1], shape[-2])) if flipped else shape
        self.device = stored[0].device

    def product(self, product: Product) -> Tensor:
        y: Tensor
        if records_gradients():
            y = _DecodedProduct.apply(product.x, product.times, self)  # type: ignore[no-untyped-call]
        else:
            y = product.times(product.x, self.decoded(product.x.dtype))
        return y if product.bias is None else y + product.bias

    def full(self) -> Tensor:
        return self.decoded(self.dtype)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the weights in a type."""
        if len(self.stored_shape) < 3:
            weight = self.codes.decode(*self.stored).to(dtype)
        else:
            weight = self.stored[0].new_empty(self.stored_shape, dtype=dtype)
            step = max(1, _CHUNK // self.stored_shape[1:].numel())
            for start in range(0, len(weight), step):
                weight[start : start + step] = self.codes.decode(*self._at(slice(start, start + step)))
        return weight.mT if self.flipped else weight

    def __getitem__(self, index: Any) -> _Decoded:
        stored = self._at(index)
        shape = (*stored[0].shape[:-2], *self.stored_shape[-2:])
        return _Decoded(self.codes, stored, torch.Size(shape), self.dtype, self.flipped)

    def _at(self, index: Any) -> list[Tensor]:
        names = ("", *self.codes.statistics)
        return [x if name in self.codes.shared else x[index] for name, x in zip(names, self.stored, strict=True)]

    @property
    def mT(self) -> _Decoded:  # noqa: N802
        return _Decoded(self.codes, self.stored, self.stored_shape, self.dtype, not self.flipped)

    def data_ptr(self) -> int:
        """Return an address that is aligned, as that of a decoded weight is."""
        return 0


class _DecodedProduct(torch.autograd.Function):
    """A product of x with a frozen weight that is decoded in each pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: Callable[[Tensor, Tensor], Tensor], weight: _Decoded) -> Tensor:
        ctx.times, ctx.weight = times, weight
        return times(x, weight.decoded(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.times(grad, ctx.weight.decoded(grad.dtype).mT), None, None
