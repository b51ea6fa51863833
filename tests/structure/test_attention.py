"""Attention calls of every kind, and what is done to them."""

import copy
import importlib.util
import itertools

import pytest
import torch
import torch.nn.functional as F
from models import BEFORE_5, MODELS, logits
from sampling import diagonal
from torch import nn

import lightning_peft as lp
from lightning_peft.structure.attention.calls import AttentionCalls
from lightning_peft.structure.roles import ROLES


def unchanged(attend, query, key, value, **settings):
    assert query.dim() == key.dim() == value.dim() == 4
    return attend(query, key, value, **settings)


def both(attention, inputs, **settings):
    """Output, weights and gradients of torch's own call, and of the intercepted one."""
    results = []
    for change in (None, unchanged):
        torch.manual_seed(3)
        calls = AttentionCalls(change)
        if change is None:
            y, weights = attention(*inputs, **settings)
        else:
            with calls:
                y, weights = attention(*inputs, **settings)
            assert calls.seen
        leaves = [p for p in attention.parameters() if p.requires_grad] + [x for x in inputs if x.requires_grad]
        gradients = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        results.append((y, weights, gradients))
    return results


MASKS = {
    "no mask": lambda b, h, n, m: {},
    "2-d boolean": lambda b, h, n, m: {"attn_mask": torch.ones(n, m, dtype=torch.bool).triu(1)},
    "2-d float": lambda b, h, n, m: {"attn_mask": torch.randn(n, m)},
    "3-d boolean": lambda b, h, n, m: {"attn_mask": (torch.rand(b * h, n, m) < 0.3).index_fill(2, torch.tensor(0), 0)},
    "3-d float": lambda b, h, n, m: {"attn_mask": torch.randn(b * h, n, m)},
    "padding": lambda b, h, n, m: {"key_padding_mask": torch.arange(m) >= torch.tensor([[m - 2]] + [[m]] * (b - 1))},
    "float padding": lambda b, h, n, m: {"key_padding_mask": torch.randn(b, m)},
    "padding and mask": lambda b, h, n, m: {
        "key_padding_mask": torch.arange(m) >= torch.tensor([[m - 2]] + [[m]] * (b - 1)),
        "attn_mask": torch.ones(n, m, dtype=torch.bool).triu(1),
    },
    "causal": lambda b, h, n, m: {"attn_mask": torch.ones(n, m, dtype=torch.bool).triu(1), "is_causal": True},
    "causal and padding": lambda b, h, n, m: {
        "attn_mask": torch.ones(n, m, dtype=torch.bool).triu(1),
        "is_causal": True,
        "key_padding_mask": torch.arange(m) >= torch.tensor([[m - 2]] + [[m]] * (b - 1)),
    },
}  # fmt: skip
KINDS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True},
    "separate": {"kdim": 6, "vdim": 10},
    "separate without bias": {"kdim": 6, "vdim": 10, "bias": False},
}


@diagonal(("kind", "mask", "weights"), KINDS, MASKS, [False, True])
def test_torchs_attention_is_the_same_when_nothing_is_changed(kind, mask, weights):
    attention = nn.MultiheadAttention(8, 2, **KINDS[kind])
    for cross, unbatched, average in itertools.product((False, True), (False, True), (False, True)):
        if (kind.startswith("separate") and not cross) or (average and not weights):
            continue
        batch, tokens, keys = 1 if unbatched else 3, 5, 7 if cross and "causal" not in mask else 5
        order = (
            (lambda x: x[0]) if unbatched else (lambda x: x) if attention.batch_first else (lambda x: x.transpose(0, 1))
        )
        widths = zip((tokens, keys, keys), (8, attention.kdim, attention.vdim), strict=True)
        inputs = [order(torch.randn(batch, n, width, requires_grad=True)) for n, width in widths]
        inputs = inputs if cross else [inputs[0]] * 3
        settings = MASKS[mask](batch, 2, tokens, keys)
        if unbatched and "key_padding_mask" in settings:
            settings["key_padding_mask"] = settings["key_padding_mask"][0]
        own, found = both(attention, inputs, need_weights=weights, average_attn_weights=average, **settings)
        torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)


def test_torchs_attention_drops_out_in_training_alone():
    attention, x = nn.MultiheadAttention(8, 2, dropout=0.5), torch.randn(40, 3, 8)
    own, found = both(attention, [x, x, x], need_weights=False)
    torch.testing.assert_close(found, own)
    y, weights = attention(x, x, x)
    assert (found[0] - attention.eval()(x, x, x)[0]).abs().max() > 1e-2
    own, found = both(attention, [x, x, x])
    torch.testing.assert_close(found, own)


