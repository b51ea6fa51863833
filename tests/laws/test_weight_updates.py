"""Every method that updates weights, on every kind of layer, in both types: beside formulas and beside a peer."""

import copy
import dataclasses
import importlib.util

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.structure.layer_of import layer_of

TARGETS = {"targets": ["layer"]}
METHODS = {
    "lora": lp.LoRA(rank=4, alpha=6, **TARGETS),
    "rslora": lp.LoRA(rank=4, alpha=6, scaling="rank_stabilized", **TARGETS),
    "orthogonal": lp.LoRA(rank=4, init="orthogonal", **TARGETS),
    "pissa": lp.LoRA(rank=4, alpha=6, init="pissa", **TARGETS),
    "olora": lp.LoRA(rank=4, alpha=6, init="olora", **TARGETS),
    "dora": lp.LoRA(rank=4, alpha=6, decompose=True, **TARGETS),
    "adalora": lp.AdaLoRA(initial_rank=4, target_rank=2, alpha=6, **TARGETS),
    "fedpara": lp.FedPara(rank=4, **TARGETS),
    "fedpara, tanh": lp.FedPara(rank=4, tanh=True, **TARGETS),
    "fedpara, narrow": lp.FedPara(rank=1, **TARGETS),
    "pfedpara": lp.FedPara(rank=4, personalized=True, **TARGETS),
    "krona": lp.KronA(scale=2, **TARGETS),
}


IA3 = {
    "ia3": lp.IA3(targets=["layer"], feedforward_targets=[]),
    "ia3, inputs": lp.IA3(targets=[], feedforward_targets=["layer"]),
}


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(64, 32)


def quantized():
    return lp.quantize(nn.Sequential(nn.Linear(64, 48)), "nf4", ["0"])[0]


ROLES = ["attention.query", "attention.key", "attention.value"]
LAYERS = {  # how to make it, the shape of inputs, what names it
    "linear": (lambda: nn.Linear(32, 64), (40, 32), "layer"),
    "conv1d of transformers": (conv1d, (3, 20, 32), "layer"),
    "conv2d": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 9, 9), "layer"),
    "fused qkv, grouped heads": (lambda: nn.Linear(32, 64), (40, 32), "qkv_proj"),  # 32 + 16 + 16 rows
    "quantized linear": (quantized, (40, 64), "layer"),
}
TYPES = {"float32": (torch.float32, 1e-5), "bfloat16": (torch.bfloat16, 0.03)}


class Net(nn.Module):
    def __init__(self, name, layer):
        super().__init__()
        self.add_module(name, layer)

    def forward(self, x):
        return next(iter(self.children()))(x)


def build(layer, method):
    """Return a net, an input and its adapters, whose tensors all matter."""
    make, shape, name = LAYERS[layer]
    if layer.startswith("quantized"):
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = make()
    net = Net(name, base)
    if method is not None:
        lp.inject(net, method)
    for *_, adapter in lp.adapters(net):
        for parameter in adapter.parameters():
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return net, torch.randn(shape), [adapter for *_, adapter in lp.adapters(net)]


def updated(name, w, p, shape):
    """The updated weight (out, in, *kernel), in float64, from named tensors."""
    rows = w.flatten(1)

    def low_rank(scale):
        return scale * p["b"] @ p["a"].flatten(1)

    if name in ("lora", "orthogonal"):
        return w + low_rank((6 if name == "lora" else 16) / 4).view(shape)
    if name == "rslora":
        return w + low_rank(6 / 2).view(shape)
    if name in ("pissa", "olora"):
        return w + (low_rank(1.5) - 1.5 * p["b0"] @ p["a0"].flatten(1)).view(shape)
    if name == "dora":
        v = rows + low_rank(1.5)
        return (p["magnitude"][:, None] * v / v.detach().square().sum(1, keepdim=True).sqrt()).view(shape)
    if name == "adalora":
        return w + 6 / (4 + 1e-5) * (p["b"] @ p["e"].diag() @ p["a"].flatten(1)).view(shape)
    if name == "krona":
        if w.dim() == 2:
            return w + 2 * torch.kron(p["a"], p["b"]).T
        places = [2 * torch.kron(p["a"], place).T for place in p["b"].flatten(2).unbind(2)]
        return w + torch.stack(places, -1).view(shape)
    one, two = (
        p[f"x{i}"] @ p[f"y{i}"].T
        if f"t{i}" not in p
        else torch.einsum("ab...,oa,ib->oi...", p[f"t{i}"], p[f"x{i}"], p[f"y{i}"])
        for i in (1, 2)
    )
    if "tanh" in name:
        one, two = one.tanh(), two.tanh()
    return w + one * (two + (name == "pfedpara"))


