"""A quantized base computes with the weight that it says, trains adapters, and is the same base as before."""

import copy
import math
import pickle
import subprocess
import sys
import weakref

import models
import pytest
import torch
from installed import needs
from models import MODELS, logits, tokens
from torch import nn

import lightning_peft as lp
from lightning_peft.checkpoints.adapter_state import drop_base, drop_missing_base_keys
from lightning_peft.core.fingerprint import fingerprint
from lightning_peft.quantization import nf4
from lightning_peft.structure.layer_of import layer_of
from lightning_peft.structure.quantized import QuantizedType
from lightning_peft.structure.quantized_linear import Int8Linear
from lightning_peft.structure.selection import select_modules
from lightning_peft.structure.torchao_api import nf4_tensor

pytestmark = needs("bitsandbytes", "torchao")

WAYS = [("nf4", "bitsandbytes"), ("nf4", "torchao"), ("int8", None)]
# The authors' table, as printed in bitsandbytes.
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


@pytest.fixture(params=WAYS, ids=lambda way: "-".join(filter(None, way)))
def way(request, monkeypatch):
    if request.param[1] == "bitsandbytes":
        monkeypatch.setattr(models, "WIDTH", 128)  # on CPU it needs rows of whole blocks
    return request.param


def quantized(model, way, targets=("all-linear",)):
    kind, backend = way
    return lp.quantize(model, kind, targets, backend)


def layer(way, rows=64, columns=256, dtype=torch.float32, bias=True):
    torch.manual_seed(1)
    return quantized(nn.Sequential(nn.Linear(columns, rows, bias=bias, dtype=dtype)), way, ["0"])[0]


def read(host):
    return layer_of(host).read(host)


def lora():
    return lp.LoRA(targets=["all-linear"], rank=4, alpha=8)


def stored(model):
    """Return copies of all bytes that belong to weights of quantized layers."""
    return {name: value.clone() for name, value in model.state_dict().items() if ".peft." not in name}


