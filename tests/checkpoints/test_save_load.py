"""Adapter folders: whole or refused, and the model unchanged when they are."""

import hashlib
import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from adapter_edits import edit_json, edit_tensors
from models import MODELS, logits, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from trainer_models import Module

import lightning_peft as lp
from lightning_peft.core import Method, WeightUpdate, parameter_like, select
from lightning_peft.core.fingerprint import fingerprint

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "model.layers.1.self_attn.v_proj.peft.lora.b"


def model(method=None, base="llama"):
    net = MODELS[base]()
    return net if method is None else lp.inject(net, method)


@pytest.fixture
def folder(tmp_path):
    net = model(lp.LoRA(rank=2))
    for *_, adapter in lp.adapters(net):
        nn.init.normal_(adapter.b)
    return lp.save_adapter(net, tmp_path / "adapter")


def flip(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (folder / WEIGHTS).write_bytes(content)


METHOD = {"method": "LoRA", "name": "lora", "rank": 2}
DAMAGE = {
    "no folder": (lambda f: f.rename(f.with_name("moved")), FileNotFoundError, f"{CONFIG} is missing"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, f"{WEIGHTS} is missing"),
    "cut short": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-40]),
        ValueError,
        "damaged or cut short",
    ),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), ValueError, "damaged or cut short"),
    "flipped bit": (flip, ValueError, "checksum"),
    "broken JSON": (lambda f: (f / CONFIG).write_text("{"), ValueError, "damaged"),
    "peft's": (lambda f: (f / CONFIG).write_text('{"peft_type": "LORA"}'), ValueError, "not written by lightning_peft"),
    "other format": (lambda f: edit_json(f, format=7), ValueError, "format 7; this version reads 1"),
    "other base": (lambda f: edit_json(f, base="abcd"), ValueError, "another base model: fingerprint abcd"),
    "unknown method": (lambda f: edit_json(f, methods=[{"method": "os.system"}]), ValueError, "is not known here"),
    "unknown field": (lambda f: edit_json(f, methods=[{**METHOD, "rnak": 1}]), ValueError, "do not fit LoRA: .*rnak"),
    "bad value": (lambda f: edit_json(f, methods=[{**METHOD, "rank": None}]), ValueError, "rank must be"),
    "missing key": (lambda f: edit_tensors(f, lambda s: s.pop(KEY)), ValueError, f"lacks {KEY}"),
    "extra key": (
        lambda f: edit_tensors(f, lambda s: s.update({f"{KEY}2": torch.ones(2)})),
        ValueError,
        f"no place for {KEY}2",
    ),
    "base key": (
        lambda f: edit_tensors(f, lambda s: s.update({"model.norm.weight": torch.ones(32)})),
        ValueError,
        "values of .'model.norm.weight'",
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda s: s.update({KEY: torch.ones(3, 2)})),
        ValueError,
        r"\(3, 2\) instead of \(16, 2\)",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_folder_that_does_not_fit_leaves_the_model_as_it_was(case, folder):
    damage, error, said = DAMAGE[case]
    damage(folder)
    net, untouched = model(), model()
    with pytest.raises(error, match=said) as raised:
        lp.load_adapter(net, folder)
    assert "\n" not in str(raised.value)
    assert [type(m) for m in net.modules()] == [type(m) for m in untouched.modules()]
    assert [p.requires_grad for p in net.parameters()] == [True] * len(list(untouched.parameters()))
    assert all(torch.equal(v, untouched.state_dict()[k]) for k, v in net.state_dict().items())
    assert net.state_dict().keys() == untouched.state_dict().keys()


def test_another_base_may_be_tried(folder):
    edit_json(folder, base="abcd")
    assert len(list(lp.adapters(lp.load_adapter(model(), folder, strict=False)))) == 6


def test_an_adapter_moves_between_a_module_and_its_network(tmp_path):
    net = model(lp.LoRA(rank=2))
    nn.init.normal_(net.model.layers[0].self_attn.q_proj.peft["lora"].b)
    lp.save_adapter(net, tmp_path / "bare")
    inside = lp.load_adapter(Module(), tmp_path / "bare")
    lp.save_adapter(inside, tmp_path / "module")
    back = lp.load_adapter(model(), tmp_path / "module")
    for other in (inside.net, back):
        assert torch.equal(logits(other(tokens())), logits(net(tokens())))


@dataclass(frozen=True, kw_only=True)
class SharedVeRA(Method):
    """W + diag(e) B diag(d) A, with a trained A and a fixed B that all layers of one shape share."""

    name: str = "vera"

    def adapters(self, model):
        shared = {}
        for name, host, rows in select(model, ["0", "1", "2"]):
            yield name, VeRAAdapter(host, rows, shared)


