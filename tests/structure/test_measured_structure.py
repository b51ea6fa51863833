"""Roles, blocks, output and head by what feeds what: names and the order of registration do not matter."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from installed import needs
from models import MODELS
from torch import nn

import lightning_peft as lp
from lightning_peft.structure.rows import Rows
from lightning_peft.structure.structure import FeedForward
from lightning_peft.structure.structure_of import structure_of

WIDTH, HEADS, SIZE = 32, 4, 8


class Mixer(nn.Module):
    """Attention whose query, key and value lie head by head in one layer."""

    def __init__(self):
        super().__init__()
        self.b7 = nn.Linear(WIDTH, WIDTH)
        self.a1 = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, z):
        v, q, k = self.a1(z).view(*z.shape[:2], HEADS, 3, SIZE).transpose(1, 2).unbind(3)
        return self.b7(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Odd(nn.Module):
    """Block with a gated feed-forward; ``x9`` is multiplied with the activation of ``c3``."""

    def __init__(self):
        super().__init__()
        self.d4, self.x9, self.c3 = nn.Linear(48, WIDTH), nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48)
        self.n1, self.n2, self.m = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Mixer()

    def forward(self, z):
        z = z + self.m(self.n1(z))
        y = self.n2(z)
        return z + self.d4(F.silu(self.c3(y)) * self.x9(y))


class Even(nn.Module):
    """Block of another kind: recurrence in place of attention, and a feed-forward without a gate."""

    def __init__(self):
        super().__init__()
        self.q0, self.r = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 64)
        self.t, self.n1, self.n2 = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, z):
        z = z + self.t(self.n1(z)).cumsum(1)
        return z + self.q0(F.relu(self.r(self.n2(z))))


class Strange(nn.Module):
    """A classifier of tokens: its head is registered first, its blocks are of two kinds and mixed."""

    def __init__(self):
        super().__init__()
        self.zz = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 3))
        self.k = nn.ModuleList([Odd(), Even(), Odd(), Even()])
        self.u = nn.LayerNorm(WIDTH)
        self.w = nn.Embedding(20, WIDTH)
        self.never = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        z = self.w(ids)
        for block in self.k:
            z = block(z)
        return self.zz(self.u(z).mean(1))


EXAMPLE = torch.arange(2, 9)[None]


@pytest.fixture
def strange():
    torch.manual_seed(0)
    model = Strange()
    model.example_input_array = EXAMPLE
    return model


def test_a_model_of_ones_own_has_every_role_row_block_and_head(strange):
    structure = structure_of(strange)
    odd, even = ("k.0", "k.2"), ("k.1", "k.3")
    assert structure.measured
    expected = {
        **{f"attention.{part}": [f"{block}.m.a1" for block in odd] for part in ("query", "key", "value")},
        "attention.output": [f"{block}.m.b7" for block in odd],
        "feedforward.up": ["k.0.x9", "k.0.c3", "k.1.r", "k.2.x9", "k.2.c3", "k.3.r"],
        "feedforward.down": ["k.0.d4", "k.1.q0", "k.2.d4", "k.3.q0"],
        "attention": ["k.0.m", "k.2.m"],
        "blocks": ["k.0", "k.1", "k.2", "k.3"],
        "output": ["zz.0", "zz.2"],
        "unused": ["never.weight", "never.bias"],
        "read": [],
        "zero_inputs": [],
    }
    assert {key: list(structure.names[key]) for key in expected} == expected
    assert even == ("k.1", "k.3")
    assert structure.feedforward == {
        **{f"k.{i}.d4": FeedForward((f"k.{i}.c3", f"k.{i}.x9"), f"k.{i}.x9") for i in (0, 2)},
        **{f"k.{i}.q0": FeedForward((f"k.{i}.r",), None) for i in (1, 3)},
    }
    rows = [Rows(part, s, s + SIZE, 3 * SIZE, HEADS) for part, s in (("query", 8), ("key", 16), ("value", 0))]
    assert structure.rows["k.0.m.a1"] == structure.rows["k.2.m.a1"] == rows
    assert structure.rows["k.0.m.b7"] is None


PLAIN = [f"k.{i}.{n}" for i in (1, 3) for n in ("r", "q0")]
METHODS = {
    "lora": (lp.LoRA(rank=2), [f"k.{i}.m.a1" for i in (0, 0, 2, 2)]),
    "ia3": (
        lp.IA3(),
        ["k.0.x9", "k.0.m.a1", "k.0.m.a1", "k.1.q0", "k.2.x9", "k.2.m.a1", "k.2.m.a1", "k.3.q0"],
    ),
    "prefix": (lp.PTuningV2(length=2), ["k.0.m", "k.2.m"]),
    "llama_adapter": (lp.LLaMAAdapter(length=2, layers=2), ["k.0.m", "k.2.m"]),
    "parallel": (lp.ParallelAdapter(size=4), [f"k.{i}.{n}" for i in (0, 2) for n in ("c3", "d4")] + PLAIN),
    "bottleneck": (lp.Bottleneck(size=4), ["k.0.d4", "k.0.m.b7", "k.1.q0", "k.2.d4", "k.2.m.b7", "k.3.q0"]),
}


@pytest.mark.filterwarnings("ignore:Adapters reach 2 of 4 blocks")
@pytest.mark.parametrize("method", METHODS)
def test_default_targets_of_methods_find_their_hosts(strange, method):
    method, expected = METHODS[method]
    lp.inject(strange, method)
    assert sorted(name for name, *_ in lp.adapters(strange)) == sorted(expected)
    before = strange(EXAMPLE)
    before.sum().backward()
    for *_, adapter in lp.adapters(strange):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    assert (strange(EXAMPLE) - before).abs().max() > 1e-3


def test_last_layers_and_output_layers_follow_the_calls(strange):
    lp.inject(strange, lp.LastLayers(count=1))
    trained = {name.rsplit(".", 1)[0] for name, p in strange.named_parameters() if p.requires_grad}
    assert trained == {"k.3.t", "k.3.n1", "k.3.n2", "k.3.r", "k.3.q0", "u", "zz.0", "zz.2"}
    lp.detach(strange)
    lp.inject(strange, lp.OutputLayers())
    assert {name.rsplit(".", 1)[0] for name, p in strange.named_parameters() if p.requires_grad} == {"zz.0", "zz.2"}


def test_without_an_example_the_names_of_a_model_decide():
    structure = structure_of(Strange())
    assert not structure.measured
    assert structure.names["attention.query"] == []
    with pytest.raises(ValueError, match=r"'attention.query' matches nothing .*give example_inputs"):
        lp.inject(Strange(), lp.LoRA(rank=2))


UNTOUCHED = r"Adapters reach 2 of 4 blocks \(21.9 % of their weights\): nothing in k.1, k.3 plays a role"


def test_an_example_is_given_to_inject_and_blocks_without_the_roles_are_said():
    with pytest.warns(UserWarning, match=UNTOUCHED):
        model = lp.inject(Strange(), lp.LoRA(rank=2), example_inputs=EXAMPLE)
    assert [name for name, *_ in lp.adapters(model)] == METHODS["lora"][1]
    assert str(lp.summary(model)).endswith("adapters are in 2 of 4 blocks (21.9 % of their weights)")
    with pytest.warns(UserWarning, match=UNTOUCHED):
        by_name = lp.inject(Strange(), lp.LoRA(rank=2), example_inputs={"ids": EXAMPLE})
    assert [name for name, *_ in lp.adapters(by_name)] == METHODS["lora"][1]


@needs("transformers")
def test_models_are_traced_where_new_tensors_have_no_values():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    with torch.device("meta"):
        model = lp.inject(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, **sizes)), lp.LoRA(rank=2))
    assert [adapter.part for *_, adapter in lp.adapters(model)] == ["query", "value"] * 2


class ReadsItsWeights(nn.Module):
    """Block that reads the weight of ``b`` instead of calling it, as Mamba does; ``s`` gets zeros."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.s = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return x + self.a(x) @ self.b.weight.T + F.silu(self.c(x)) + self.s(torch.zeros_like(x))


