"""A base may call its modules ``peft``, the name below which hosts keep their adapters."""

import copy
import dataclasses
import pickle

import lightning.pytorch as pl
import pytest
import torch
from models import MODELS, logits, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainer_models import trainer

import lightning_peft as lp
from lightning_peft.checkpoints.adapter_state import adapter_state, base_names
from lightning_peft.core.fingerprint import fingerprint
from lightning_peft.structure.base_model import base_modules, base_parameters
from lightning_peft.training.param_groups import group_rule


class Block(nn.Module):
    """Modules called peft on each level: around a host, beside it, and in a norm that can train."""

    def __init__(self):
        super().__init__()
        self.peft = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.inner = nn.ModuleDict({"peft": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})

    def forward(self, x):
        return self.inner["norm"](self.inner["peft"](self.peft(x)))


class Net(pl.LightningModule):
    def __init__(self, name="peft"):
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        self.add_module(name, Block())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.get_submodule(self.name)(x))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.5)


METHOD = lp.LoRA(rank=2, targets=["peft.0", "inner.peft"])
HOSTS = ["peft.peft.0", "peft.inner.peft"]


def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


def loader():
    return DataLoader(TensorDataset(*rows()), batch_size=8)


def changed(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_it_belongs_to_the_base():
    plain, model = Net(), lp.inject(Net(), METHOD, ["norm"])
    assert [name for name, *_ in lp.adapters(model)] == HOSTS
    assert list(base_modules(model)) == [name for name, _ in plain.named_modules() if name]
    assert list(base_parameters(model)) == [name for name, _ in plain.named_parameters()]
    trained = {"peft.inner.norm.weight", "peft.inner.norm.bias"}
    factors = {f"{host}.peft.lora.{factor}" for host in HOSTS for factor in "ab"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained | factors
    assert set(adapter_state(model)) == trained | factors
    assert base_names(model) == {name for name, _ in plain.named_parameters()} - trained
    assert fingerprint(model, trained) == fingerprint(plain, trained)
    detached = lp.detach(model)
    assert same(detached.state_dict(), plain.state_dict())
    assert all(p.requires_grad for p in detached.parameters())


@pytest.mark.parametrize("method", [METHOD, [METHOD, lp.LoRA(name="more", rank=1, targets=["head"])]], ids=["1", "2"])
def test_files_and_copies_bring_all_of_it_back(method, tmp_path):
    model = changed(lp.inject(Net(), method, ["norm"]))
    x, _ = rows()
    lp.save_adapter(model, tmp_path / "adapter")
    again = lp.load_adapter(Net(), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(x), model(x), atol=0, rtol=0)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(twin(x), model(x), atol=0, rtol=0)
    outer = nn.ModuleDict({"net": Net()})
    torch.testing.assert_close(lp.load_adapter(outer, tmp_path / "adapter")["net"].eval()(x), model(x), atol=0, rtol=0)
    merged = lp.merge(model, keep=True)
    torch.testing.assert_close(merged(x), again(x), atol=1e-5, rtol=0)


def test_a_named_adapter_takes_trained_parameters_along_under_their_names(tmp_path):
    model = changed(lp.inject(Net(), METHOD, ["norm"]))
    lp.save_adapter(model, tmp_path)
    several = lp.add_adapter(Net(), tmp_path, "second").eval()
    lp.activate(several, "second")
    x, _ = rows()
    torch.testing.assert_close(several(x), model(x), atol=1e-6, rtol=0)


def test_reports_of_files_tell_adapters_from_trained_parameters(tmp_path):
    lp.save_adapter(changed(lp.inject(Net(), METHOD, ["norm"])), tmp_path)
    report = lp.inspect_adapter(tmp_path)
    assert sorted(place["place"] for place in report["places"]) == sorted(HOSTS)
    trained = ["peft.inner.norm.bias", "peft.inner.norm.weight"]
    assert sorted(entry["kind"] for entry in report["table"] if not entry["method"]) == trained
    lp.save_adapter(changed(lp.inject(Net(), METHOD, ["norm"])), tmp_path / "same")
    assert lp.compare_adapters(tmp_path, tmp_path / "same")["equal"]


@pytest.mark.parametrize("cache", [False, True])
def test_training_moves_the_adapters_alone_and_goes_on(cache, tmp_path):
    def fitted(epochs, path=None):
        pl.seed_everything(3, verbose=False)
        net = Net()
        method = lp.LoRA(rank=2, targets=["inner.peft"])
        strategy = lp.PEFTStrategy(method, show_summary=False, cache_frozen=cache)
        run = trainer(strategy, epochs=epochs)
        run.fit(net, loader(), ckpt_path=path)
        return run, net

    run, net = fitted(4)
    expected = {key: value.clone() for key, value in net.state_dict().items()}
    assert set(expected) == {"peft.inner.peft.peft.lora.a", "peft.inner.peft.peft.lora.b"}
    before = dict(Net().named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in base_parameters(net).items())
    run, _ = fitted(2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    assert same(fitted(4, tmp_path / "half.ckpt")[1].state_dict(), expected)


def test_frozen_modules_of_that_name_evaluate_and_those_that_train_train():
    net, modes = Net(), {}
    step = net.training_step

    def training_step(batch, index=0):
        modes.update({name: module.training for name, module in net.named_modules()})
        return step(batch, index)

    net.training_step = training_step
    strategy = lp.PEFTStrategy(METHOD, also_train=["norm"], show_summary=False)
    trainer(strategy, epochs=1).fit(net, loader())
    assert not modes["peft.peft"]
    assert modes["peft.inner.norm"]
    assert modes["peft.inner.peft.peft.lora"]


def test_patterns_of_groups_mean_methods_and_no_path_of_the_base():
    net = lp.inject(Net(), METHOD, ["norm"])
    rule = group_rule(net, {"lora.b": 16.0}, [])
    assert [n for n, p in net.named_parameters() if rule(p)] == [f"{host}.peft.lora.b" for host in HOSTS]
    with pytest.raises(ValueError, match="'inner' is no trainable parameter or method"):
        group_rule(net, {"inner": 2.0}, [])


def test_what_a_cache_cannot_watch_is_refused():
    net = Net()
    net.peft.gain = nn.Parameter(torch.ones(1))
    strategy = lp.PEFTStrategy(METHOD, also_train=["gain"], show_summary=False, cache_frozen=True)
    with pytest.raises(ValueError, match="peft trains and has an attribute 'peft' of its own, where cache_frozen=True"):
        trainer(strategy, epochs=1).fit(net, loader())


def test_a_module_with_a_child_of_that_name_is_no_host():
    net = Net()
    with pytest.raises(TypeError, match="peft has an attribute 'peft' or 'peft_order' of its own, where its adapters"):
        lp.inject(net, Method(host="peft", child="gate"))
    assert type(net.peft) is Block


def test_a_method_whose_name_would_make_the_bases_names_adapters_is_refused():
    net = Net()
    with pytest.raises(ValueError, match=r"peft\.inner\.\S+ of the base .* name='inner'.* another name"):
        lp.inject(net, lp.LoRA(name="inner", rank=2, targets=["head"]))
    assert not list(lp.adapters(net))
    assert all(p.requires_grad for p in net.parameters())


class Nested(lp.Adapter):
    unmergeable = "it is a gate"

    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.Linear(1, 1))

    def reset_parameters(self):
        """Keep the linear layer's own start."""

    def forward(self, host, inner, *args, **kwargs):
        return inner(*args, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(lp.Method):
    name: str = "nested"
    host: str = "head"
    child: str = "peft"

    def adapters(self, model):
        return [(self.host, Nested(self.child))]


def test_an_adapter_with_a_tensor_below_that_name_is_refused():
    net = Net()
    with pytest.raises(TypeError, match=r"Nested has a tensor peft\.weight"):
        lp.inject(net, Method())
    assert not list(lp.adapters(net))
    assert [name for name, *_ in lp.adapters(lp.inject(net, Method(child="gate")))] == ["head"]


def test_a_network_of_that_name_in_a_module_is_exported_and_found(tmp_path):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.peft = MODELS["bert"]()

    model = changed(lp.inject(Module(), lp.LoRA(rank=2), ["classifier"]))
    assert [name for name, *_ in lp.adapters(model)][0].startswith("peft.bert.encoder")
    lp.export_peft(model, tmp_path / "peft")
    back = lp.import_peft(MODELS["bert"](), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(back(tokens())), logits(model.peft(tokens())), atol=0, rtol=0)
    lp.save_adapter(model, tmp_path / "own")
    again = lp.load_adapter(MODELS["bert"](), tmp_path / "own").eval()
    torch.testing.assert_close(logits(again(tokens())), logits(model.peft(tokens())), atol=0, rtol=0)


class Numbers(nn.Module):
    """Parameters and attributes of the names that hosts use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.peft = nn.Parameter(torch.randn(4))
        self.layer, self.peft_order = nn.Linear(4, 4), ("mine",)

    def forward(self, x):
        return self.layer(x) * self.peft


def test_parameters_and_attributes_of_that_name_stay_the_bases(tmp_path):
    net = nn.Sequential(Numbers(), Numbers())
    model = changed(lp.inject(net, lp.LoRA(rank=2, targets=["0.layer"]), ["0.peft"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "0.peft", "0.layer.peft.lora.a", "0.layer.peft.lora.b"
    }  # fmt: skip
    lp.save_adapter(model, tmp_path)
    x = torch.randn(3, 4)
    again = lp.load_adapter(nn.Sequential(Numbers(), Numbers()), tmp_path).eval()
    torch.testing.assert_close(again(x), model(x), atol=0, rtol=0)
    plain = nn.Sequential(Numbers())
    with pytest.raises(TypeError, match="0 has an attribute 'peft' or 'peft_order' of its own, where its adapters"):
        lp.inject(plain, Method(host="0", child="gate"))
    del plain[0].peft
    with pytest.raises(TypeError, match="0 has an attribute 'peft' or 'peft_order' of its own, where its adapters"):
        lp.inject(plain, Method(host="0", child="gate"))
    assert plain[0].peft_order == ("mine",)


def test_files_of_such_a_base_are_merged(tmp_path):
    model = changed(lp.inject(Net(), METHOD, ["norm"]))
    lp.save_adapter(model, tmp_path / "adapter")
    save_file({key: value.clone() for key, value in Net().state_dict().items()}, tmp_path / "base.safetensors")
    with lp.without_values():
        empty = Net()
    lp.merge_files(empty, tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out")
    merged = Net()
    merged.load_state_dict(load_file(tmp_path / "out" / "base.safetensors"))
    x, _ = rows()
    torch.testing.assert_close(merged(x), model(x), atol=1e-5, rtol=0)