def reference(name, layer, net, adapters, x):
    """Output and gradients from the updated weight alone, in float64."""
    host = next(iter(net.children()))
    base = layer_of(host).read(host).double()
    tensors = [{n: t.detach().double() for n, t in a.state_dict().items()} for a in adapters]
    trained = [{n: tensors[i][n].requires_grad_() for n, _ in a.named_parameters()} for i, a in enumerate(adapters)]
    weight, start = [], 0
    for adapter, named in zip(adapters, tensors, strict=True):
        rows = adapter.shape[0]
        weight.append(updated(name, base[start : start + rows], named, adapter.shape))
        start += rows
    weight, bias, x = torch.cat(weight), host.bias.detach().double(), x.detach().double().requires_grad_()
    conv = layer == "conv2d"
    y = nn.functional.conv2d(x, weight, bias, stride=2, padding=1) if conv else x @ weight.T + bias
    inputs = [x, *(t for named in trained for t in named.values())]
    return y, torch.autograd.grad(y.square().mean(), inputs)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", METHODS)
def test_values_and_gradients_are_those_of_the_updated_weight(name, layer, dtype):
    kind, tolerance = TYPES[dtype]
    method = dataclasses.replace(METHODS[name], targets=ROLES if "qkv" in layer else ["layer"])
    net, x, adapters = build(layer, method)
    net, x = net.to(kind), x.to(kind).requires_grad_()
    assert len(adapters) == (3 if "qkv" in layer else 1)
    trained = [p for adapter in adapters for p in adapter.parameters()]
    assert all(p.dtype == torch.float32 for p in trained)
    y = net(x)
    assert y.dtype == kind
    gradients = torch.autograd.grad(y.float().square().mean(), [x, *trained])
    expected, wanted = reference(name, layer, net, adapters, x)
    differences = [
        ((a.double() - b).abs().max() / b.abs().max()).item()
        for a, b in zip((y, *gradients), (expected, *wanted), strict=True)
    ]
    print(f"{name:16} {layer:26} {dtype:9} largest difference: {max(differences):.1e}")
    assert max(differences) < tolerance


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if "quantized" not in layer])  # which writing refuses
def test_rows_that_are_written_are_those_that_are_read_and_the_others_stay(layer):
    torch.manual_seed(0)
    host = LAYERS[layer][0]()
    layer_type = layer_of(host)
    before = layer_type.read(host).detach().clone()
    rows = torch.randn(3, *before.shape[1:])
    layer_type.write(host, rows, 2)
    torch.testing.assert_close(layer_type.read(host).detach(), torch.cat([before[:2], rows, before[5:]]))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("inputs", [False, True], ids=["outputs", "inputs"])
@pytest.mark.parametrize("layer", LAYERS)
def test_ia3_scales_outputs_or_inputs(layer, inputs, dtype):
    kind, tolerance = TYPES[dtype]
    if inputs and "qkv" in layer:
        pytest.skip("no paper scales the inputs of a fused layer")
    ends = ROLES if "qkv" in layer else ["layer"]
    method = lp.IA3(targets=ends, feedforward_targets=[])
    if inputs:
        method = lp.IA3(targets=[], feedforward_targets=ends)
    net, x, adapters = build(layer, method)
    net, x = net.to(kind), x.to(kind).requires_grad_()
    y = net(x)
    gradients = torch.autograd.grad(y.float().square().mean(), [x, *(a.scales for a in adapters)])
    host = next(iter(net.children()))
    weight, bias = layer_of(host).read(host).double(), host.bias.detach().double()
    z, scales = x.detach().double().requires_grad_(), [a.scales.detach().double().requires_grad_() for a in adapters]
    places = (-1, 1, 1) if layer == "conv2d" else (-1,)
    into = z * torch.cat(scales).view(places) if inputs else z
    conv = layer == "conv2d"
    out = nn.functional.conv2d(into, weight, bias, stride=2, padding=1) if conv else into @ weight.T + bias
    expected = out if inputs else out * torch.cat(scales).view(places)
    wanted = torch.autograd.grad(expected.square().mean(), [z, *scales])
    pairs = zip((y, *gradients), (expected, *wanted), strict=True)
    differences = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    print(f"ia3 {layer:26} {dtype:9} largest difference: {max(differences):.1e}")
    assert max(differences) < tolerance
    if not layer.startswith("quantized") and dtype == "float32":
        torch.testing.assert_close(lp.merge(net)(x), y, atol=1e-5, rtol=1e-4)


