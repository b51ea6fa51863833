"""Adapters of every method that works on single layers, on layers with and without a bias, called or read."""

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from models import OneLayer
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core import Adapter, Rows, WeightUpdate, parameter_like, select
from lightning_peft.methods.families.bias_and_scale import BiasAndScale

WIDTH = 8


@dataclass(frozen=True, kw_only=True)
class ScaleAndShift(lp.Method):
    """Trains s o (W x + b) + t, as SSF does (https://arxiv.org/abs/2210.08823)."""

    name: str = "ssf"
    targets: list[str] = dataclasses.field(default_factory=list)

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        return ((name, ScaleAndShiftAdapter(host, rows)) for name, host, rows in select(model, self.targets))


class ScaleAndShiftAdapter(WeightUpdate):
    def __init__(self, host: nn.Module, rows: Rows | None) -> None:
        super().__init__(host, rows)
        weight = self.layer.parameter(host)
        self.scale, self.shift = parameter_like(weight, self.shape[0]), parameter_like(weight, self.shape[0])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.shift)

    def updated(self, weight: Tensor) -> Tensor:
        return weight * self.scale.view(-1, *[1] * (weight.dim() - 1))

    def updated_bias(self, bias: Tensor | None) -> Tensor:
        return self.shift if bias is None else bias * self.scale + self.shift


@dataclass(frozen=True, kw_only=True)
class Shift(ScaleAndShift):
    """Trains W x + b + t."""

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        return ((name, ShiftAdapter(host, rows)) for name, host, rows in select(model, self.targets))


class ShiftAdapter(WeightUpdate):
    def __init__(self, host: nn.Module, rows: Rows | None) -> None:
        super().__init__(host, rows)
        self.shift = parameter_like(self.layer.parameter(host), self.shape[0])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.shift)

    def updated_bias(self, bias: Tensor | None) -> Tensor:
        return self.shift if bias is None else bias + self.shift


@dataclass(frozen=True, kw_only=True)
class Affine(ScaleAndShift):
    """Trains the scales and biases that LLaMA-Adapter puts on linear layers."""

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        return ((name, BiasAndScale(host)) for name, host, rows in select(model, self.targets))


METHODS = {
    "lora": lp.LoRA(rank=2, targets=["layer"]),
    "dora": lp.LoRA(rank=2, decompose=True, targets=["layer"]),
    "krona": lp.KronA(targets=["layer"]),
    "fedpara": lp.FedPara(rank=2, targets=["layer"]),
    "ia3": lp.IA3(targets=["layer"], feedforward_targets=[]),
    "bias and scale": Affine(targets=["layer"]),
    "scale and shift": ScaleAndShift(targets=["layer"]),
    "shift": Shift(targets=["layer"]),
}
ADDS_BIAS = ("bias and scale", "scale and shift", "shift")
LAYERS = {
    "linear": (lambda bias: nn.Linear(WIDTH, WIDTH, bias=bias), (5, WIDTH)),
    "conv": (lambda bias: nn.Conv2d(WIDTH, 6, 3, bias=bias), (2, WIDTH, 5, 5)),
    "attention": (lambda bias: nn.MultiheadAttention(WIDTH, 2, bias=bias, batch_first=True), (2, 5, WIDTH)),
}
CASES = [
    (layer, bias, method)
    for layer in LAYERS
    for bias in (True, False)
    for method in METHODS
    if bias or layer != "attention" or method not in ADDS_BIAS
]


def build(layer, bias, method):
    """Return a net without and with adapters, whose tensors all matter, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    base = OneLayer(make(bias)).eval()
    model = lp.inject(copy.deepcopy(base), METHODS[method])
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            parameter.data += 0.5 * torch.randn_like(parameter)
    return base, model, torch.randn(shape)


@pytest.mark.parametrize("method", ADDS_BIAS)
def test_attention_of_torch_without_biases_gets_none(method):
    model = OneLayer(LAYERS["attention"][0](False))
    with pytest.raises(TypeError, match="would give layer a bias, and nn.MultiheadAttention with batch_first=True"):
        lp.inject(model, METHODS[method])
    assert type(model.layer) is nn.MultiheadAttention
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("layer", "bias", "method"), CASES)
def test_merged_equals_live_and_unmerging_brings_every_bit_back(layer, bias, method):
    base, model, x = build(layer, bias, method)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with torch.no_grad():
        live = model(x)
        assert (live - base(x)).abs().max() > 1e-2
        lp.merge(model, keep=True)
        torch.testing.assert_close(model(x), live, atol=1e-5, rtol=1e-4)
        lp.unmerge(model)
        torch.testing.assert_close(model(x), live, atol=0, rtol=0)
        lp.merge(model)
        torch.testing.assert_close(model(x), live, atol=1e-5, rtol=1e-4)
    restored = lp.detach(build(layer, bias, method)[1]).state_dict()
    assert restored.keys() == before.keys()
    assert [key for key, value in restored.items() if not torch.equal(value, before[key])] == []


@pytest.mark.parametrize(("layer", "bias", "method"), [case for case in CASES if case[-1] in ADDS_BIAS])
def test_the_output_is_that_of_the_formula(layer, bias, method):
    base, model, x = build(layer, bias, method)
    ((_, _, _, adapter),) = lp.adapters(model)
    scale = getattr(adapter, "scale", torch.ones(1)).detach().double()
    shift = (adapter.bias * adapter.scale if method == "bias and scale" else adapter.shift).detach().double()
    reference = copy.deepcopy(base).double()
    host = reference.layer
    attention = isinstance(host, nn.MultiheadAttention)
    weight = host.in_proj_weight if attention else host.weight
    weight.data *= scale.view(-1, *[1] * (weight.dim() - 1))
    name = "in_proj_bias" if attention else "bias"
    setattr(host, name, nn.Parameter(shift + (scale * getattr(host, name) if bias else 0)))
    torch.testing.assert_close(model(x).double(), reference(x.double()), atol=1e-5, rtol=1e-4)


def test_a_bias_of_one_part_of_a_fused_layer_leaves_the_others():
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)
    model = lp.inject(OneLayer(attention), ScaleAndShift(targets=["attention.key"]))
    ((_, _, _, adapter),) = lp.adapters(model)
    nn.init.constant_(adapter.shift, 3.0)
    expected = attention._parameters["in_proj_bias"].detach().clone()
    expected[WIDTH : 2 * WIDTH] += 3.0
    torch.testing.assert_close(attention.in_proj_bias.detach(), expected)


def test_a_layer_that_has_no_place_for_a_bias_refuses_to_be_merged_and_is_unchanged():
    model = lp.inject(OneLayer(nn.Embedding(7, WIDTH)), ScaleAndShift(targets=["layer"]))
    ((_, host, _, adapter),) = lp.adapters(model)
    nn.init.constant_(adapter.shift, 3.0)
    nn.init.constant_(adapter.scale, 2.0)
    before, x = host.weight.clone(), torch.arange(7)
    torch.testing.assert_close(model(x), 2 * before + 3)
    with pytest.raises(TypeError, match="Embedding has no place for a bias"):
        lp.merge(model)
    assert torch.equal(host.weight, before)


def test_an_update_that_changes_nothing_is_refused():
    class Nothing(WeightUpdate):
        def reset_parameters(self) -> None:
            pass

    with pytest.raises(TypeError, match=r"Nothing must define delta\(\), updated\(weight\) or updated_bias\(bias\)"):
        Nothing(nn.Linear(2, 2))
