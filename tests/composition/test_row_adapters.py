"""Rows of one batch with adapters of their own: each row is what it is alone."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from adapter_edits import stir
from counting import OperatorCount
from models import MODELS, logits, tokens
from sampling import diagonal
from torch import nn

import lightning_peft as lp

ALL, after = ["all-linear"], functools.partial(lp.Bottleneck, std=0.5, train_norms=False, train_head=False)
KINDS = {
    "lora": [lp.LoRA(rank=2, alpha=3), lp.LoRA(rank=4, targets=ALL), lp.LoRA(rank=3, scaling="rank_stabilized")],
    "with dora": [lp.LoRA(rank=2), lp.LoRA(rank=2, decompose=True), lp.LoRA(rank=1, init="orthogonal", targets=ALL)],
    "scales": [lp.IA3(), lp.IA3(feedforward_targets=[]), lp.IA3(targets=["attention.query"], feedforward_targets=[])],
    "bottlenecks": [after(size=4), after(size=6), after(size=3, targets=["feedforward.down"])],
    "unlike bottlenecks": [after(size=4), after(size=4, activation="swish"), lp.IA3()],
    "beside blocks": [lp.ParallelAdapter(size=4), lp.ParallelAdapter(size=3, scale=2), lp.KronABlock(scale=2)],
    "different": [lp.AdaLoRA(initial_rank=4, target_rank=2), lp.FedPara(rank=2), lp.KronA(scale=2)],
}
NAMES = ["a", None, "c", "b", "a", "c"]


def model(base, methods):
    net = MODELS[base]()
    for name, method in zip("abc", methods, strict=True):
        lp.add_adapter(net, method, name)
    stir(net, 0)
    return net


def batch(base, rows=6):
    inputs = MODELS[base].inputs()
    generator = torch.Generator().manual_seed(2)
    if MODELS[base].reads == "images":
        return {k: torch.randn(rows, *v.shape[1:], generator=generator) for k, v in inputs.items()}
    return {"input_ids": torch.randint(3, 64, (rows, 7), generator=generator)}


def alone(net, inputs, names):
    """Return the logits of each row by itself, with its adapter or none."""
    rows = []
    for number, name in enumerate(names):
        one = {k: v[number : number + 1] for k, v in inputs.items()}
        if name is None:
            with lp.disabled(net):
                rows.append(logits(net(**one)))
        else:
            rows.append(logits(lp.activate(net, name)(**one)))
    return torch.cat(rows)


@diagonal(("base", "kind"), ["llama", "bert", "gpt2", "fused_vit", "plain"], KINDS)
def test_each_row_is_what_it_is_alone(base, kind):
    net, inputs = model(base, KINDS[kind]).double(), batch(base)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = alone(net, inputs, NAMES)
    orders = [getattr(m, "peft_order", None) for m in net.modules()]
    keys = net.state_dict().keys()
    with lp.row_adapters(net, NAMES):
        found = logits(net(**inputs))
        assert net.state_dict().keys() == keys
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found[0] - found[4]).abs().max() > 0
    assert [getattr(m, "peft_order", None) for m in net.modules()] == orders


def test_embeddings_and_convolutions_have_rows_too():
    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.look, self.convolve = nn.Embedding(9, 4), nn.Conv1d(4, 5, 3)

        def forward(self, input_ids):
            return self.convolve(self.look(input_ids).mT)

    net = Image().eval()
    for name in "ab":
        lp.add_adapter(net, lp.LoRA(rank=2, targets=["look", "convolve"]), name)
    stir(net, 3)
    inputs, names = {"input_ids": torch.arange(24).view(3, 8) % 9}, ["b", "a", "b"]
    with lp.row_adapters(net, names):
        found = net(**inputs)
    torch.testing.assert_close(found, alone(net, inputs, names))


@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoders_do_not_bypass_the_adapters_of_rows(padded):
    block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    net = nn.TransformerEncoder(block, 2, enable_nested_tensor=True).eval()
    for name in "ab":
        lp.add_adapter(net, lp.LoRA(rank=2, targets=["linear1", "linear2"]), name)
    stir(net, 5)
    x, padding = torch.randn(4, 5, 8), torch.zeros(4, 5, dtype=torch.bool)
    padding[1:, 3:] = padded
    names = ["a", "b", None, "b"]
    with torch.no_grad():
        expected = []
        for number, name in enumerate(names):
            row = {"src": x[number : number + 1], "src_key_padding_mask": padding[number : number + 1]}
            if name is None:
                with lp.disabled(net):
                    expected.append(net(**row))
            else:
                expected.append(lp.activate(net, name)(**row))
        with lp.row_adapters(net, names):
            found = net(x, src_key_padding_mask=padding)
    kept = ~padding[..., None]
    torch.testing.assert_close(found * kept, torch.cat([F.pad(y, (0, 0, 0, 5 - y.shape[1])) for y in expected]) * kept)
    assert (found[1] - found[2]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["lora", "scales", "bottlenecks", "unlike bottlenecks", "beside blocks"])
def test_gradients_are_those_of_each_row_alone(kind):
    net = model("bert", KINDS[kind]).double()
    lp.activate(net, "a", "b", "c")
    twin, inputs, names = copy.deepcopy(net), batch("bert"), ["a", "b", "c", "b", "a", "c"]
    with lp.row_adapters(net, names):
        logits(net(**inputs)).square().sum().backward()
    for number, name in enumerate(names):
        lp.activate(twin, name)
        logits(twin(input_ids=inputs["input_ids"][number : number + 1])).square().sum().backward()
    expected = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)


def test_each_row_drops_as_its_adapter_does():
    net = nn.Sequential(nn.Linear(2000, 1, bias=False)).train()
    for name, dropout in (("a", 0.0), ("b", 0.5)):
        lp.add_adapter(net, lp.LoRA(rank=1, alpha=1, dropout=dropout, targets=["0"]), name)
    for *_, adapter in lp.adapters(net):
        nn.init.ones_(adapter.a)
        nn.init.ones_(adapter.b)
    nn.init.zeros_(net[0].weight)
    with lp.row_adapters(net, ["a", "b"]):
        (kept,), (dropped,) = net(torch.ones(2, 2000)).tolist()
    assert kept == 2000
    assert dropped != 2000
    assert abs(dropped - 2000) < 300


def require_each_its_own_text(net, ids, names):
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    with lp.row_adapters(net, list(names)):
        found = net.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    for number, name in enumerate(names):
        one = ids[number : number + 1]
        expected = lp.activate(net, name).generate(one, attention_mask=torch.ones_like(one), **settings)
        assert torch.equal(found[number : number + 1], expected)


def test_beams_are_neighbours_and_generate_works():
    net = model("llama", KINDS["lora"])
    ids = tokens(rows=2)
    require_each_its_own_text(net, ids, "ab")


@pytest.mark.slow
def test_rows_and_narrow_types_and_compilation():
    torch._dynamo.reset()
    net = model("bert", KINDS["lora"])
    inputs = batch("bert")
    with lp.row_adapters(net, NAMES), torch.no_grad():
        expected = logits(net(**inputs))
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled(**inputs)), expected)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(logits(net(**inputs)).float(), expected, rtol=0.1, atol=0.1)
    net.bfloat16()
    with lp.row_adapters(net, NAMES), torch.no_grad():
        torch.testing.assert_close(logits(net(**inputs)).float(), expected, rtol=0.1, atol=0.1)


def test_whether_rows_are_stacked_makes_no_difference(monkeypatch):
    for kind in ("lora", "scales", "bottlenecks"):
        net, inputs, found = model("bert", KINDS[kind]), batch("bert"), []
        for stacked in (True, False):
            if not stacked:
                for *_, adapter in lp.adapters(net):
                    monkeypatch.setattr(type(adapter), "per_example_tensors", lambda self: ())
            with lp.row_adapters(net, NAMES), torch.no_grad():
                found.append(logits(net(**inputs)))
        monkeypatch.undo()
        torch.testing.assert_close(*found)


def test_calls_do_not_grow_with_adapters():
    for method in (lp.LoRA(rank=2), lp.IA3(), after(size=4)):
        net, counts = MODELS["bert"](), []
        for number in range(8):
            lp.add_adapter(net, method, f"a{number}")
        for used in (3, 8):
            rows = lp.row_adapters(net, [f"a{row % used}" for row in range(8)])
            with rows, torch.no_grad(), OperatorCount() as count:
                net(**batch("bert", 8))
            counts.append(count.operators.total())
        assert counts[0] == counts[1]


def test_what_changes_between_calls_is_seen():
    net, inputs, names = model("bert", KINDS["lora"]), batch("bert", 3), ["a", "b", "c"]

    def step():
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        logits(net(**inputs)).square().sum().backward()
        optimizer.step()

    def write(change):
        for *_, adapter in lp.adapters(net):
            change(adapter.b)

    def replace():
        lp.add_adapter(lp.remove_adapter(net, "b"), lp.LoRA(rank=5, alpha=1), "b")
        stir(net, 9)

    changes = {
        "in place": lambda: write(nn.init.normal_),
        "through data": lambda: write(lambda b: b.data.mul_(3)),
        "other data": lambda: write(lambda b: setattr(b, "data", b.data + 1)),
        "loaded": lambda: net.load_state_dict({k: v * 1.1 for k, v in net.state_dict().items()}),
        "assigned": lambda: net.load_state_dict({k: v * 1.1 for k, v in net.state_dict().items()}, assign=True),
        "trained": lambda: (lp.activate(net, "a", "b"), step()),
        "switched": lambda: lp.activate(net, "b"),
        "another": replace,
        "wider": net.double,
    }

    def run(net):
        with lp.row_adapters(net, names), torch.no_grad():
            return logits(net(**inputs))

    for name, change in changes.items():
        before = run(net)
        change()
        found, twin = run(net), copy.deepcopy(net)
        assert torch.equal(run(twin), found)
        with torch.no_grad():
            torch.testing.assert_close(found, alone(twin, inputs, names), rtol=1e-4, atol=1e-4)
        assert torch.equal(before, found.float()) is (name == "switched"), name


def test_what_changes_within_the_context_is_seen():
    net, inputs, names = model("bert", KINDS["lora"]), batch("bert", 3), ["a", "b", "c"]
    with lp.row_adapters(net, names), torch.no_grad():
        net(**inputs)
        for *_, adapter in lp.adapters(net):
            adapter.b.data.mul_(3)
        net.double()
        found = logits(net(**inputs))
    torch.testing.assert_close(found, alone(net, inputs, names), rtol=1e-6, atol=1e-8)


def prompted(base):
    net = MODELS[base]()
    where = {"targets": ["trunk"], "embeddings": "embed"} if base == "plain" else {}
    methods = [lp.PromptTuning(length=3, **where), lp.PTuning(length=3, **where)]
    for name, method in zip("abc", [*methods, lp.MultitaskPromptTuning(length=3, **where)], strict=True):
        lp.add_adapter(net, method, name)
    return net


@pytest.mark.parametrize("base", ["llama", "bert", "t5", "plain"])
def test_rows_have_prompts_of_their_own(base):
    net, inputs = prompted(base), MODELS[base].inputs(padding="left")
    inputs = {k: torch.cat([v, v.flip(0)]) for k, v in inputs.items()}
    names = ["b", "a", "c", "a"]
    with lp.row_adapters(net, names), torch.no_grad():
        found = logits(net(**inputs))
    with torch.no_grad():
        expected = alone(net, inputs, names)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found[0] - found[-1]).abs().max() > 0  # the same text


def test_prompts_of_rows_train_and_generate():
    net, ids = prompted("llama"), tokens(rows=2)
    for *_, adapter in lp.adapters(net):
        adapter.requires_grad_(True)
    with lp.row_adapters(net, ["a", "c"]):
        logits(net(ids)).square().sum().backward()
    found = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    for number, name in enumerate("ac"):
        logits(lp.activate(net, name)(ids[number : number + 1])).square().sum().backward()
    assert {n.split(".")[2] for n in found} == {"a", "c"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, net.get_parameter(name).grad, rtol=1e-4, atol=1e-4)
    require_each_its_own_text(net, ids, "ac")


def test_refusals_of_prompts():
    net = prompted("llama")
    lp.add_adapter(net, lp.PromptTuning(length=4), "long")
    lp.add_adapter(net, lp.PromptTuning(length=3, tasks=2), "tasks")
    lp.add_adapter(net, lp.LoRA(rank=2), "lora")
    for name in (None, "lora"):
        with pytest.raises(ValueError, match="Row 1 has no TrainedPrompt, and others have"):  # noqa: SIM117
            with lp.row_adapters(net, ["a", name]):
                pass
    for names in (["a", "long"], ["tasks", "a"], ["a", "tasks"]):
        with lp.row_adapters(net, names), pytest.raises(ValueError, match="all are of one length, for one task"):
            net(tokens(rows=2))
    with lp.row_adapters(net, ["a", "b", "a"]), pytest.raises(ValueError, match="3 names; 2 rows are no multiple"):
        net(tokens(rows=2))


def test_refusals():
    methods = [lp.LoRA(rank=2), lp.LLaMAAdapter(length=2), lp.PrefixTuning(length=2)]
    net = model("llama", methods)
    with pytest.raises(ValueError, match="no adapter named 'x'; it has 'a', 'b', 'c'"), lp.row_adapters(net, ["x"]):
        pass
    for name, kind in (
        ("b", "'b' at .*self_attn is a LLaMAAdapterPrompt on a"),
        ("c", "'c_encoder' at model is a SharedEncoder on"),
    ):
        with pytest.raises(TypeError, match=f"{kind} .*; rows can have different adapters only where"):  # noqa: SIM117
            with lp.row_adapters(net, ["a", name]):
                pass
    for names in ("a", []):
        with pytest.raises(ValueError, match="a list of names"), lp.row_adapters(net, names):
            pass
    with lp.row_adapters(net, ["a", None, "a"]):
        with pytest.raises(ValueError, match="given 3 names, and a layer has 2 rows"):
            net(tokens(rows=2))
        with pytest.raises(RuntimeError, match="cannot change while they are inactive"):  # noqa: SIM117
            with lp.row_adapters(net, ["a"]):
                pass
        with lp.disabled(net):
            assert torch.equal(logits(net(tokens())), logits(MODELS["llama"]()(tokens())))
    for method in (lp.LoRA(rank=2), lp.IA3(), after(size=2)):
        encoder = lp.add_adapter(MODELS["encoder"](), method, "one")
        with pytest.raises(TypeError, match="'one.*' at .*self_attn is a .* on a MultiheadAttention"):  # noqa: SIM117
            with lp.row_adapters(encoder, ["one"]):
                pass
    trained = lp.inject(MODELS["bert"](), lp.Bottleneck(size=2))
    with pytest.raises(TypeError, match="'bottleneck' trains bert.* in the base"):  # noqa: SIM117
        with lp.row_adapters(trained, ["bottleneck"]):
            pass
    tokens_first = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1))
    lp.add_adapter(tokens_first, lp.LoRA(rank=2, targets=["0"]))
    with (
        pytest.raises(ValueError, match=r"1 takes \(tokens, batch, features\)"),
        lp.row_adapters(tokens_first, ["lora"]),
    ):
        pass
    assert not [n for n, _ in net.named_modules() if "_rows" in n]
