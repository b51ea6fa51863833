"""Classes of weight updates of a program's own are called once before an injection changes anything."""

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.core import Method, select


class Own(lp.WeightUpdate):
    """Counts its calls; what it returns is said by each test."""

    def __init__(self, host, rows, calls):
        super().__init__(host, rows)
        self.calls = calls
        self.gain = nn.Parameter(torch.zeros(self.shape[0], 1))

    def reset_parameters(self):
        nn.init.zeros_(self.gain)


def method_of(update, targets=("*",)):
    """Return a method whose adapters are of this class, and the list of what they were called with."""
    calls = []

    class Owned(Method):
        name = "owned"

        def adapters(self, model):
            return ((name, update(host, rows, calls)) for name, host, rows in select(model, targets))

    return Owned(name="owned"), calls


def net(bias=True, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 2, bias), nn.Linear(2, 3, bias)).to(device, dtype)


def refused(update, message, model=None):
    """Check that an injection is refused with a message, and that the model is as it was."""
    model = model or net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    versions = [parameter._version for parameter in model.parameters()]
    with pytest.raises((TypeError, ValueError)) as error:
        lp.inject(model, method_of(update)[0])
    assert str(error.value) == message
    assert list(model.state_dict()) == list(before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [parameter._version for parameter in model.parameters()] == versions
    for name, value in model.state_dict().items():
        if not value.is_meta:
            assert torch.equal(value, before[name])


class Scale(Own):
    def updated(self, weight):
        self.calls.append(weight)
        return weight * (1 + self.gain)


class InPlace(Own):
    def updated(self, weight):
        weight.mul_(1 + self.gain)
        return weight


class BehindTheBack(Own):
    def updated(self, weight):
        weight.data.add_(1)
        return weight


class Narrow(Own):
    def delta(self):
        return self.gain


class Transposed(Own):
    def updated(self, weight):
        return weight.T


class Forgotten(Own):
    def updated(self, weight):
        weight + self.gain


class NoBias(Own):
    def updated_bias(self, bias):
        return None


class WideBias(Own):
    def updated_bias(self, bias):
        return self.gain


class BiasInPlace(Own):
    def updated_bias(self, bias):
        return bias.add_(1)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (InPlace, "InPlace.updated changed the weight of '0' in place; return a new tensor."),
        (BehindTheBack, "BehindTheBack.updated changed the weight of '0' in place; return a new tensor."),
        (BiasInPlace, "BiasInPlace.updated_bias changed the bias of '0' in place; return a new tensor."),
        (Narrow, "Narrow.delta() returned a tensor of shape (2, 1) for '0'; expected a new tensor of shape (2, 8)."),
        (
            Transposed,
            "Transposed.updated(weight) returned a tensor of shape (8, 2) for '0'; expected a new tensor of shape "
            "(2, 8).",
        ),
        (Forgotten, "Forgotten.updated(weight) returned None for '0'; expected a new tensor of shape (2, 8)."),
        (NoBias, "NoBias.updated_bias(bias) returned None for '0'; expected a new tensor of shape (2,)."),
        (
            WideBias,
            "WideBias.updated_bias(bias) returned a tensor of shape (2, 1) for '0'; expected a new tensor of shape "
            "(2,).",
        ),
    ],
)
def test_a_wrong_update_is_refused_before_anything_is_changed(update, message):
    refused(update, message)


def test_in_place_changes_are_seen_without_values_and_in_inference_mode():
    message = "InPlace.updated changed the weight of '0' in place; return a new tensor."
    with torch.device("meta"):
        refused(InPlace, message, nn.Sequential(nn.Linear(8, 2)))

    class Gains(InPlace):
        def updated(self, weight):
            return weight.mul_(2)

    with torch.inference_mode(), pytest.raises(ValueError, match="changed the weight of '0' in place"):
        lp.inject(net(), method_of(Gains)[0])


def test_only_the_first_adapter_of_a_class_is_called_with_a_copy_in_float32():
    model = net(dtype=torch.bfloat16)
    method, calls = method_of(Scale)
    lp.inject(model, method)
    (weight,) = calls
    assert weight.dtype == torch.float32
    assert not weight.requires_grad
    assert torch.equal(weight, model[0].weight.float())
    assert weight.data_ptr() != model[0].weight.data_ptr()
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    assert torch.equal(model(x), net(dtype=torch.bfloat16)(x))


def test_the_rows_of_a_fused_layer_arrive_alone():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

        def forward(self, x):
            return self.qkv(x)

    calls = []

    class Part(Method):
        def adapters(self, model):
            from lightning_peft.core import Rows

            return [("qkv", Scale(model.qkv, Rows("key", 4, 8), calls))]

    model = Fused()
    lp.inject(model, Part(name="part"))
    assert torch.equal(calls[0], model.qkv.weight[4:8])


def test_a_layer_without_bias_gives_none():
    class Shift(Own):
        def updated_bias(self, bias):
            self.calls.append(bias)
            return self.gain.flatten()

    method, calls = method_of(Shift)
    lp.inject(net(bias=False), method)
    assert calls == [None]


def test_the_check_draws_no_random_numbers():
    class Noisy(Own):
        def delta(self):
            return torch.randn(self.shape) * self.gain

    model = net()
    before = torch.get_rng_state()
    lp.inject(model, method_of(Noisy)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_class_that_is_not_ready_at_injection_is_called_later():
    class Late(Own):
        ready = False

        def delta(self):
            if not self.ready:
                raise RuntimeError("not ready")
            return self.gain.expand(self.shape)

    model = lp.inject(net(), method_of(Late)[0])
    with pytest.raises(RuntimeError, match="not ready"):
        model(torch.ones(1, 8))
    for *_, adapter in lp.adapters(model):
        adapter.ready = True
    assert torch.equal(model(torch.ones(1, 8)), net()(torch.ones(1, 8)))


def test_values_that_are_no_numbers_are_no_change():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    assert len(list(lp.adapters(lp.inject(model, method_of(Scale)[0])))) == 2
