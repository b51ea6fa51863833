"""Merging: of the active ones, back to the very bits, and file by file with one layer in memory at a time."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_edits import stir
from billion import Billion, memory
from models import MODELS, logits
from processes import together
from safetensors.torch import load_file, save_file
from sampling import diagonal
from torch import nn

import lightning_peft as lp
from lightning_peft.checkpoints.safetensors_files import TensorFiles

METHODS = [
    lp.LoRA(rank=2, targets=["all-linear"]),
    lp.LoRA(name="dora", rank=2, decompose=True),
    lp.LoRA(name="pissa", rank=2, init="pissa"),
    lp.LoRA(name="olora", rank=2, init="olora"),
    lp.AdaLoRA(initial_rank=3, target_rank=2, targets=["attention.query", "attention.value"]),
    lp.IA3(),
    lp.KronA(scale=2),
    lp.FedPara(rank=2),
]


def without_values(base="llama"):
    with lp.without_values():
        return MODELS[base]()


def sharded(state, folder):
    """Write a base in two shards with an index and a configuration."""
    folder.mkdir()
    names = sorted(state)
    for number, own in enumerate((names[::2], names[1::2])):
        save_file(
            {name: state[name].contiguous() for name in own}, folder / f"model-{number}.safetensors", {"format": "pt"}
        )
    (folder / "config.json").write_text("{}")
    return folder


@diagonal(
    ("method", "base", "dtype"),
    METHODS,
    ["llama", "gpt2", "bert", "encoder"],
    [torch.float32, torch.bfloat16],
    ids=lambda value: getattr(value, "name", None),
)
def test_files_are_merged_as_the_model_is(method, base, dtype, tmp_path):
    if base == "encoder" and method.name == "lora":
        method = replace(method, targets=["attention.query", "attention.value"])
    net = lp.inject(MODELS[base]().to(dtype), method)
    stir(net, 0)
    lp.save_adapter(net, tmp_path / "adapter")
    folder = sharded(MODELS[base]().to(dtype).state_dict(), tmp_path / "base")
    empty = without_values(base)
    out = lp.merge_files(empty, folder, tmp_path / "adapter", tmp_path / "out")
    assert all(p.is_meta and p.requires_grad for p in empty.parameters())
    assert [type(m) for m in empty.modules()] == [type(m) for m in MODELS[base]().modules()]
    expected = lp.merge(net).state_dict()
    found = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    assert found.keys() == expected.keys()
    changed = [k for k, v in found.items() if not torch.equal(v, MODELS[base]().to(dtype).state_dict()[k])]
    assert changed
    assert all(torch.equal(v, expected[k]) for k, v in found.items())
    assert (out / "config.json").read_text() == "{}"


def test_what_trains_in_the_base_is_merged_too(tmp_path):
    net = lp.inject(MODELS["bert"](), [lp.LoRA(rank=2), lp.BitFit()], also_train=["classifier"])
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    lp.save_adapter(net, tmp_path / "adapter")
    save_file(MODELS["bert"]().state_dict(), tmp_path / "base.safetensors")
    out = lp.merge_files(without_values("bert"), tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out")
    expected = lp.merge(net).state_dict()
    found = load_file(out / "base.safetensors")
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_refusals_leave_nothing_behind(tmp_path):
    net = lp.inject(MODELS["llama"](), lp.LoRA(rank=2))
    stir(net, 0)
    adapter = lp.save_adapter(net, tmp_path / "adapter")
    prompt = lp.save_adapter(lp.inject(MODELS["llama"](), lp.PromptTuning(length=2)), tmp_path / "prompt")
    base, out, empty = tmp_path / "base.safetensors", tmp_path / "out", without_values()
    state = MODELS["llama"]().state_dict()
    save_file(state, base)
    save_file({k: v for k, v in state.items() if "lm_head" not in k}, tmp_path / "less.safetensors")
    save_file(state | {"lm_head.weight": torch.ones(64, 32)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(base.read_bytes()[:-8])
    there = sorted(tmp_path.iterdir())
    wrong = [
        (ValueError, "fresh network without values", (MODELS["llama"](), base, adapter, out)),
        (FileExistsError, "give a folder that does not", (empty, base, adapter, adapter)),
        (FileNotFoundError, "no .safetensors file", (empty, tmp_path / "none", adapter, out)),
        (ValueError, "lacks lm_head.weight", (empty, tmp_path / "less.safetensors", adapter, out)),
        (ValueError, "belongs to another base", (empty, tmp_path / "other.safetensors", adapter, out)),
        (ValueError, "is damaged", (empty, tmp_path / "cut.safetensors", adapter, out)),
        (TypeError, "cannot be merged", (empty, base, prompt, out)),
    ]
    for error, said, arguments in wrong:
        with pytest.raises(error, match=said):
            lp.merge_files(*arguments)
        assert sorted(tmp_path.iterdir()) == there
        assert not any(True for _ in lp.adapters(empty))


@pytest.mark.usefixtures("ordinary_path")
@pytest.mark.parametrize("base", ["llama", "gpt2", "encoder", "bert"])
def test_merged_for_a_while_the_base_comes_back_to_the_bit(base):
    net = MODELS[base]().bfloat16() if base == "gpt2" else MODELS[base]()
    lp.inject(net, [lp.LoRA(rank=2), lp.KronA(), lp.IA3()])
    lp.add_adapter(net, lp.LoRA(rank=2), "idle")
    stir(net, 0)
    before, inputs = {k: v.clone() for k, v in net.state_dict().items()}, MODELS[base].inputs()
    lp.activate(net, "lora", "ia3", "krona")
    expected = logits(net(**inputs))
    with lp.merged(net):
        found = logits(net(**inputs))
        assert any(not torch.equal(v, before[k]) for k, v in net.named_parameters())
        for act in (lambda: lp.activate(net, "idle"), lambda: lp.merge(net)):
            with pytest.raises(RuntimeError, match="are merged into the weights"):
                act()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(KeyError, match="inside"), lp.merged(net):
        raise KeyError("inside")
    tolerance = {"rtol": 0.1, "atol": 0.3} if base == "gpt2" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **tolerance)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(logits(net(**inputs)), expected)
    with pytest.raises(ValueError, match="'idle.*' is not active and would be lost"):
        lp.merge(net)
    merged = lp.merge(lp.remove_adapter(net, "idle")).requires_grad_(False)  # frozen weights may take other kernels
    torch.testing.assert_close(logits(merged(**inputs)), found, rtol=0, atol=0)


LAYERS = 8  # of the 22 of a billion parameters: 970 MB


def making(folder):
    """Write the base and an adapter; return the digests of what merging in memory makes of them."""
    folder, net = Path(folder), Billion(layers=LAYERS).net
    torch.manual_seed(0)
    noise = 0.05 * torch.randn(2**20 + 7).bfloat16()
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                flat = noise.roll(p.numel() % 1000 + len(name)).repeat(p.numel() // len(noise) + 1)[: p.numel()]
                module._parameters[name] = nn.Parameter(flat.view(p.shape), requires_grad=False)
    save_file(dict(net.named_parameters()), folder / "base.safetensors")
    lp.inject(net, lp.LoRA(rank=8, targets=["all-linear"]))
    stir(net, 1)
    lp.save_adapter(net, folder / "adapter")
    return {name: digest_of(p) for name, p in lp.merge(net).named_parameters()}


def merging(folder):
    folder, net = Path(folder), Billion(layers=LAYERS).net
    largest = max(p.nbytes for n, p in net.named_parameters() if "proj" in n)
    empty = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    lp.merge_files(net, folder / "base.safetensors", folder / "adapter", folder / "out")
    peak, out = memory("VmHWM") - empty, TensorFiles(folder / "out" / "base.safetensors")
    return peak / 1e6, largest / 1e6, {key: digest_of(out.read(key)) for key in out.keys()}  # noqa: SIM118


def digest_of(values):
    return hashlib.sha256(values.detach().view(torch.int16).numpy()).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read in /proc")
def test_a_large_base_is_merged_with_a_few_layers_in_memory(tmp_path):
    (expected,) = together(making, str(tmp_path), count=1, seconds=110)
    ((peak, largest, found),) = together(merging, str(tmp_path), count=1, seconds=110)
    print(f"peak of merging {peak:.0f} MB, largest adapted layer {largest:.0f} MB, all layers 970 MB")
    base = TensorFiles(tmp_path / "base.safetensors")
    changed = {key for key, digest in found.items() if digest != digest_of(base.read(key))}
    assert len(changed) == LAYERS * 7
    assert len(found) == LAYERS * 9 + 3
    assert found == expected
    assert peak < 400