def reads():
    model = nn.Sequential(ReadsItsWeights(), ReadsItsWeights())
    model.example_input_array = torch.randn(1, 5, 8)
    return model


def test_weights_that_are_read_and_inputs_of_zeros_are_left_out_and_said():
    structure = structure_of(reads())
    assert structure.names["read"] == ["0.b", "1.b"]
    assert structure.names["zero_inputs"] == ["0.s", "1.s"]
    model = reads()
    with pytest.warns(UserWarning, match="leaves out") as warned:
        lp.inject(model, lp.LoRA(rank=2, targets=["all-linear"]))
    assert [str(w.message) for w in warned] == [
        "all-linear leaves out 0.b, 1.b: the weight is read outside of calls.",
        "all-linear leaves out 0.s, 1.s: the inputs are always zero.",
    ]
    assert [name for name, *_ in lp.adapters(model)] == ["0.a", "0.c", "1.a", "1.c"]


def test_an_adapter_on_a_weight_that_is_read_is_refused_before_anything_changes():
    model = reads()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"weight of 0.b is read outside of its calls"):
        lp.inject(model, lp.LoRA(rank=2, targets=["b"]))
    assert list(model.state_dict()) == list(before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def aliases(monkeypatch):
    """Modules find their children by old names, too."""
    original = nn.Module.__getattr__

    def by_old_name(module, name):
        new = module.__dict__.get("_new_names", {}).get(name)
        return original(module, name if new is None else new)

    monkeypatch.setattr(nn.Module, "__getattr__", by_old_name)


def scrambled(model):
    """Return a copy whose modules have meaningless names, and the old names by the new ones; needs ``aliases``."""
    model = copy.deepcopy(model)
    numbers = iter(torch.randperm(10_000, generator=torch.Generator().manual_seed(0)).tolist())
    for module in model.modules():
        if module._modules and not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            module._new_names = {name: f"m{next(numbers)}" for name in module._modules}
            module._modules = {module._new_names[name]: child for name, child in module._modules.items()}
    old_names = {id(module): name for name, module in _old_names(model)}
    return model, {name: old_names[id(module)] for name, module in model.named_modules()}


def _old_names(module, prefix=""):
    """Yield (name before the scrambling, module)."""
    yield prefix, module
    names = {new: old for old, new in getattr(module, "_new_names", {}).items()}
    for name, child in module._modules.items():
        if child is not None:
            yield from _old_names(child, f"{prefix}.{names.get(name, name)}".lstrip("."))


def hosts(model, method, names=None):
    try:
        lp.inject(model, method)
    except (ValueError, TypeError) as error:
        return type(error)
    found = [(name if names is None else names[name], adapter.part) for name, _, _, adapter in lp.adapters(model)]
    trained = [n for n, p in model.named_parameters() if p.requires_grad and ".peft." not in n]
    owners = {n.rpartition(".")[0] for n in trained}
    lp.detach(model)
    return sorted(found), sorted(owners if names is None else {names[o] for o in owners})


ROLE_METHODS = [lp.LoRA(rank=1), lp.LoRA(rank=1, targets=["all-linear"]), lp.IA3(), lp.PTuningV2(length=2)]
ROLE_METHODS += [lp.Bottleneck(size=2), lp.ParallelAdapter(size=2), lp.OutputLayers(), lp.LastLayers(count=1)]


def assert_same_hosts_with_scrambled_names(model):
    other, names = scrambled(model)
    for method in ROLE_METHODS:
        assert hosts(other, method, names) == hosts(model, method), method


@needs("transformers")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_scrambled_names_give_the_same_hosts(name, aliases):
    assert_same_hosts_with_scrambled_names(MODELS[name].make())


@pytest.mark.slow
@needs("transformers")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scrambled_names_give_the_same_hosts_on_every_architecture(shared, monkeypatch, aliases):
    folder = shared / "census"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    monkeypatch.syspath_prepend(str(folder))
    zoo = importlib.import_module("zoo")
    for name in zoo.ALL:
        model, *_ = zoo.build(name)
        assert_same_hosts_with_scrambled_names(model)


class BlockOfTorch(nn.Module):
    """Torch's own attention, and another one whose output nobody reads."""

    def __init__(self):
        super().__init__()
        self.attend, self.idle = (nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x):
        self.idle(x, x, x)
        x = x + self.attend(x, x, x)[0]
        return x + self.down(self.up(x).relu())


def test_outputs_depend_on_attention_of_torch_that_they_read_and_on_no_other():
    net = nn.Sequential(BlockOfTorch(), BlockOfTorch(), nn.Linear(WIDTH, 2))
    with pytest.warns(UserWarning, match=r"all-linear leaves out 0\.idle, .*: no output depends on the parameters"):
        lp.inject(net, lp.LoRA(rank=2, targets=["all-linear"]), example_inputs=(torch.randn(2, 5, WIDTH),))
    found = [name for name, *_ in lp.adapters(net)]
    parts = ["attend"] * 3 + ["attend.out_proj", "up", "down"]  # query, key and value are rows of one weight
    assert found == [f"{block}.{part}" for block in (0, 1) for part in parts]