def test_what_torchs_attention_cannot_be_asked_for_is_refused():
    x, weight = torch.randn(3, 2, 4), torch.randn(4, 4)
    arguments = [x, x, x, 4, 2, torch.randn(12, 4), None, None, None, False, 0.0, weight, None]
    calls = AttentionCalls(unchanged)
    with calls:
        with pytest.raises(TypeError, match="static_k and static_v"):
            F.multi_head_attention_forward(*arguments, static_k=torch.randn(4, 3, 2))
        with pytest.raises(ValueError, match="give the mask too"):
            F.multi_head_attention_forward(*arguments, is_causal=True)


def filled(model, methods):
    lp.inject(model, methods)
    torch.manual_seed(5)
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def attended(q, k, v, adapter, prompts, mask=None, scale=None):
    """The paper's formula over heads: q (batch, n, width), keys and values likewise; prompts are keys and values."""
    heads = len(adapter.gate)
    q, k, v, *prompts = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (q, k, v, *prompts))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    own = q @ k.mT * scale + (0 if mask is None else mask)
    added = torch.tanh(adapter.gate).view(heads, 1, 1) * (q @ prompts[0].mT * scale).softmax(-1)
    return (own.softmax(-1) @ v + added @ prompts[1]).transpose(1, 2).flatten(2)


def by_hand(attention, adapter, x, memory, mask=None, updates=(0, 0, 0)):
    """nn.MultiheadAttention on (batch, n, features) with the prompts of LLaMA-Adapter."""
    if attention.in_proj_weight is None:
        weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    else:
        weights = [w + u for w, u in zip(attention._parameters["in_proj_weight"].chunk(3), updates, strict=True)]
    b = torch.zeros(3 * attention.embed_dim).double() if attention.in_proj_bias is None else attention.in_proj_bias
    project = [lambda t, w=w, b=b: t @ w.T + b for w, b in zip(weights, b.chunk(3), strict=True)]
    q, k, v = (f(t) for f, t in zip(project, (x, memory, memory), strict=True))
    y = attended(q, k, v, adapter, [f(adapter.prompt) for f in project[1:]], mask)
    return F.linear(y, attention.out_proj.weight, attention.out_proj.bias)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["plain", "batch first", "without bias", "separate"])
def test_llama_adapter_on_torchs_attention(kind, training):
    """Called as most people do, with weights that nobody needs."""
    settings = KINDS[kind] | ({"kdim": 6, "vdim": 6} if kind == "separate" else {})
    attention = nn.MultiheadAttention(8, 2, **settings).double()
    model = filled(nn.ModuleDict({"attention": attention}), lp.LLaMAAdapter(length=3, layers=1)).train(training)
    adapter = attention.peft["llama_adapter"]
    order = (lambda t: t) if attention.batch_first else (lambda t: t.transpose(0, 1))
    x, memory = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 7, attention.kdim, dtype=torch.float64)
    memory = memory if kind == "separate" else x
    arguments = [order(x), order(memory), order(memory)] if kind == "separate" else [order(x)] * 3
    y, weights = attention(*arguments)
    torch.testing.assert_close(order(y), by_hand(attention, adapter, x, memory))
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5).double())
    with torch.no_grad():
        assert torch.equal(attention(*arguments, need_weights=False)[0], y)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_llama_adapter_and_lora_share_torchs_attention():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    methods = [lp.LLaMAAdapter(length=3, layers=1), lp.LoRA(rank=2, alpha=2, targets=["attention.key"])]
    model = filled(nn.ModuleDict({"attention": attention}), methods)
    prompt, lora = attention.peft["llama_adapter"], attention.peft["lora_key"]
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    expected = by_hand(attention, prompt, x, x, updates=(0, lora.b @ lora.a, 0))
    torch.testing.assert_close(attention(x, x, x)[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()["attention"](x, x, x)[0], expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "batch second"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["norm first", "norm last"])
def test_llama_adapter_on_torchs_encoder_layer(norm_first, batch_first, training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first, norm_first=norm_first).double()
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first)
    base = copy.deepcopy(encoder)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    lp.inject(encoder, lp.LLaMAAdapter(length=3, layers=2))
    encoder.train(training)
    start = encoder(order(x), src_key_padding_mask=padding)
    torch.testing.assert_close(order(start)[~padding], order(base(order(x), src_key_padding_mask=padding))[~padding])
    lp.detach(encoder)
    filled(encoder, lp.LLaMAAdapter(length=3, layers=2)).train(training)
    with torch.set_grad_enabled(training):
        y = order(encoder(order(x), src_key_padding_mask=padding))

    mask, expected = torch.zeros(3, 1, 1, 5).double().masked_fill(padding[:, None, None], float("-inf")), x
    for part in encoder.layers:
        attend = lambda t, a=part.self_attn: by_hand(a, a.peft["llama_adapter"], t, t, mask)  # noqa: E731
        feed = lambda t, p=part: p.linear2(F.relu(p.linear1(t)))  # noqa: E731
        if norm_first:
            expected = expected + attend(part.norm1(expected))
            expected = expected + feed(part.norm2(expected))
        else:
            expected = part.norm1(expected + attend(expected))
            expected = part.norm2(expected + feed(expected))
    torch.testing.assert_close(y[~padding], expected[~padding])