def disturb(model):
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@torch.no_grad()
def run(model):
    return logits(model(tokens()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_both_passes_use_the_weight_that_is_read(way, bias, training):
    host = layer(way, bias=bias).train(training)
    assert host.weight.dtype in (torch.uint8, torch.int8)
    assert layer_of(host).shape(host) == (64, 256)
    weight = read(host)
    assert weight.shape == (64, 256)
    assert weight.dtype == torch.float32
    x = torch.randn(3, 5, 256, requires_grad=True)
    y = host(x)
    torch.testing.assert_close(y, nn.functional.linear(x, weight, host.bias), atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(host(x), y, atol=1e-5, rtol=1e-5)
    assert torch.equal(read(host), weight)


def test_quantization_errs_as_little_as_it_should(way):
    torch.manual_seed(1)
    weight = nn.Linear(256, 64).weight
    error = (read(layer(way)) - weight).norm() / weight.norm()
    assert error < (0.1 if way[0] == "nf4" else 0.005)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_outputs_have_the_type_of_inputs(way, dtype):
    x = torch.randn(2, 256, dtype=dtype, requires_grad=True)
    host = layer(way, dtype=dtype)
    y = host(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(
        y, nn.functional.linear(x, read(host).to(dtype), host.bias.to(dtype)), atol=2e-2, rtol=2e-2
    )


def test_autocast_reaches_the_input_with_its_gradient(way):
    host, x = layer(way), torch.randn(2, 256, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = host(x)
    y.float().sum().backward()
    torch.testing.assert_close(x.grad, read(host).sum(0).expand(2, -1), atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("rows", [64, 1])
def test_copies_are_independent_and_equal(way, copied, rows):
    host = layer(way, rows)
    other = copied(host)
    x = torch.randn(2, 256)
    assert torch.equal(other(x), host(x))
    weight = read(host).clone()
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(read(host), weight)
    assert not torch.equal(read(other), weight)


def test_narrower_types_and_moves_leave_the_weight(way):
    host = layer(way)
    weight = read(host).clone()
    assert torch.equal(read(host.bfloat16().to("cpu")), weight)
    assert host(torch.randn(2, 256, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("way", WAYS[1:], ids=["torchao", "int8"])
def test_own_layers_load_their_own_state(way):
    host, other = layer(way), quantized(nn.Sequential(nn.Linear(256, 64)), way, ["0"])[0]
    other.load_state_dict(host.state_dict())
    assert torch.equal(read(other), read(host))


@pytest.mark.parametrize("way", WAYS[1:], ids=["torchao", "int8"])
def test_own_layers_keep_no_decoded_weight_for_backward(way):
    host, sizes = layer(way), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        host(torch.randn(1, 256, requires_grad=True))
    assert sum(sizes) < 1.1 * host.weight.nbytes + 1024


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "plain"])
def test_adapters_train_on_a_quantized_base(way, name):
    model = quantized(MODELS[name](), way)
    lp.inject(model, lora())
    before, adapters = stored(model), {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    run(model)  # in eval mode, where bitsandbytes stores the weight anew on some processors
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(2):
        logits(model(tokens())).square().mean().backward()
        optimizer.step()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(adapters)
    assert all(not torch.equal(p, adapters[n]) for n, p in model.named_parameters() if n in adapters)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    after = stored(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    torch.testing.assert_close(run(copy.deepcopy(model)), run(model))
    torch.testing.assert_close(run(pickle.loads(pickle.dumps(model))), run(model))


def test_heads_embeddings_and_norms_stay(way):
    base, model = MODELS["llama"](), quantized(MODELS["llama"](), way)
    hosts = select_modules(base, ["all-linear"])
    weights = {f"{name}.weight" for name in hosts}
    assert "lm_head" not in hosts
    assert len(hosts) == 21
    for name, _ in base.named_parameters():
        assert (model.get_parameter(name).dtype != torch.float32) == (name in weights)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in base.named_parameters()]


def test_checkpoints_keep_nothing_of_the_quantized_base(way):
    model = lp.inject(quantized(MODELS["llama"](), way), lora())
    model.register_state_dict_post_hook(drop_base)
    model.register_load_state_dict_post_hook(drop_missing_base_keys)
    state = model.state_dict()
    assert len(state) == 42
    assert all(".peft." in key for key in state)
    with lp.full_state_dict(model):
        assert len(model.state_dict()) > 60
    assert not model.load_state_dict(state).missing_keys


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_the_base_is_the_same_base_before_and_after(way, name, tmp_path):
    plain = lp.inject(MODELS[name](), lora())
    model = lp.inject(quantized(MODELS[name](), way), lora())
    other = MODELS[name]()
    next(iter(select_modules(other, ["all-linear"]).values())).weight.data.mul_(1.5)
    assert fingerprint(plain) == fingerprint(model) == fingerprint(copy.deepcopy(model).bfloat16())
    assert fingerprint(model) != fingerprint(lp.inject(quantized(other, way), lora()))

    lp.save_adapter(disturb(model), tmp_path / "quantized")
    torch.testing.assert_close(run(lp.load_adapter(quantized(MODELS[name](), way), tmp_path / "quantized")), run(model))
    loaded = lp.load_adapter(MODELS[name](), tmp_path / "quantized")
    lp.save_adapter(loaded, tmp_path / "plain")
    torch.testing.assert_close(run(lp.load_adapter(quantized(MODELS[name](), way), tmp_path / "plain")), run(model))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dequantized_layers_are_what_they_were_and_can_be_merged(way, name):
    base, model = MODELS[name](), quantized(MODELS[name](), way)
    disturb(lp.inject(model, lora()))
    y = run(model)
    with pytest.raises(TypeError, match="is quantized.*dequantize=True"):
        lp.merge(model)
    host = next(iter(select_modules(model, ["all-linear"]).values()))
    with pytest.raises(TypeError, match="dequantize before merging"):
        layer_of(host).write(host, torch.zeros(layer_of(host).shape(host)))
    error = lp.dequantize(model)
    torch.testing.assert_close(run(model), y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run(lp.merge(model)), y, atol=1e-4, rtol=1e-4)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in base.state_dict().items()}
    assert 0 < error < (0.12 if way[0] == "nf4" else 0.01)
    with pytest.raises(ValueError, match="nothing to dequantize"):
        lp.dequantize(model)


def test_dequantize_measures_the_error(way):
    base, model = MODELS["bert"](), copy.deepcopy(quantized(MODELS["bert"](), way))
    error = lp.dequantize(model)
    weights = [
        (host.weight, model.get_submodule(name).weight) for name, host in select_modules(base, ["all-linear"]).items()
    ]
    squares = sum((old - new).square().sum() for old, new in weights)
    assert error == pytest.approx((squares / sum(old.square().sum() for old, _ in weights)).sqrt().item(), rel=1e-4)


def test_each_original_is_released_before_the_next_is_touched(monkeypatch):
    model = MODELS["llama"]()
    originals = [weakref.ref(host.weight) for host in select_modules(model, ["all-linear"]).values()]
    alive, encode = [], Int8Linear.encode
    monkeypatch.setattr(Int8Linear, "encode", lambda *args: alive.append(count()) or encode(*args))

    def count():
        return sum(original() is not None for original in originals)

    lp.quantize(model, "int8")
    assert alive == [*range(21, 0, -1)]
    assert count() == 0


@pytest.mark.filterwarnings("ignore:.*[Dd]eprecat.*:UserWarning")  # torchao before 0.18 warns of itself
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")  # bitsandbytes 0.49 does
def test_layers_of_the_libraries_are_known():
    import bitsandbytes as bnb
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def as_torchao(host):
        quantize_(host, Int8WeightOnlyConfig())
        return host

    def as_nf4(host):
        host.weight = nn.Parameter(nf4_tensor(host.weight.detach(), 64, 256), requires_grad=False)
        return host

    def as_bnb(make):
        def convert(host):
            new = make(256, 128, bias=True)
            new.load_state_dict(host.state_dict())
            return new.to("cpu")

        return convert

    def linear_8bit(*args, **kwargs):
        return bnb.nn.Linear8bitLt(*args, has_fp16_weights=False, **kwargs)

    for convert in (as_torchao, as_nf4, as_bnb(bnb.nn.Linear4bit), as_bnb(linear_8bit)):
        base = nn.Linear(256, 128)
        host = convert(copy.deepcopy(base))
        assert isinstance(layer_of(host), QuantizedType)
        assert layer_of(host).shape(host) == (128, 256)
        x = torch.randn(2, 256)
        weight = read(host)
        for _ in range(2):  # bitsandbytes changes what it stores when it is called
            host.eval()
            with torch.no_grad():
                torch.testing.assert_close(host(x), x @ weight.T + host.bias, atol=2e-2, rtol=2e-2)
            torch.testing.assert_close(read(host), weight, atol=1e-3, rtol=1e-2)
        assert (weight - base.weight).norm() < 0.12 * base.weight.norm()
        model = nn.Sequential(host, nn.Linear(128, 2))
        with pytest.raises(ValueError, match="0 is quantized already"):
            lp.quantize(model, "int8", ["0"])
        assert math.isnan(lp.dequantize(model))
        assert type(model[0]) is nn.Linear
        torch.testing.assert_close(model[0](x), x @ weight.T + base.bias, atol=2e-2, rtol=2e-2)


def test_the_codebook_is_made_of_normal_quantiles():
    end = 0.9677083
    upper, lower = (torch.linspace(end, 0.5, n)[:-1].double() for n in (9, 8))  # in float32, as the authors' code
    ndtri = torch.special.ndtri
    made = torch.cat([ndtri(upper), torch.zeros(1, dtype=torch.float64), -ndtri(lower)]).sort().values
    made /= made.max()
    printed = torch.tensor(NF4, dtype=torch.float64)
    of_bitsandbytes = layer(("nf4", "bitsandbytes")).weight.quant_state.code.double()
    of_torchao = layer(("nf4", "torchao")).codebook.double()
    assert torch.equal(of_bitsandbytes, printed)
    print("largest difference of the formula:", (made - printed).abs().max().item())  # 4.3e-8
    assert (made - printed).abs().max() < 1e-7
    assert (of_torchao - printed).abs().max() < 1e-4  # its table has fewer digits


def test_packed_bytes_decode_to_the_weight_that_is_read():
    torch.manual_seed(1)
    weight = nn.Linear(512, 256).weight.detach()
    host = layer(("nf4", "bitsandbytes"), 256, 512)
    packed, state = host.weight.detach().flatten(), host.weight.quant_state
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten().long()  # the first value in the high half
    table = state.state2.code[state.absmax.long()]  # 8 bits through a table of 256 entries, less the mean
    absmax = (table.view(-1, 256) * state.state2.absmax[:, None]).flatten() + state.offset
    blocks = weight.view(-1, 64)
    torch.testing.assert_close(absmax, blocks.abs().amax(1), atol=0, rtol=0.02)
    decoded = torch.tensor(NF4)[codes].view(-1, 64) * absmax[:, None]
    torch.testing.assert_close(decoded.view(256, 512), read(host), atol=1e-7, rtol=1e-5)
    nearest = (blocks[:, :, None] / blocks.abs().amax(1)[:, None, None] - torch.tensor(NF4)).abs().argmin(-1)
    assert (nearest.flatten() == codes).float().mean() > 0.9999  # but for ties


def test_bits_for_each_value():
    host = layer(("nf4", "bitsandbytes"), 1024, 2048, bias=False)
    values, state = 1024 * 2048, host.weight.quant_state
    assert host.weight.nbytes * 8 / values == 4
    statistics = (state.absmax.nbytes + state.state2.absmax.nbytes) * 8 / values
    assert statistics == 8 / 64 + 32 / (64 * 256)
    tables = state.code.nbytes + state.state2.code.nbytes + state.offset.nbytes
    everything = sum(tensor.nbytes for tensor in host.state_dict().values()) + state.offset.nbytes
    print("bits for each value:", 4 + statistics, "with tables:", 4 + statistics + tables * 8 / values)
    assert 4 + statistics + tables * 8 / values == pytest.approx(4.127, abs=0.005)
    assert everything * 8 / values == pytest.approx(4.127, abs=0.01)

    host = layer(("nf4", "torchao"), 1024, 2048, bias=False)
    assert sum(tensor.nbytes for tensor in host.stored()) * 8 / values == pytest.approx(4.127, abs=0.001)
    host = layer(("int8", None), 1024, 2048, bias=False)
    assert sum(tensor.nbytes for tensor in host.stored()) * 8 / values == 8 + 32 / 2048


def test_own_decoding_of_nf4_is_that_of_torchao():
    torch.manual_seed(1)
    weight = nn.Linear(512, 256).weight.detach()
    assert torch.equal(read(layer(("nf4", "torchao"), 256, 512)), nf4_tensor(weight, 64, 256).get_original_weight())


def test_zeros_stay_zeros(way):
    model = nn.Sequential(nn.Linear(64, 64))
    nn.init.zeros_(model[0].weight)
    assert not read(quantized(model, way, ["0"])[0]).any()
    assert lp.dequantize(model) == 0


def refused(model, error, match, **arguments):
    before = {n: (type(m), [*m._parameters.values()]) for n, m in model.named_modules()}
    with pytest.raises(error, match=match):
        lp.quantize(model, **{"kind": "int8", **arguments})
    after = {n: (type(m), [*m._parameters.values()]) for n, m in model.named_modules()}
    assert before.keys() == after.keys()
    for name, (cls, parameters) in before.items():
        assert after[name][0] is cls
        assert all(old is new for old, new in zip(parameters, after[name][1], strict=True))


def test_refusals_change_nothing():
    plain = MODELS["plain"]
    refused(plain(), ValueError, "kind='int4' is unknown; choose one of nf4, int8", kind="int4")
    refused(plain(), ValueError, "backend='hqq' does not fit", kind="nf4", backend="hqq")
    refused(plain(), ValueError, "int8 needs none", backend="torchao")
    refused(plain(), ValueError, "no_such_layer", targets=["fc1", "no_such_layer"])
    refused(plain(), TypeError, "embed is a Embedding, no linear layer", targets=["*"])
    refused(plain(), TypeError, "trunk.blocks.0 is a Block", targets=["fc1", "blocks"])
    refused(lp.inject(plain(), lora()), RuntimeError, "quantize before inject")
    refused(lp.inject(plain(), lp.BitFit()), RuntimeError, "quantize before inject")
    refused(quantized(plain(), ("int8", None), ["fc2"]), ValueError, "blocks.0.fc2 is quantized already")
    tied = plain()
    tied.trunk.blocks[2].fc1.weight = tied.trunk.blocks[0].fc1.weight
    refused(tied, ValueError, "fc1 shares its weight")
    hooked = plain()
    hooked.trunk.blocks[1].fc1.forward = hooked.trunk.blocks[1].fc1.forward
    refused(hooked, TypeError, "blocks.1.fc1 .Linear. is no plain linear layer")
    normed = plain()
    nn.utils.parametrizations.weight_norm(normed.trunk.blocks[1].fc2)
    refused(normed, TypeError, "blocks.1.fc2 .ParametrizedLinear. is no plain linear layer", targets=["fc2"])
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2, enable_nested_tensor=False)
    refused(encoder, TypeError, "layers.0.self_attn is a MultiheadAttention, no linear layer that is called")
    odd = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 2))
    refused(odd, ValueError, r"0 of shape \(5, 7\) cannot be stored by torchao", kind="nf4", targets=["0"])
    refused(plain(), ValueError, "blocks of 64 values .bitsandbytes on CPU", kind="nf4", backend="bitsandbytes")


def test_without_a_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nf4, "_runs", lambda library, device: False)
    refused(MODELS["plain"](), ImportError, r"pip install 'lightning-peft\[quantize\]'", kind="nf4")
    lp.quantize(MODELS["plain"](), "int8")


def test_the_second_library_serves_where_the_first_does_not_run(monkeypatch):
    monkeypatch.setattr(nf4, "_runs", lambda library, device: library == "torchao")
    assert type(lp.quantize(MODELS["plain"](), "nf4").trunk.blocks[0].fc1).__name__ == "NF4Linear"


def test_the_second_library_serves_where_the_first_cannot_store_a_shape():
    model = MODELS["llama"]()  # rows of 32 and 48 values
    assert type(lp.quantize(model, "nf4").get_submodule("model.layers.0.mlp.up_proj")).__name__ == "NF4Linear"
    assert lp.dequantize(model) < 0.12


def test_real_widths_are_stored_by_bitsandbytes():
    model = lp.quantize(nn.Sequential(nn.Linear(384, 96)), "nf4", ["0"])
    assert type(model[0]).__name__ == "Linear4bit"
    assert lp.dequantize(model) < 0.12


@pytest.mark.slow
def test_quantized_layers_compile_whole_with_their_adapters(way):
    model = lp.inject(
        quantized(nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64)), way, ["0", "1"]), lp.LoRA(targets=["0"])
    )
    x = torch.randn(4, 128)
    torch._dynamo.reset()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, model(x))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_libraries_are_imported_when_needed_and_in_silence():
    code = """
import sys, torch, lightning_peft as lp
assert not {"bitsandbytes", "torchao"} & sys.modules.keys()
state = torch.get_rng_state()
for backend in ("bitsandbytes", "torchao"):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    state = torch.get_rng_state()
    lp.quantize(model, "nf4", ["0"], backend)(torch.randn(2, 64, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_cast_since_quantization_is_that_of_the_dequantized_weights_too(dtype):
    net = lp.quantize(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4)), "int8", ["0"])
    lp.inject(net.to(dtype), lp.LoRA(targets=["0"], rank=2))
    x = torch.randn(3, 8, dtype=dtype)
    before = net(x)
    lp.merge(net, dequantize=True)
    assert {p.dtype for p in net.parameters()} == {dtype}
    torch.testing.assert_close(net(x), before, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("targets", ["targets", "feedforward_targets"])
def test_scales_stay_right_when_the_layer_below_is_dequantized(targets):
    net = lp.quantize(nn.Sequential(nn.Linear(8, 8)), "int8", ["0"])
    lp.inject(net, lp.IA3(**{"targets": [], "feedforward_targets": [], targets: ["0"]}))
    ((*_, adapter),) = lp.adapters(net)
    nn.init.uniform_(adapter.scales)
    x = torch.randn(3, 8)
    before = net(x).detach()
    lp.dequantize(net)
    torch.testing.assert_close(net(x), before)
    torch.testing.assert_close(lp.merge(net)(x), before)


def test_a_bias_that_trains_in_a_quantized_layer_goes_to_the_unquantized_base(tmp_path):
    base = nn.Sequential(nn.Linear(8, 4))
    twin = copy.deepcopy(base)
    net = lp.inject(lp.quantize(base, "int8", ["0"]), lp.BitFit(targets=["0"]))
    nn.init.ones_(net[0].bias)
    lp.load_adapter(twin, lp.save_adapter(net, tmp_path / "biases"))
    assert torch.equal(twin[0].bias, torch.ones(4))
    assert twin[0].weight.dtype == torch.float32