def copy_ia3(ours, theirs):
    vector = theirs.ia3_l["default"]
    vector.copy_(ours.scales.view(vector.shape))


def copy_low_rank(ours, theirs):
    for one, name in ((ours.a, "lora_A"), (ours.b, "lora_B")):
        factor = getattr(theirs, name)["default"]
        weight = factor if isinstance(factor, nn.Parameter) else factor.weight
        weight.copy_(one.reshape(weight.shape))
    if getattr(ours, "magnitude", None) is not None:
        magnitude = theirs.lora_magnitude_vector["default"].weight
        magnitude.copy_(ours.magnitude.view(magnitude.shape))
    if hasattr(ours, "e"):
        theirs.lora_E["default"].copy_(ours.e[:, None])


def copy_loha(ours, theirs):
    for i in (1, 2):
        x, y, t = (getattr(ours, f"{name}{i}") for name in "xyt")
        getattr(theirs, f"hada_w{i}_a")["default"].copy_(x if t is None else x.T)
        getattr(theirs, f"hada_w{i}_b")["default"].copy_(y.T)
        if t is not None:
            getattr(theirs, f"hada_t{i}")["default"].copy_(t)


def copy_lokr(ours, theirs):
    theirs.lokr_w1["default"].copy_(ours.a.T)
    w2 = theirs.lokr_w2["default"]
    w2.copy_(ours.b.transpose(0, 1).reshape(w2.shape))


def peers():
    import peft

    lora = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"]}
    return {
        "ia3": (peft.IA3Config(target_modules=["layer"], feedforward_modules=[]), copy_ia3),
        "ia3, inputs": (peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"]), copy_ia3),
        "lora": (peft.LoraConfig(**lora), copy_low_rank),
        "rslora": (peft.LoraConfig(use_rslora=True, **lora), copy_low_rank),
        "dora": (peft.LoraConfig(use_dora=True, **lora), copy_low_rank),
        "pissa": (peft.LoraConfig(init_lora_weights="pissa", **lora), copy_low_rank),
        "adalora": (
            peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=10, target_modules=["layer"]),
            copy_low_rank,
        ),
        "fedpara": (peft.LoHaConfig(r=4, alpha=4, target_modules=["layer"], use_effective_conv2d=True), copy_loha),
        "krona": (
            peft.LoKrConfig(r=64, alpha=128, target_modules=["layer"], decompose_both=False, decompose_factor=8),
            copy_lokr,
        ),
    }


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layer", ["linear", "conv1d of transformers", "conv2d", "quantized linear"])
@pytest.mark.parametrize("name", [*IA3, "lora", "rslora", "dora", "pissa", "adalora", "fedpara", "krona"])
def test_it_equals_peft_with_copied_weights(name, layer, dtype):
    """Where peft has the method for the layer."""
    import peft

    config, copy_weights = copy.deepcopy(peers()[name])
    method = (METHODS | IA3)[name]
    if "conv1d" in layer and hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = True
    plain, x, _ = build(layer, None)
    plain.is_loaded_in_4bit = layer.startswith("quantized")
    if name in ("fedpara", "krona") and layer.startswith("quantized"):
        pytest.skip("peft takes the packed bytes of 4-bit weights for a shape")
    try:
        theirs = peft.get_peft_model(copy.deepcopy(plain), config).base_model.model
    except (ValueError, TypeError, NotImplementedError) as error:
        pytest.skip(f"peft has no {name} for this layer: {error}")
    host = dict(theirs.named_modules())["layer"]
    if name == "krona":
        method = lp.KronA(scale=2, shape_a=list(host.lokr_w1["default"].T.shape), targets=["layer"])
    net, x, (adapter,) = build(layer, method)
    with torch.no_grad():
        copy_weights(adapter, host)
    kind, tolerance = TYPES[dtype]
    inputs = [x.detach().to(kind).requires_grad_() for _ in range(2)]
    y, z = net.to(kind)(inputs[0]).float(), theirs.to(kind)(inputs[1]).float()
    difference = (y - z).abs().max().item()
    gradients = [torch.autograd.grad(t.square().mean(), i)[0] for t, i in zip((y, z), inputs, strict=True)]
    of_gradients = (gradients[0] - gradients[1]).abs().max().item()
    size = z.abs().max().item(), gradients[1].abs().max().item()
    print(
        f"{name:8} {layer:23} {dtype:8} max difference {difference:.1e} of {size[0]:.1f}, gradient {of_gradients:.1e}"
    )
    assert difference < tolerance * size[0]
    assert of_gradients < tolerance * size[1]