def test_llama_adapter_on_torchs_decoder_layer():
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True), 2).double()
    filled(decoder, lp.LLaMAAdapter(length=3, layers=4))
    x, memory = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 7, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    expected = x
    for part in decoder.layers:
        hands = [lambda t, m, mask=None, a=a: by_hand(a, a.peft["llama_adapter"], t, m, mask)
                 for a in (part.self_attn, part.multihead_attn)]  # fmt: skip
        expected = part.norm1(expected + hands[0](expected, expected, mask))
        expected = part.norm2(expected + hands[1](expected, memory))
        expected = part.norm3(expected + part.linear2(F.relu(part.linear1(expected))))
    for training in (True, False):
        y = decoder.train(training)(x, memory, tgt_mask=mask, tgt_is_causal=True)
        torch.testing.assert_close(y, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "method", [lp.LLaMAAdapter(length=3, layers=1), lp.LoRA(rank=2, targets=["linear1"]), lp.KronABlock(factor=4)]
)
def test_torchs_encoder_trains_in_eval_mode_with_padding(method):
    """Where it is frozen in eval mode; it would pack rows, of which its attention gives no gradient back."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 3).eval()
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():
        base = encoder(x, src_key_padding_mask=padding)
    filled(encoder, method)
    results = []
    for training in (True, False):
        y = encoder.train(training)(x, src_key_padding_mask=padding)[~padding]
        gradients = torch.autograd.grad(y.square().sum(), [p for p in encoder.parameters() if p.requires_grad])
        results.append((y, gradients))
    torch.testing.assert_close(results[1], results[0])
    assert (y - base[~padding]).abs().max() > 1e-3
    twin = copy.deepcopy(encoder)
    for model in (encoder, twin):
        with torch.no_grad():
            assert torch.equal(lp.detach(model)(x, src_key_padding_mask=padding), base)
        assert model.use_nested_tensor
        assert not model._forward_pre_hooks


def test_an_encoder_that_packs_nothing_is_left_as_it_is():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2, enable_nested_tensor=False)
    lp.detach(lp.inject(encoder, lp.LLaMAAdapter(layers=1)))
    assert not encoder.use_nested_tensor


def positions(name, count):
    """Argument that T5's attention needs before transformers 5."""
    return {"cache_position": torch.arange(count)} if name == "t5" and BEFORE_5 else {}


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_llama_adapter_on_cross_attention(name):
    model = filled(MODELS[name](), lp.LLaMAAdapter(length=3, layers=2)).double()
    host = next(
        m for n, m in model.named_modules() if n.endswith(("block.2.layer.1.EncDecAttention", "2.encoder_attn"))
    )
    adapter = host.peft["llama_adapter"]
    x, memory = torch.randn(2, 4, 32, dtype=torch.float64), torch.randn(2, 6, 32, dtype=torch.float64)
    q, k, v, o = (
        (host.q, host.k, host.v, host.o) if name == "t5" else (host.q_proj, host.k_proj, host.v_proj, host.out_proj)
    )  # noqa: E501
    prompts, scale = [k(adapter.prompt), v(adapter.prompt)], 1.0 if name == "t5" else None
    expected = o(attended(q(x), k(memory), v(memory), adapter, prompts, scale=scale))
    torch.testing.assert_close(host(x, key_value_states=memory, **positions(name, 4))[0], expected)


