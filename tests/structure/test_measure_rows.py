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
from lightning_peft.structure.rows import Rows
from lightning_peft.structure.structure_of import structure_of
from lightning_peft.structure.tracing.example_inputs import example_inputs
from lightning_peft.structure.tracing.hollow_twin import hollow_twin
from lightning_peft.structure.tracing.trace import trace
from lightning_peft.structure.tracing.traced_attention import ranges_of

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


def tiny(family, head="AutoModelForCausalLM", **sizes):
    import transformers

    config = transformers.AutoConfig.for_model(family, vocab_size=64, **sizes)
    return getattr(transformers, head).from_config(config)


def falcon(**layout):
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "ffn_hidden_size": 48}
    return tiny("falcon", **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0, **layout)


USUAL = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}
GROUPS = {  # two groups of two query heads, one key head and one value head
    "query": [(0, 16), (32, 48)],
    "key": [(16, 24), (48, 56)],
    "value": [(24, 32), (56, 64)],
}
BELOW = {"query": [(0, 32)], "key": [(32, 64)], "value": [(64, 96)]}

RANGES = {  # computed from the splits in each model's code
    "phi3": (phi3, "qkv_proj", {"query": [(0, 32)], "key": [(32, 48)], "value": [(48, 64)]}),
    "phi3, wide heads": (lambda: phi3(16), "qkv_proj", {"query": [(0, 64)], "key": [(64, 96)], "value": [(96, 128)]}),
    "phi3, narrow heads": (lambda: phi3(4), "qkv_proj", {"query": [(0, 16)], "key": [(16, 24)], "value": [(24, 32)]}),
    "codegen": (codegen, "qkv_proj", heads(("query", "value", "key"), SIZE)),
    "gpt_bigcode": (lambda: gpt_bigcode(True), "c_attn", {"query": [(0, 32)], "key": [(32, 40)], "value": [(40, 48)]}),
    "gpt_bigcode, all heads": (lambda: gpt_bigcode(False), "c_attn", heads(PARTS, SIZE)),
    "gpt2": (MODELS["gpt2"].make, "c_attn", BELOW),
    "gpt_neox": (lambda: tiny("gpt_neox", **USUAL), "query_key_value", heads(PARTS, SIZE)),
    "bloom": (lambda: tiny("bloom", hidden_size=WIDTH, n_layer=2, n_head=HEADS), "query_key_value", heads(PARTS, SIZE)),
    "falcon": (
        lambda: falcon(multi_query=True, new_decoder_architecture=False),
        "query_key_value",
        {"query": [(0, 32)], "key": [(32, 40)], "value": [(40, 48)]},
    ),
    "falcon, all heads": (
        lambda: falcon(multi_query=False, new_decoder_architecture=False),
        "query_key_value",
        heads(PARTS, SIZE),
    ),
    "falcon, groups": (lambda: falcon(new_decoder_architecture=True, num_kv_heads=2), "query_key_value", GROUPS),
    "mpt": (lambda: tiny("mpt", d_model=WIDTH, n_heads=HEADS, n_layers=2, expansion_ratio=2), "Wqkv", BELOW),
    "dbrx": (
        lambda: tiny(
            "dbrx",
            **{"d_model": WIDTH, "n_heads": HEADS, "n_layers": 2},
            attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1},
        ),
        "Wqkv",
        {"query": [(0, 32)], "key": [(32, 48)], "value": [(48, 64)]},
    ),
    "modernbert": (lambda: tiny("modernbert", "AutoModelForMaskedLM", **USUAL, pad_token_id=0), "Wqkv", BELOW),
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
    rows = [r for r in structure_of(model).rows.values() if r is not None]
    assert len(rows) == (0 if name == "gpt2" else len(calls))  # GPT-2 is known by its names
    assert all([r.ranges() for r in each] == [expected[part] for part in PARTS] for each in rows)
    print(f"{name:22} {layer:16} {', '.join(map(str, rows[0])) if rows else 'by names'}")  # noqa: T201


def fused_output(model, layer):
    """Return the output of the first layer of a name."""
    host = next(module for name, module in model.named_modules() if name.endswith(layer))
    outputs = []
    handle = host.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(torch.arange(3, 11)[None])
    handle.remove()
    return outputs[0]


@needs("transformers")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", RANGES)
def test_a_role_changes_its_part_alone(name, part):
    make, layer, expected = RANGES[name]
    torch.manual_seed(0)
    model = make().eval()
    before = fused_output(model, layer)
    lp.inject(model, lp.LoRA(rank=2, targets=[f"attention.{part}"]))
    for *_, adapter in lp.adapters(model):
        nn.init.normal_(adapter.b)
    changed = (before != fused_output(model, layer)).flatten(0, -2).any(0)
    assert ranges_of(changed) == expected[part]


@needs("transformers", "peft")
@pytest.mark.parametrize("name", ["codegen", "gpt_neox", "falcon, groups"])
def test_peft_computes_the_same_from_an_export_of_rows_that_repeat(name, tmp_path):
    from peft import PeftModel

    torch.manual_seed(0)
    base = RANGES[name][0]().eval()
    model = lp.inject(copy.deepcopy(base), lp.LoRA(rank=2))
    for *_, adapter in lp.adapters(model):
        nn.init.normal_(adapter.b)
    lp.export_peft(model, tmp_path / "peft")
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        ours, plain = model(ids).logits, base(ids).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "peft").eval()(ids).logits
    assert (ours - plain).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@needs("transformers")
@pytest.mark.parametrize("name", ["codegen", "gpt_bigcode, all heads", "gpt_neox", "falcon, groups"])
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
