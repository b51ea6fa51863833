"""What is trusted of bitsandbytes and torchao holds in the installed releases."""

import pytest
import torch
from torch import nn

from lightning_peft.quantization.nf4 import store
from lightning_peft.structure import bitsandbytes_api, torchao_api
from lightning_peft.structure.layer_of import layer_of

pytestmark = pytest.mark.filterwarnings("ignore")  # both speak of kernels for other devices when they are imported


def linear(library):
    torch.manual_seed(0)
    host = nn.Linear(128, 64)
    weight = host.weight.detach().clone()
    if library is not None:
        store(host, weight, library)
    return host, weight


def path_of(cls):
    return f"{cls.__module__}.{cls.__qualname__}"


def test_layers_of_bitsandbytes_are_where_their_types_are_looked_up():
    """Else a base that somebody else quantized is refused, or read as bytes."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    assert path_of(modules.Linear4bit) == bitsandbytes_api.LINEAR_4BIT
    assert path_of(modules.Linear8bitLt) == bitsandbytes_api.LINEAR_8BIT


def test_a_layer_of_bitsandbytes_gives_back_what_it_stores():
    pytest.importorskip("bitsandbytes")
    host, weight = linear("bitsandbytes")
    x = torch.randn(3, 128, requires_grad=True)
    read = layer_of(host).read(host)
    torch.testing.assert_close(host.eval()(x), x @ read.T + host.bias, atol=1e-4, rtol=1e-4)
    assert 1e-3 < (read - weight).norm() / weight.norm() < 0.15
    assert bitsandbytes_api.read_4bit(host).shape == (64, 128)


def test_a_layer_of_bitsandbytes_does_not_store_its_weight_anew():
    """Else evaluation rounds the base on some processors, and passes no gradient afterwards."""
    pytest.importorskip("bitsandbytes")
    host, _ = linear("bitsandbytes")
    switches = [name for name, value in vars(host).items() if name.startswith("support_") and value]
    assert not switches, "bitsandbytes switches storing anew by another attribute"
    x = torch.randn(3, 128, requires_grad=True)
    before = host.weight.detach().clone()
    with torch.no_grad():
        host.eval()(x)
    assert torch.equal(host.weight, before)
    host(x).sum().backward()
    assert x.grad.isfinite().all()
    bitsandbytes_api.check_not_repacked({"host": host})
    host.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="host was repacked by bitsandbytes"):
        bitsandbytes_api.check_not_repacked({"host": host})


def test_what_a_layer_of_bitsandbytes_keeps_beside_its_weight_is_forgotten():
    pytest.importorskip("bitsandbytes")
    host, _ = linear("bitsandbytes")
    assert host.quant_state is not None
    bitsandbytes_api.forget_state(host)
    assert "quant_state" not in vars(host)


def test_torchao_stores_four_bits_as_its_names_say():
    """Else codes, scales and their mean are taken for one another."""
    pytest.importorskip("torchao")
    _, weight = linear(None)
    stored = torchao_api.to_nf4(weight, 64, 128)
    assert stored.codes.dtype == torch.uint8
    assert stored.codes.numel() == weight.numel() // 2
    assert stored.codes8.shape == (1, 128)
    assert stored.factor.shape == (1,)
    assert stored.codebook.tolist() == sorted(stored.codebook.tolist())
    scales = weight.view(-1, 64).abs().amax(1)
    torch.testing.assert_close(
        (stored.codes8 / stored.factor[:, None]).flatten() + stored.mean, scales, rtol=0, atol=1e-3
    )


def test_a_tensor_of_torchao_is_read_as_the_weight_that_it_stands_for():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    host, weight = linear(None)
    quantize_(host, Int8WeightOnlyConfig())
    assert type(host.weight) is not nn.Parameter
    assert any(path_of(cls) in torchao_api.WEIGHTS for cls in type(host.weight).__mro__)
    torch.testing.assert_close(layer_of(host).read(host), weight, rtol=0, atol=1e-3)