def test_llama_adapter_on_t5s_biased_attention():
    model = filled(MODELS["t5"](), lp.LLaMAAdapter(length=3, layers=9)).double()
    host, x = model.encoder.block[0].layer[0].SelfAttention, torch.randn(2, 4, 32, dtype=torch.float64)
    adapter, bias = host.peft["llama_adapter"], host.compute_bias(4, 4)
    prompts = [host.k(adapter.prompt), host.v(adapter.prompt)]
    expected = host.o(attended(host.q(x), host.k(x), host.v(x), adapter, prompts, bias, 1.0))
    torch.testing.assert_close(host(x, **positions("t5", 4))[0], expected)


@pytest.mark.parametrize("name", ["gpt2", "encoder"])
def test_prompts_of_two_adapters_add_up(name):
    one, two = lp.LLaMAAdapter(length=3, layers=1), lp.LLaMAAdapter(name="second", length=2, layers=1)
    model, (x,) = filled(MODELS[name](), [one, two]).double(), torch.randn(1, 2, 5, 32, dtype=torch.float64)
    host = next(host for _, host, _, _ in lp.adapters(model))
    call = (lambda m: m(x, x, x)[0]) if name == "encoder" else (lambda m: m(x)[0])
    found, gates = call(host), [adapter.gate.detach().clone() for adapter in host.peft.values()]
    results = []
    for keep in ((0, 0), (1, 0), (0, 1)):
        with torch.no_grad():
            for gate, adapter, factor in zip(gates, host.peft.values(), keep, strict=True):
                adapter.gate.copy_(gate * factor)
            results.append(call(host))
    torch.testing.assert_close(found, results[1] + results[2] - results[0])


COUNTS = {"bert": 3, "llama": 3, "gpt2": 3, "distilbert": 3, "vit": 3, "fused_vit": 3, "encoder": 3, "t5": 9, "bart": 9}


@pytest.mark.parametrize("name", COUNTS)
def test_every_attention_of_a_family_is_found(name):
    assert len(ROLES["attention"](MODELS[name]())) == COUNTS[name]


def deberta():
    from transformers import DebertaV2Config, DebertaV2Model

    return DebertaV2Model(DebertaV2Config(vocab_size=8, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))


def longformer():
    from transformers import LongformerConfig, LongformerModel

    sizes = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LongformerModel(LongformerConfig(**sizes, attention_window=[4]))


def xlnet():
    from transformers import XLNetConfig, XLNetModel

    return XLNetModel(XLNetConfig(vocab_size=8, d_model=8, n_head=2, n_layer=1, d_inner=8))


def mamba():
    from transformers import MambaConfig, MambaModel

    return MambaModel(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2))


