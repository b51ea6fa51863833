"""Rows of query, key and value in fused layers, measured by a trace, beside the split that each model does itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
from installed import needs
from models import MODELS
from torch import nn

import lightning_peft as lp
from lightning_peft.core import select
from lightning_peft.structure.example_inputs import example_inputs
from lightning_peft.structure.hollow_twin import hollow_twin
from lightning_peft.structure.rows import Rows, periodic_rows
from lightning_peft.structure.structure_of import structure_of
from lightning_peft.structure.trace import trace
from lightning_peft.structure.traced_attention import ranges_of

WIDTH, HEADS, SIZE = 32, 4, 8
PARTS = ("query", "key", "value")


class Odd(nn.Module):
    """Attention whose names mean nothing; rows lie as value, query, key, or head by head."""

    def __init__(self, by_head, eager):
        super().__init__()
        self.a1, self.b7, self.by_head, self.eager = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            by_head,
            eager,
        )
        self.example_input_array = torch.randn(2, 5, WIDTH)

    def forward(self, x):
        y = self.a1(x)
        if self.by_head:
            v, q, k = y.view(*x.shape[:2], HEADS, 3, SIZE).unbind(3)
        else:
            v, q, k = (part.view(*x.shape[:2], HEADS, SIZE) for part in y.chunk(3, -1))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.eager:
            z = torch.matmul((q @ k.mT / SIZE**0.5).softmax(-1), v)
        else:
            z = F.scaled_dot_product_attention(query=q, key=k, value=v)
        return self.b7(z.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize("by_head", [False, True], ids=["parts", "heads"])
def test_names_and_order_do_not_matter(by_head, eager):
    model = Odd(by_head, eager)
    (call,) = trace(hollow_twin(model), (model.example_input_array,), {}).attention
    for number, part in enumerate(("value", "query", "key")):
        ((name, features),) = getattr(call, part).items()
        assert name == "a1"
        step = [(h * 3 + number) * SIZE for h in range(HEADS)]
        expected = [(s, s + SIZE) for s in step] if by_head else [(number * WIDTH, (number + 1) * WIDTH)]
        assert ranges_of(features) == expected
    found = structure_of(model).rows["a1"]
    if by_head:
        assert found == [Rows(part, s, s + SIZE, 3 * SIZE, HEADS) for part, s in zip(PARTS, (8, 16, 0), strict=True)]
    else:
        assert found == [Rows("query", 32, 64), Rows("key", 64, 96), Rows("value", 0, 32)]
    assert structure_of(model).rows["b7"] is None


def phi3(head_dim=SIZE):
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    config.head_dim = head_dim
    return Phi3ForCausalLM(config)


def codegen():
    from transformers import CodeGenConfig, CodeGenForCausalLM

    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 32, "rotary_dim": 4}
    return CodeGenForCausalLM(CodeGenConfig(vocab_size=64, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def gpt_bigcode(multi_query):
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 32, "multi_query": multi_query}
    return GPTBigCodeForCausalLM(
        GPTBigCodeConfig(vocab_size=64, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    )


def heads(order, block):
    """Return the ranges of parts that alternate head by head in blocks of this many rows."""
    starts = {part: [(3 * head + i) * block for head in range(HEADS)] for i, part in enumerate(order)}
    return {part: [(start, start + block) for start in numbers] for part, numbers in starts.items()}


RANGES = {  # computed from the splits in each model's code
    "phi3": (phi3, "qkv_proj", {"query": [(0, 32)], "key": [(32, 48)], "value": [(48, 64)]}),
    "phi3, wide heads": (lambda: phi3(16), "qkv_proj", {"query": [(0, 64)], "key": [(64, 96)], "value": [(96, 128)]}),
    "phi3, narrow heads": (lambda: phi3(4), "qkv_proj", {"query": [(0, 16)], "key": [(16, 24)], "value": [(24, 32)]}),
    "codegen": (codegen, "qkv_proj", heads(("query", "value", "key"), SIZE)),
    "gpt_bigcode": (lambda: gpt_bigcode(True), "c_attn", {"query": [(0, 32)], "key": [(32, 40)], "value": [(40, 48)]}),
    "gpt_bigcode, all heads": (lambda: gpt_bigcode(False), "c_attn", heads(PARTS, SIZE)),
    "gpt2": (MODELS["gpt2"].make, "c_attn", {"query": [(0, 32)], "key": [(32, 64)], "value": [(64, 96)]}),
}


@needs("transformers")
@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rows_are_those_of_the_models_own_split(name, device):
    make, layer, expected = RANGES[name]
    with torch.device(device):
        model = make()
    calls = trace(hollow_twin(model), *example_inputs(model)).attention
    assert len(calls) in (2, 3)
    for call in calls:
        for part in PARTS:
            ((found, features),) = getattr(call, part).items()
            assert found.endswith(layer)
            assert ranges_of(features) == expected[part]


def attention_inputs(model):
    """Return query, key and value of the first attention call."""
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                seen.append([x.clone() for x in args[:3]])
            return func(*args, **(kwargs or {}))

    with Spy(), torch.no_grad():
        model(torch.arange(3, 11)[None])
    return seen[0]


@needs("transformers")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", RANGES)
def test_a_role_changes_its_part_alone(name, part):
    torch.manual_seed(0)
    model = RANGES[name][0]().eval()
    before = attention_inputs(model)
    lp.inject(model, lp.LoRA(rank=2, targets=[f"attention.{part}"]))
    for *_, adapter in lp.adapters(model):
        nn.init.normal_(adapter.b)
    changed = [not torch.equal(x, y) for x, y in zip(before, attention_inputs(model), strict=True)]
    assert changed == [each == part for each in PARTS]


def test_rows_that_repeat_are_taken_put_and_padded_at_their_places():
    rows, weight = Rows("key", 1, 3, 4, 3), torch.arange(24.0).view(12, 2)
    places = [1, 2, 5, 6, 9, 10]
    assert rows.size == 6
    assert list(rows.numbers()) == places
    assert str(rows) == "key 1:3, 5:7, ..."
    assert torch.equal(rows.take(weight), weight[places])
    new = -torch.ones(6, 2)
    expected = weight.clone()
    expected[places] = new
    assert torch.equal(rows.put(weight, new), expected)
    padded = torch.full((2, 12), 7.0)
    padded[:, places] = new.T
    assert torch.equal(rows.pad(new.T, 12, fill=7.0), padded)
    for first, part in rows.split(new):
        weight[first : first + len(part)] = part
    assert torch.equal(weight, expected)


@pytest.mark.parametrize(
    ("ranges", "out", "expected"),
    [
        ([(2, 5)], 9, Rows("key", 2, 5)),
        ([(1, 2), (4, 5), (7, 8)], 9, Rows("key", 1, 2, 3, 3)),
        ([(1, 2), (4, 5)], 9, None),  # nothing in the third period
        ([(1, 2), (5, 6), (7, 8)], 9, None),
        ([(1, 2), (4, 6), (7, 8)], 9, None),
    ],
)
def test_rows_repeat_over_the_whole_layer_or_are_none(ranges, out, expected):
    assert periodic_rows("key", ranges, out) == expected


METHODS = {
    "lora": lp.LoRA(rank=2, targets=["attention.query", "attention.value"]),
    "dora": lp.LoRA(rank=2, decompose=True, targets=["attention.query", "attention.value"]),
    "adalora": lp.AdaLoRA(initial_rank=3, target_rank=2, targets=["attention.key"]),
    "fedpara": lp.FedPara(targets=["attention.key", "attention.value"], rank=2),
    "krona": lp.KronA(targets=["attention.query"], factor=4),
    "ia3": lp.IA3(),
}


@needs("transformers")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["codegen", "gpt_bigcode, all heads"])
def test_live_and_merged_agree_where_rows_repeat(name, method):
    torch.manual_seed(0)
    model = lp.inject(RANGES[name][0]().eval(), METHODS[method])
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad(), lp.disabled(model):
        base = model(ids).logits
    with torch.no_grad():
        live = model(ids).logits
        assert (live - base).abs().max() > 1e-3
        torch.testing.assert_close(lp.merge(model)(ids).logits, live, atol=1e-4, rtol=1e-4)


@needs("transformers")
@pytest.mark.parametrize("name", ["codegen", "gpt_bigcode, all heads"])
def test_a_layer_whose_rows_interleave_is_adapted_as_a_whole_by_a_glob(name):
    make, layer, _ = RANGES[name]
    model = lp.inject(make().eval(), lp.LoRA(rank=2, targets=[layer]))
    for *_, adapter in lp.adapters(model):
        nn.init.normal_(adapter.b)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        live = model(ids).logits
        torch.testing.assert_close(lp.merge(model)(ids).logits, live, atol=1e-4, rtol=1e-4)


@needs("transformers")
def test_keys_of_a_prefix_are_projected_by_the_rows_of_the_keys():
    torch.manual_seed(0)
    model = phi3(16).eval()
    base = copy.deepcopy(model)
    lp.inject(model, lp.LLaMAAdapter(length=2, layers=1))
    ((_, host, _, adapter),) = lp.adapters(model)
    nn.init.ones_(adapter.gate)
    ids = torch.arange(3, 11)[None]
    attention, x = base.model.layers[1].self_attn, adapter.prompt.detach()
    fused = attention.qkv_proj(x)
    with torch.no_grad():
        assert (model(ids).logits - base(ids).logits).abs().max() > 1e-4
        keys, values = fused[..., 64:96], fused[..., 96:128]
        found = adapter.project(host, x)
    torch.testing.assert_close(found[0].detach(), keys.detach())
    torch.testing.assert_close(found[1].detach(), values.detach())


@needs("transformers")
def test_a_trace_leaves_the_model_and_the_random_numbers_alone():
    model = phi3().train()
    hooks, before, state = [], copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.lm_head.register_forward_hook(lambda *args: hooks.append(1))
    assert [rows for *_, rows in select(model, ["attention.key"])] == [Rows("key", 32, 48)] * 2
    assert hooks == []
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@needs("transformers")
def test_an_adapted_model_is_traced_without_its_adapters():
    model = lp.inject(phi3(), lp.LoRA(rank=2))
    twin = hollow_twin(model)
    assert not [name for name in dict(twin.named_modules()) if "peft" in name.split(".")]
    assert len(trace(twin, *example_inputs(model)).attention) == 2


@needs("transformers")
def test_a_model_that_needs_other_inputs_keeps_the_rows_of_its_shape_and_says_so(monkeypatch):
    model = phi3()
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, secret: None)
    with pytest.warns(UserWarning, match=r"could not be traced \(TypeError: .*secret.*found by their names"):
        selected = select(model, ["attention.key"])
    assert [rows for *_, rows in selected] == [Rows("key", 32, 48)] * 2
