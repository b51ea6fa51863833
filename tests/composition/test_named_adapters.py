"""Several named adapters in one model: added, switched, stacked, disabled, removed; the rest untouched to the bit."""

import copy
import hashlib
import shutil
from dataclasses import replace

import pytest
import torch
from adapter_edits import edit_json, stir
from models import MODELS, logits, tokens
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.data import DataLoader
from trainer_models import Module, trainer

import lightning_peft as lp

METHODS = {
    "lora": lp.LoRA(rank=2, alpha=3),
    "dora": lp.LoRA(rank=2, decompose=True),
    "ia3": lp.IA3(),
    "llama_adapter": lp.LLaMAAdapter(length=2),
    "prompt": lp.PromptTuning(length=2),
    "adalora": lp.AdaLoRA(initial_rank=4, target_rank=2),
    "bottleneck": lp.Bottleneck(size=3, train_norms=False),
    "prefix": lp.PrefixTuning(length=2, hidden_size=4),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return adapters by name, each trained alone, and the logits that it gives alone."""
    found = {}
    for seed, (name, method) in enumerate(METHODS.items()):
        net = lp.inject(MODELS["llama"](), method)
        stir(net, seed)
        folder = lp.save_adapter(net, tmp_path_factory.mktemp(name))
        found[name] = folder, out(lp.load_adapter(MODELS["llama"](), folder))
    return found


@torch.no_grad()
def out(net, base="llama"):
    return logits(net(**MODELS[base].inputs()))


def side_by_side(folders, *names):
    net = MODELS["llama"]()
    for name in names:
        lp.add_adapter(net, folders[name][0], f"my_{name}")
    return net


def test_each_of_eight_kinds_is_what_it_is_alone(folders):
    base = out(MODELS["llama"]())
    net = side_by_side(folders, *folders)
    assert torch.equal(out(net), base)
    assert lp.active(net) == ()
    for name, (_, alone) in [*folders.items(), *reversed(folders.items())]:
        lp.activate(net, f"my_{name}")
        assert lp.active(net) == (f"my_{name}",)
        assert not torch.equal(alone, base)
        assert torch.equal(out(net), alone), name
        with lp.disabled(net):
            assert torch.equal(out(net), base)
        trained = {n for n, p in net.named_parameters() if p.requires_grad}
        assert trained
        assert all(f".peft.my_{name}" in n for n in trained)
    assert lp.detach(net).state_dict().keys() == MODELS["llama"]().state_dict().keys()
    assert torch.equal(out(net), base)


@pytest.mark.parametrize("base", ["bert", "gpt2", "encoder", "fused_vit"])
def test_disabled_gives_the_base_to_the_bit(base):
    net = MODELS[base]()
    expected = out(net, base)
    lp.inject(net, [lp.LoRA(rank=2), lp.LoRA(name="second", rank=2, targets=["all-linear"])])
    stir(net, 0)
    adapted = out(net, base)
    with lp.disabled(net):
        assert torch.equal(out(net, base), expected)
        with lp.disabled(net):
            assert torch.equal(out(net, base), expected)
        assert torch.equal(out(net, base), expected)
    assert torch.equal(out(net, base), adapted)
    with pytest.raises(KeyError, match="inside"), lp.disabled(net):
        raise KeyError("inside")
    assert torch.equal(out(net, base), adapted)
    assert not torch.equal(adapted, expected)


def test_of_stacked_ones_the_later_is_the_outer(folders):
    net = side_by_side(folders, "bottleneck", "ia3", "lora")
    lp.add_adapter(net, lp.Bottleneck(size=4, train_norms=False), "other")
    stir(net, 5)
    for names in (("my_bottleneck", "other"), ("other", "my_bottleneck"), ("my_lora", "my_ia3"), ("my_ia3", "my_lora")):
        lp.activate(net, *names)
        twin = MODELS["llama"]()
        methods = {"other": lp.Bottleneck(size=4, train_norms=False), "my_lora": METHODS["lora"]} | {
            "my_ia3": METHODS["ia3"],
            "my_bottleneck": METHODS["bottleneck"],
        }
        lp.inject(twin, [replace(methods[name], name=name) for name in names])
        twin.load_state_dict({k: v for k, v in net.state_dict().items() if k in twin.state_dict()})
        torch.testing.assert_close(out(net), out(twin), rtol=0, atol=0)
    assert lp.active(net) == names


def test_removing_one_leaves_the_base_and_the_others(folders):
    net = side_by_side(folders, "lora", "ia3", "prompt")
    before = copy.deepcopy(net.state_dict())
    lp.activate(net, "my_ia3")
    lp.remove_adapter(net, "my_lora")
    assert torch.equal(out(net), folders["ia3"][1])
    after = net.state_dict()
    assert after.keys() == {k for k in before if "my_lora" not in k}
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    lp.remove_adapter(net, "my_ia3")
    assert lp.active(net) == ()
    lp.remove_adapter(net, "my_prompt")
    assert [type(m) for m in net.modules()] == [type(m) for m in MODELS["llama"]().modules()]
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", ["lora", "adalora", "prefix"])
def test_one_is_saved_by_its_name(name, folders, tmp_path):
    net = side_by_side(folders, "ia3", name, "bottleneck")
    lp.save_adapter(net, tmp_path, name=f"my_{name}")
    assert torch.equal(out(lp.load_adapter(MODELS["llama"](), tmp_path)), folders[name][1])


def test_copies_and_pickles_switch_apart(folders, tmp_path):
    net = lp.activate(side_by_side(folders, "lora", "ia3"), "my_lora")
    twin = lp.activate(copy.deepcopy(net), "my_ia3")
    torch.save(net, tmp_path / "net")
    read = torch.load(tmp_path / "net", weights_only=False)
    assert torch.equal(out(twin), folders["ia3"][1])
    assert torch.equal(out(net), folders["lora"][1])
    assert torch.equal(out(read), folders["lora"][1])
    assert torch.equal(out(lp.activate(read, "my_ia3")), folders["ia3"][1])


@pytest.mark.slow
def test_a_compiled_model_follows():
    torch._dynamo.reset()
    net, inputs = MODELS["bert"](), MODELS["bert"].inputs()
    for name, method in (("lora", lp.LoRA(rank=2)), ("ia3", lp.IA3())):
        lp.add_adapter(net, method, name)
    stir(net, 0)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for name in ("lora", "ia3", "lora"):
        lp.activate(net, name)
        torch.testing.assert_close(logits(compiled(**inputs)), logits(net(**inputs)))
    with lp.disabled(net):
        torch.testing.assert_close(logits(compiled(**inputs)), logits(MODELS["bert"]()(**inputs)))


def test_idle_ones_are_not_called():
    class Loud(lp.Adapter):
        def forward(self, host, inner, *args, **kwargs):
            raise AssertionError("called")

        def reset_parameters(self):
            pass

    class Shout(lp.Method):
        def adapters(self, model):
            yield "0", Loud()

    net = nn.Sequential(nn.Linear(2, 2))
    lp.add_adapter(lp.add_adapter(net, Shout(name="loud")), lp.LoRA(rank=1, targets=["0"]))
    lp.activate(net, "lora")
    assert net[0].peft_order == ("lora",)
    net(torch.ones(1, 2))


def test_those_of_other_scale_and_the_same_values_are_told_apart():
    net = MODELS["plain"]()
    for name, alpha in (("one", 1.0), ("two", 2.0)):
        lp.add_adapter(net, lp.LoRA(rank=2, alpha=alpha), name)
    lp.add_adapter(net, lp.LoRA(rank=2), "top")
    for *_, adapter in lp.adapters(net):
        nn.init.ones_(adapter.b)
        nn.init.constant_(adapter.a, 0.1)
    results = [out(lp.activate(net, name, "top"), "plain") for name in ("one", "two", "one")]
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], results[1])


def test_what_trains_is_what_is_active(folders):
    net = lp.activate(side_by_side(folders, "lora", "ia3"), "my_ia3").train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    logits(net(**MODELS["llama"].inputs())).square().sum().backward()
    optimizer.step()
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(".peft.my_ia3." in k for k in changed)


@pytest.mark.parametrize("inside", [False, True])
def test_a_trainer_trains_the_active_ones_alone(inside):
    module, methods = Module(), [lp.LoRA(name="one", rank=2), lp.LoRA(name="two", rank=2)]
    for method in methods:
        lp.add_adapter(module.net if inside else module, method)
    lp.activate(module.net if inside else module, "two")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    trainer(lp.PEFTStrategy(methods), max_steps=2).fit(module, DataLoader(tokens(4), batch_size=2))
    changed = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(".peft.two." in k for k in changed)
    assert lp.active(module) == ("two",)


def test_refusals(folders, tmp_path):
    net = side_by_side(folders, "lora", "dora", "ia3")
    state = {k: v.clone() for k, v in net.state_dict().items()}
    orders = [getattr(m, "peft_order", None) for m in net.modules()]
    with pytest.raises(ValueError, match="no adapter named 'other'; it has 'my_lora', 'my_dora', 'my_ia3'"):
        lp.activate(net, "other")
    with pytest.raises(ValueError, match="one name or several different"):
        lp.activate(net)
    with pytest.raises(ValueError, match="one name or several different"):
        lp.activate(net, "my_ia3", "my_ia3")
    with pytest.raises(ValueError, match="rewrites the whole weight and cannot share it"):
        lp.activate(net, "my_lora", "my_dora")
    with pytest.raises(ValueError, match="Two methods are named 'my_lora'"):
        lp.add_adapter(net, folders["ia3"][0], "my_lora")
    for name in ("a.b", "keys", "_x"):
        with pytest.raises(ValueError, match="cannot be named"):
            lp.add_adapter(net, lp.LoRA(), name)
    with pytest.raises(ValueError, match="got none"):
        lp.add_adapter(net, [])
    with pytest.raises(ValueError, match=r"also_train=\['norm'\] goes with a method"):
        lp.add_adapter(net, folders["ia3"][0], "more", also_train=["norm"])
    headed = lp.inject(MODELS["llama"](), lp.LoRA(rank=2), also_train=["lm_head"])
    with pytest.raises(ValueError, match="lm_head.weight trains in the base itself"), lp.disabled(headed):
        pass
    with pytest.raises(ValueError, match="lm_head.weight trains in the base itself and belongs to no name"):
        lp.save_adapter(headed, tmp_path, name="lora")
    with pytest.raises(ValueError, match="no adapters that could be disabled"), lp.disabled(MODELS["llama"]()):
        pass
    with lp.disabled(net):
        for act in (lambda: lp.activate(net, "my_ia3"), lambda: lp.remove_adapter(net, "my_ia3"),
                    lambda: lp.add_adapter(net, lp.LoRA()), lambda: lp.detach(net)):  # fmt: skip
            with pytest.raises(RuntimeError, match="cannot change while they are inactive"):
                act()
    with pytest.raises(ValueError, match="belongs to another base"):
        lp.add_adapter(MODELS["llama"]().apply(lambda m: m.reset_parameters() if type(m) is nn.Linear else None),
                       folders["lora"][0])  # fmt: skip
    assert net.state_dict().keys() == state.keys()
    assert [getattr(m, "peft_order", None) for m in net.modules()] == orders


def test_folders_of_ordinary_runs_are_named_by_their_folders(folders, tmp_path):
    for name in ("billing", "complaints"):
        shutil.copytree(folders["lora" if name == "billing" else "dora"][0], tmp_path / name)
    shutil.copytree(folders["ia3"][0], tmp_path / "version_0.5")
    net = MODELS["llama"]()
    for name in ("billing", "complaints"):
        lp.add_adapter(net, tmp_path / name)
    assert torch.equal(out(lp.activate(net, "billing")), folders["lora"][1])
    assert torch.equal(out(lp.activate(net, "complaints")), folders["dora"][1])
    assert torch.equal(out(lp.activate(lp.add_adapter(net, f"{tmp_path}/version_0.5/"), "ia3")), folders["ia3"][1])
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "billing", tmp_path / "other/billing")
    with pytest.raises(ValueError, match="Two methods are named 'billing'.*name=... of add_adapter"):
        lp.add_adapter(net, tmp_path / "other/billing")
    lp.add_adapter(net, tmp_path / "other/billing", name="again")
    own = lp.save_adapter(lp.inject(MODELS["llama"](), lp.LoRA(rank=2, name="mine")), tmp_path / "folder")
    assert torch.equal(out(lp.activate(lp.add_adapter(net, own), "mine")), out(MODELS["llama"]()))


def test_a_second_adapter_is_added_and_not_loaded(folders):
    net = lp.load_adapter(MODELS["llama"](), folders["lora"][0])
    with pytest.raises(ValueError, match=r"to have both side by side, call lightning_peft.add_adapter\(model, folder"):
        lp.load_adapter(net, folders["ia3"][0])
    assert torch.equal(out(net), folders["lora"][1])


def test_a_damaged_folder_leaves_the_model_as_it_was(folders):
    folder = folders["lora"][0].with_name("damaged")
    shutil.copytree(folders["lora"][0], folder)
    state = load_file(folder / "adapter_model.safetensors")
    state.pop(min(state))
    data = save(state)
    (folder / "adapter_model.safetensors").write_bytes(data)
    edit_json(folder, sha256=hashlib.sha256(data).hexdigest())
    net = side_by_side(folders, "ia3")
    with pytest.raises(ValueError, match="lacks"):
        lp.add_adapter(net, folder, "broken")
    assert not [k for k in net.state_dict() if "broken" in k]
    assert torch.equal(out(lp.activate(net, "my_ia3")), folders["ia3"][1])


def test_a_copy_and_the_parameter_that_it_replaces_may_both_train(tmp_path):
    """One adapter has a head of its own while another trains the base's: the folder of both loads."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    net, x = build(), torch.randn(3, 4)
    lp.add_adapter(net, lp.LoRA(rank=2, targets=["0"]), "a", also_train=["1"])
    lp.inject(net, lp.LoRA(rank=1, targets=["0"]), also_train=["1"])
    lp.activate(net, "lora", "a")
    stir(net, 4)
    lp.save_adapter(net, tmp_path)
    back = lp.load_adapter(build(), tmp_path)
    assert lp.active(back) == ("lora", "a")
    assert torch.equal(back(x), net(x))
    for name in ("a", "lora"):
        assert torch.equal(lp.activate(back, name)(x), lp.activate(net, name)(x))
    assert not torch.equal(lp.activate(net, "a")(x), lp.activate(net, "lora")(x))