def delta_net():
    from transformers import Qwen3NextConfig, Qwen3NextModel

    sizes = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    linear = {"linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 4}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4}
    config = Qwen3NextConfig(
        **sizes, **linear, **experts, linear_value_head_dim=4, num_hidden_layers=1, layer_types=["linear_attention"]
    )
    return Qwen3NextModel(config)


def unequal():
    return nn.ModuleList([nn.MultiheadAttention(8, 2, kdim=6, vdim=10)])


REFUSED = {
    "DeBERTa": (deberta, ["attention"], "DisentangledSelfAttention.*disentangled attention.*another method"),
    "Longformer": (longformer, ["attention"], "LongformerSelfAttention.* in chunks of neighbouring keys.*another"),
    "XLNet": (xlnet, ["attention"], "XLNetRelativeAttention.*relative positions.*another method"),
    "Mamba": (mamba, ["attention"], "MambaMixer.* is a recurrence.*another method"),
    "gated delta net": (delta_net, ["linear_attn"], "GatedDeltaNet.* is a recurrence.*another method"),
    "widths": (unequal, ["attention"], "keys of 6 features and values of 10"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_attention_that_cannot_be_changed_is_refused_before_anything_is(case):
    make, targets, message = REFUSED[case]
    model = make()
    before = list(model.state_dict())
    prefix = lp.PTuningV2(length=2, targets=targets)
    for method in (lp.LLaMAAdapter(layers=1, targets=targets), *([] if case == "widths" else [prefix])):
        with pytest.raises(TypeError, match=message) as raised:
            lp.inject(model, method)
        assert case == "widths" or ";" not in str(raised.value)  # one class is named
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("method", [lp.LLaMAAdapter(length=2), lp.PTuningV2(length=2)], ids=["llama", "prefix"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "bart", "distilbert", "vit"])
def test_attention_may_be_switched_after_injection(name, method):
    model, inputs = filled(MODELS[name](), method).double().eval(), MODELS[name].inputs()
    if name == "vit":
        inputs = {key: x.double() for key, x in inputs.items()}
    base = logits(MODELS[name]().double()(**inputs))
    expected = logits(model(**inputs))
    assert (expected - base).abs().max() > 1e-2
    model.set_attn_implementation("eager")  # its softmax is in float32 in some models
    torch.testing.assert_close(logits(model(**inputs)), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", [lp.LLaMAAdapter(length=2), lp.PTuningV2(length=2)], ids=["llama", "prefix"])
def test_timms_attention_is_the_same_with_and_without_its_fused_kernel(method):
    model, inputs = filled(MODELS["fused_vit"](), method).eval(), MODELS["fused_vit"].inputs()
    expected = logits(model(**inputs))
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(logits(model(**inputs)), expected)
    assert (logits(MODELS["fused_vit"]()(**inputs)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "encoder", "t5"])
def test_prompts_under_autocast(name):
    model, inputs = filled(MODELS[name](), lp.LLaMAAdapter(length=3, layers=2)).train(), MODELS[name].inputs()
    y = logits(model(**inputs))
    with torch.autocast("cpu", torch.bfloat16):
        z = logits(model(**inputs))
    torch.testing.assert_close(z.float(), y, atol=0.1 * y.abs().max().item(), rtol=0)
    z.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_only_the_weights_of_the_prompts_are_kept_for_backward():
    """Each query has as many of them as there are prompts; a second output of the attention would be as wide as it."""
    sizes = []
    for method in (None, lp.LLaMAAdapter(length=3, layers=3)):
        model, kept, x = MODELS["llama"]().train().requires_grad_(False), {}, torch.randn(2, 40, 32, requires_grad=True)
        filled(model, method) if method else None

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = model(inputs_embeds=x).logits
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes.append([s.nbytes() for pointer, s in kept.items() if pointer not in own])
        y.sum().backward()
    wide = 2 * 40 * 32 * 4
    assert [sum(n >= wide for n in of) for of in sizes][0] == [sum(n >= wide for n in of) for of in sizes][1]
    assert sum(sizes[1]) - sum(sizes[0]) < 3 * (2 * 40 * 4 * 3 * 4 + 4 * 3 * 32 * 4)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("heads", [4, 2], ids=["", "grouped"])
def test_llama_adapter_equals_peft(heads):
    """Peft's gate is one number without tanh."""
    import peft

    def make():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=heads, initializer_range=0.1, max_position_embeddings=48,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()

    import transformers

    model = filled(make(), lp.LLaMAAdapter(length=3, layers=2))
    config = peft.AdaptionPromptConfig(
        adapter_len=3, adapter_layers=2, target_modules="self_attn", task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(make(), config).eval()
    modules = [m for m in theirs.modules() if hasattr(m, "adaption_prompt")]
    assert len(modules) == 2
    x = MODELS["llama"].inputs()["input_ids"]
    with torch.no_grad():
        for gate, module, (*_, adapter) in zip((0.4, -0.7), modules, lp.adapters(model), strict=True):
            module.adaption_gate.fill_(gate)
            module.adaption_prompt.copy_(adapter.prompt)
            adapter.gate.fill_(torch.tensor(gate).atanh())
        y = model(x).logits
        difference = (y - theirs(x).logits).abs().max().item()
        assert (y - make()(x).logits).abs().max() > 1e-2
    print(f"LLaMA-Adapter, {heads} key heads: max difference {difference:.1e}")
    assert difference <= 2e-6


def test_keys_and_values_of_a_fused_layer_without_queries_are_its_halves():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=48, add_cross_attention=True, eos_token_id=2
    )
    model = lp.inject(GPT2LMHeadModel(config).eval(), [lp.LLaMAAdapter(length=3), lp.PrefixTuning(length=3)])
    host = model.transformer.h[1].crossattention
    key, value = host.peft["llama_adapter"].project(host, x := torch.randn(5, 32))
    torch.testing.assert_close((key, value), host.c_attn(x).chunk(2, -1))
    assert host.peft["prefix_tuning"].widths == (32, 32)
    model(torch.arange(10).view(2, 5), encoder_hidden_states=torch.randn(2, 4, 32)).logits.sum().backward()
    assert all(p.grad.abs().sum() > 0 for *_, a in lp.adapters(model) for n, p in a.named_parameters() if n != "prompt")
