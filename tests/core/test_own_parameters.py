"""Parameters that adapters have of their own: heads of several tasks side by side over one untouched base."""

import copy
import importlib.util
import json

import pytest
import torch
from models import MODELS, logits, tokens
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from trainer_models import Module, trainer

import lightning_peft as lp
from lightning_peft.training.distributed.base_weights import start_adapters

TASKS = {
    "lora": (lp.LoRA(rank=2), ["classifier", "pooler"]),
    "norms": (lp.Bottleneck(size=3), ["classifier"]),
    "biases": (lp.BitFit(), ()),
    "output": (lp.OutputLayers(), ()),
    "two": ([lp.IA3(), lp.LoRA(name="more", rank=2)], ["classifier"]),
}


def stir(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.requires_grad:
            p.data.add_(0.2 * torch.randn(p.shape, generator=generator))
    return net


@torch.no_grad()
def out(net):
    return logits(net.eval()(**MODELS["bert"].inputs()))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Return adapters by task, each trained alone with a head in the base itself, and the logits of each."""
    found = {}
    for seed, (name, (method, also_train)) in enumerate(TASKS.items()):
        net = stir(lp.inject(MODELS["bert"](), method, also_train), seed)
        found[name] = lp.save_adapter(net, tmp_path_factory.mktemp(name)), out(net)
    return found


def together(tasks):
    net = MODELS["bert"]()
    for name, (folder, _) in tasks.items():
        lp.add_adapter(net, folder, f"my_{name}")
    return net


def test_each_task_has_its_own_head_over_one_base(tasks, tmp_path):
    base, before = out(MODELS["bert"]()), MODELS["bert"]().state_dict()
    net = together(tasks)
    assert torch.equal(out(net), base)
    for name, (_, alone) in [*tasks.items(), *reversed(tasks.items())]:
        lp.activate(net, f"my_{name}")
        assert lp.active(net) == (f"my_{name}",)
        assert torch.equal(out(net), alone), name
        with lp.disabled(net):
            assert torch.equal(out(net), base)
        folder = lp.save_adapter(net, tmp_path / name, name=f"my_{name}")
        assert torch.equal(out(lp.load_adapter(MODELS["bert"](), folder)), alone)
        again = lp.add_adapter(MODELS["bert"](), folder, "again")
        assert torch.equal(out(lp.activate(again, "again")), alone)
        trained = {n for n, p in net.named_parameters() if p.requires_grad}
        assert all(f".peft.my_{name}" in n for n in trained)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    for name in tasks:
        lp.remove_adapter(net, f"my_{name}")
    assert net.state_dict().keys() == before.keys()
    assert torch.equal(out(net), base)


@pytest.mark.parametrize("names", [("lora", "norms", "lora", "biases"), ("two", None, "output", "two")])
def test_rows_of_a_batch_have_the_heads_of_their_tasks(names, tasks):
    net, inputs = together(tasks), {k: v[[0, 1, 0, 1]] for k, v in MODELS["bert"].inputs().items()}
    mine = [name and f"my_{name}" for name in names]
    with torch.no_grad(), lp.row_adapters(net.eval(), mine):
        mixed = logits(net(**inputs))
    for row, name in enumerate(names):
        alone = tasks[name][1] if name else out(MODELS["bert"]())
        torch.testing.assert_close(mixed[row], alone[row % 2], atol=1e-5, rtol=1e-5)
    lp.activate(net, "my_lora")
    with lp.row_adapters(net, [name or "my_lora" for name in mine]):
        logits(net(**inputs)).square().sum().backward()
    found = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert all(".peft.my_lora" in name for name in found)
    assert all(gradient.any() for name, gradient in found.items() if "classifier" in name)


def test_a_folder_of_all_brings_back_what_lay_idle(tasks, tmp_path):
    net = lp.activate(together(tasks), "my_norms")
    lp.save_adapter(net, tmp_path)
    back = lp.load_adapter(MODELS["bert"](), tmp_path)
    assert lp.active(back) == ("my_norms",)
    assert back.state_dict().keys() == net.state_dict().keys()
    for name, (_, alone) in tasks.items():
        assert torch.equal(out(lp.activate(back, f"my_{name}")), alone)
    twin = lp.activate(copy.deepcopy(back), "my_lora")
    assert torch.equal(out(twin), tasks["lora"][1])
    assert torch.equal(out(back), tasks["two"][1])


def test_merging_puts_them_into_the_base(tasks):
    for name in ("lora", "biases", "output"):
        net = lp.activate(lp.add_adapter(MODELS["bert"](), tasks[name][0], "task"), "task")
        with lp.merged(net):
            torch.testing.assert_close(out(net), tasks[name][1])
        merged = lp.merge(net)
        torch.testing.assert_close(out(merged), tasks[name][1])
        assert merged.state_dict().keys() == MODELS["bert"]().state_dict().keys()


@pytest.mark.parametrize("outer", ["lora", "own"])
def test_a_layer_of_its_own_values_is_updated_in_any_order(outer):
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    net = nn.Sequential(layer)
    methods = [lp.LoRA(rank=2, alpha=3, targets=["0"]), lp.OwnParameters(targets=["0"])]
    net = stir(lp.inject(net, methods if outer == "own" else methods[::-1]), 0)
    lora, own = layer.peft["lora"], layer.peft["own"].own
    assert layer.weight is own.weight  # whoever reads it, as peft shows it
    with lp.disabled(net):
        assert layer.weight is layer._parameters["weight"]
        assert not torch.equal(own.weight, layer.weight)
    expected = x @ (own.weight + 1.5 * lora.b @ lora.a).T + own.bias
    torch.testing.assert_close(net(x), expected)
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(lp.merge(net)(x), expected)


@pytest.mark.slow
def test_the_call_is_that_of_the_module_with_other_values():
    torch._dynamo.reset()
    base, inputs = MODELS["bert"](), MODELS["bert"].inputs()
    names = [name for name, _ in base.named_parameters()]
    net = stir(lp.inject(MODELS["bert"](), lp.OwnParameters(targets=["bert", "classifier"])), 1)
    own = {}
    for name in names:
        owner, _, key = name.rpartition(".")
        own[name] = net.get_parameter(f"{owner}.peft.own.own.{key}")
    expected = logits(functional_call(base, own, kwargs=inputs))
    assert torch.equal(logits(net(**inputs)), expected)
    gradients = torch.autograd.grad(expected.square().sum(), list(own.values()))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    result = logits(compiled(**inputs))
    torch.testing.assert_close(result, expected)
    result.square().sum().backward()
    for parameter, gradient in zip(own.values(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_statistics_of_a_norm_are_its_own_too(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

    net, x = lp.inject(build(), lp.LoRA(rank=1, targets=["0"]), ["1"]), torch.randn(8, 4)
    for _ in range(3):
        net(x)
    lp.save_adapter(net, tmp_path)
    named = lp.activate(lp.add_adapter(build(), tmp_path, "task"), "task")
    assert torch.equal(named.eval()(x), net.eval()(x))
    assert int(named[1]._buffers["num_batches_tracked"]) == 0
    assert int(named[1].peft["task_own"].own.num_batches_tracked) == 3
    with lp.disabled(named):
        assert torch.equal(named(x), build().eval()(x))
    torch.testing.assert_close(lp.merge(named)(x), net(x))


def test_a_trainer_trains_the_copies_and_not_the_base(tmp_path):
    module = Module()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    methods = [lp.LoRA(rank=2), lp.OwnParameters(targets=["lm_head"])]
    trainer(lp.PEFTStrategy(methods), max_steps=2).fit(module, DataLoader(tokens(4), batch_size=2))
    with lp.full_state_dict(module):
        after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    own = {key for key, value in after.items() if ".peft.own.own." in key}
    assert own == {"net.lm_head.peft.own.own.weight"}
    assert all(not torch.equal(after[key], after[key.replace("peft.own.own.", "")]) for key in own)


def test_refusals(tasks):
    net = together(tasks)
    with pytest.raises(ValueError, match=r"Two adapters replace classifier.\w+; only one of them"):
        lp.activate(net, "my_norms", "my_output")
    assert lp.active(net) == ()
    with pytest.raises(ValueError, match="no adapter named 'my_lora_own'"):
        lp.activate(net, "my_lora_own")
    tied = MODELS["t5"]()
    if tied.encoder.embed_tokens is not tied.shared:  # before transformers 5 it is one module
        with pytest.raises(ValueError, match="shared.weight is shared with another module"):
            lp.add_adapter(tied, lp.OwnParameters(targets=["shared"]))
    with pytest.raises(TypeError, match="OwnTensors of 'my_lora' at .* is no update W"):
        lp.combine(net, ["my_lora", "my_lora"], [1, 1], "sum")
    dora = lp.LoRA(rank=2, decompose=True, targets=["classifier"])
    with pytest.raises(ValueError, match="rewrites the whole weight and cannot share it with OwnTensors"):
        lp.inject(MODELS["bert"](), [dora, lp.OwnParameters(targets=["classifier"])])
    other = MODELS["bert"]()
    nn.init.normal_(other.bert.encoder.layer[0].output.dense.weight)
    with pytest.raises(ValueError, match="belongs to another base"):
        lp.add_adapter(other, tasks["lora"][0])


def test_copies_of_what_has_no_values_do_not_start():
    with lp.without_values():
        net = MODELS["bert"].make()
    lp.inject(net, lp.OwnParameters(targets=["classifier"]))
    assert all(p.is_meta for p in net.parameters())
    with pytest.raises(TypeError, match="start from those of the base: load the base model first"):
        start_adapters(net, torch.device("cpu"))


def test_another_head_in_the_base_is_no_other_base(tasks):
    net = MODELS["bert"]()
    nn.init.normal_(net.classifier.weight)
    lp.activate(lp.add_adapter(net, tasks["lora"][0], "task"), "task")
    assert torch.equal(out(net), tasks["lora"][1])


@pytest.mark.parametrize("inside", [False, True])
def test_a_trainer_trains_a_task_beside_others(inside, tmp_path):
    module = Module()
    net = module.net if inside else module
    lp.add_adapter(net, lp.AdaLoRA(initial_rank=2, target_rank=1), "idle", also_train=["lm_head"])
    lp.add_adapter(net, lp.LoRA(rank=2), "task", also_train=["lm_head"])
    with pytest.raises(ValueError, match="no adapter takes part"):
        trainer(lp.PEFTStrategy(), max_steps=1).fit(module, DataLoader(tokens(4), batch_size=2))
    lp.activate(net, "task")
    with lp.full_state_dict(module):
        before = {k: v.clone() for k, v in net.state_dict().items()}
    run = trainer(lp.PEFTStrategy(), max_steps=2)
    run.fit(module, DataLoader(tokens(4), batch_size=2))
    with lp.full_state_dict(module):
        after = net.state_dict()
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if ".peft.task" in k}
    run.save_checkpoint(tmp_path / "last.ckpt")
    back = lp.load_from_checkpoint(Module, tmp_path / "last.ckpt")
    assert lp.active(back) == ("task",)
    assert all(torch.equal(back.state_dict()[k], v) for k, v in module.state_dict().items())


def test_without_a_method_something_must_have_been_injected():
    with pytest.raises(ValueError, match="without a method trains what was injected before, and nothing was"):
        trainer(lp.PEFTStrategy(), max_steps=1).fit(Module(), DataLoader(tokens(4), batch_size=2))


@pytest.mark.filterwarnings("ignore")  # peft's own advice, and what it calls
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("task", ["lora", "head beside"])
def test_peft_gets_the_head_of_the_task(task, tasks, tmp_path):
    import peft

    if task == "lora":
        net = together(tasks)
        alone = tasks["lora"][1]
        lp.export_peft(net, tmp_path, name="my_lora")
    else:
        net = stir(lp.inject(MODELS["bert"](), [lp.LoRA(rank=3), lp.OwnParameters(targets=["classifier"])]), 7)
        alone = out(net)
        lp.export_peft(net, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == (["bert.pooler.dense", "classifier"] if task == "lora" else ["classifier"])
    assert "OwnParameters" in (tmp_path / "README.md").read_text()
    theirs = peft.PeftModel.from_pretrained(MODELS["bert"](), tmp_path)
    torch.testing.assert_close(out(theirs), alone)
    torch.testing.assert_close(out(lp.import_peft(MODELS["bert"](), tmp_path)), alone)
    with pytest.raises(ValueError, match="No method with adapters is named 'my_lora_own'"):
        lp.export_peft(together(tasks), tmp_path, name="my_lora_own")