class VeRAAdapter(WeightUpdate):
    def __init__(self, host, rows, shared):
        super().__init__(host, rows)
        out, inputs = self.shape
        self.a, b = shared.setdefault((out, inputs), (nn.Parameter(torch.randn(2, inputs)), torch.randn(out, 2)))
        self.register_buffer("b", b)
        self.d, self.e = parameter_like(host.weight, 2), parameter_like(host.weight, out)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.d)
        nn.init.zeros_(self.e)

    def delta(self):
        return (self.e[:, None] * self.b) @ (self.d[:, None] * self.a)


def test_tensors_that_layers_of_one_shape_share_are_saved_once(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))

    net, x = lp.inject(build(), SharedVeRA()), torch.randn(2, 4)
    for *_, adapter in lp.adapters(net):
        nn.init.normal_(adapter.e)
    (name,) = net[0].peft
    assert net[0].peft[name].a is net[1].peft[name].a
    lp.save_adapter(net, tmp_path)
    saved = {key for key in load_file(tmp_path / WEIGHTS) if key.endswith((".a", ".b"))}
    assert saved == {f"{number}.peft.{name}.{tensor}" for number in (0, 2) for tensor in "ab"}
    for back in (lp.load_adapter(build(), tmp_path), lp.activate(lp.add_adapter(build(), tmp_path, "again"), "again")):
        assert torch.equal(back(x), net(x))
        first, second = (list(layer.peft.values())[0] for layer in back[:2])
        assert first.a is second.a
        assert first.b.data_ptr() == second.b.data_ptr()
    assert not torch.equal(net(x), build()(x))


def test_loading_into_other_methods_or_settings_is_refused(folder):
    for method in (lp.LoRA(rank=3), lp.BitFit(add_missing=True)):
        with pytest.raises(ValueError, match="other settings than this model's"):
            lp.load_adapter(model(method), folder)
    assert len(list(lp.adapters(lp.load_adapter(model(lp.LoRA(rank=2)), folder)))) == 6


@pytest.mark.parametrize("broken", [WEIGHTS, CONFIG])
def test_a_crash_while_writing_leaves_the_file_that_was_there(broken, folder, monkeypatch):
    import os

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace = os.replace

    def crash(source, target):
        if str(target).endswith(broken):
            raise OSError("disk gone")
        replace(source, target)

    net = lp.load_adapter(model(), folder)
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk gone"):
        lp.save_adapter(net, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_changed_settings_are_refused_and_folders_without_their_checksum_load(folder):
    config = json.loads((folder / CONFIG).read_text())
    config["methods"][0]["alpha"] *= 2
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{CONFIG} was changed since it was saved"):
        lp.load_adapter(model(), folder)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)  # as earlier versions wrote it
    config["sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config))
    ((*_, adapter), *_) = lp.adapters(lp.load_adapter(model(), folder))
    assert adapter.scale == 2 * lp.LoRA().alpha / 2


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("format", ["own", "peft"])
def test_files_of_two_adapters_do_not_make_one(name, format, tmp_path):
    write, read = (lp.save_adapter, lp.load_adapter) if format == "own" else (lp.export_peft, lp.import_peft)
    for number in (1, 2):
        net = model(lp.LoRA(rank=2, alpha=float(number)))
        for *_, adapter in lp.adapters(net):
            nn.init.constant_(adapter.b, number)
        write(net, tmp_path / str(number))
    shutil.copy(tmp_path / "1" / name, tmp_path / "2" / name)
    with pytest.raises(ValueError, match="checksum"):
        read(model(), tmp_path / "2")


@pytest.mark.parametrize("rank", [10**6, 10**9, 2**63])
def test_settings_cannot_ask_for_more_memory_than_is_stored(rank, folder):
    edit_json(folder, methods=[{**METHOD, "rank": rank, "targets": ["*_proj"]}])
    net = model()
    with pytest.raises(ValueError, match="."):
        lp.load_adapter(net, folder)
    assert not list(lp.adapters(net))


def test_the_fingerprint_knows_values_and_not_names_or_types():
    net = lp.inject(model(), lp.LoRA(rank=2))
    print_of = fingerprint(net)
    assert fingerprint(lp.inject(Module(), lp.LoRA(rank=2))) == print_of
    assert fingerprint(lp.inject(model().bfloat16(), lp.LoRA(rank=2))) == print_of
    changed = lp.inject(model(), lp.LoRA(rank=2))
    with torch.no_grad():
        changed.model.norm.weight[0] += 0.1
    assert fingerprint(changed) != print_of
    with torch.device("meta"):
        assert fingerprint(lp.inject(MODELS["llama"].make(), lp.LoRA(rank=2))) is None


def test_saving_needs_the_module_that_was_injected(tmp_path):
    net = lp.inject(Module(), lp.LoRA(rank=2))
    with pytest.raises(ValueError, match="Nothing was injected into this LlamaForCausalLM"):
        lp.save_adapter(net.net, tmp_path)
