"""Prefixes are keys and values in front of those of an attention call, at each of its sites."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, WIDTH, cache_argument, cache_of, logits, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_peft as lp

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
PLAIN = {"reparameterize": False, "length": 3}
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


def t5(layers=4, **settings):
    """Heads times size is not the model's width."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=WIDTH, d_kv=6, d_ff=48, num_layers=layers, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, initializer_factor=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return T5ForConditionalGeneration(config, **settings).eval()


def prefixes(model):
    """Adapters by host name, without what they share."""
    return {name: adapter for name, _, key, adapter in lp.adapters(model) if key in ("prefix_tuning", "p_tuning_v2")}


def fill(model, std=0.5):
    torch.manual_seed(5)
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=std)
    return model


def pairs(model, heads):
    """(P_k, P_v) of each prefix as a cache holds them for two rows: (2, heads, length, size)."""
    return [
        tuple(x.detach().unflatten(1, (heads, -1)).transpose(0, 1).expand(2, -1, -1, -1) for x in a.key_value())
        for a in prefixes(model).values()
    ]


def filled_cache(found):
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (key, value) in enumerate(found):
        cache.update(key.clone(), value.clone(), layer)
    return cache


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prefix_equals_keys_and_values_in_a_cache(name, padded, shift):
    """One pass, and decoding token by token on top of it."""
    model = fill(lp.inject(MODELS[name](), lp.PrefixTuning(**PLAIN, shift_positions=shift))).double()
    base, x = MODELS[name]().double(), tokens()
    mask = LEFT if padded else torch.ones_like(x)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = filled_cache(pairs(model, 2 if name == "llama" else 4))
    long = torch.cat([torch.ones(2, 3, dtype=torch.long), mask], 1)
    with torch.no_grad():
        expected = base(
            x, attention_mask=long, position_ids=positions + 3 * shift, **{cache_argument(base): cache}
        ).logits
        found = model(x, attention_mask=mask, position_ids=positions).logits
        first = model(x[:, :4], attention_mask=mask[:, :4], position_ids=positions[:, :4], use_cache=True)
        steps, past = [first.logits], cache_of(first)
        for end in range(5, 8):
            call = {"attention_mask": mask[:, :end], "position_ids": positions[:, end - 1 : end]}
            steps.append(model(x[:, end - 1 : end], use_cache=True, **call, **{cache_argument(model): past}).logits)
    kept = mask.bool()
    differences = [(y[kept] - expected[kept]).abs().max().item() for y in (found, torch.cat(steps, 1))]
    print(f"{name}: max difference {differences}")
    assert max(differences) < 1e-12


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_that_are_not_given_move_on_too(name):
    model = fill(lp.inject(MODELS[name](), lp.PrefixTuning(**PLAIN, shift_positions=True)))
    x, base = tokens(), MODELS[name]()
    with torch.no_grad():
        cache = filled_cache(pairs(model, 2 if name == "llama" else 4))
        expected = base(x, **{cache_argument(base): cache}).logits
        torch.testing.assert_close(model(x).logits, expected)
        first = model(x[:, :5], use_cache=True)
        last = model(x[:, 5:], **{cache_argument(model): cache_of(first)}).logits
        torch.testing.assert_close(last, expected[:, 5:])
        embedded = model(inputs_embeds=base.get_input_embeddings()(x)).logits
        torch.testing.assert_close(embedded, expected)


@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_agrees_with_and_without_cache_beams_and_padding(name, shift):
    model = fill(lp.inject(MODELS[name](), lp.PrefixTuning(length=9, hidden_size=8, shift_positions=shift)))
    x, settings = tokens(), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for beams in (1, 3):
        cached = model.generate(x, attention_mask=LEFT, num_beams=beams, **settings)
        assert torch.equal(model.generate(x, attention_mask=LEFT, num_beams=beams, use_cache=False, **settings), cached)
        alone = model.generate(x[:1, 2:], attention_mask=LEFT[:1, 2:], num_beams=beams, **settings)
        assert torch.equal(cached[0, 7:], alone[0, 5:])
    bare = MODELS[name]().generate(x, attention_mask=LEFT, num_beams=beams, **settings)
    assert not torch.equal(bare, cached)


def test_a_backbone_with_a_rule_for_positions_must_be_given_them():
    """OPT counts the tokens of its mask; generation gives positions by itself."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=64, hidden_size=WIDTH, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
        max_position_embeddings=48, word_embed_proj_dim=WIDTH, init_std=0.1,
    )  # fmt: skip
    base = OPTForCausalLM(config).eval()
    model = fill(lp.inject(copy.deepcopy(base), lp.PrefixTuning(**PLAIN, shift_positions=True)))
    with pytest.raises(ValueError, match="OPTDecoder computes positions by a rule of its own; give it position_ids"):
        model(tokens())
    positions, long = (LEFT.cumsum(1) - 1).clamp(min=0), torch.cat([torch.ones(2, 3, dtype=torch.long), LEFT], 1)
    with torch.no_grad():
        cache = filled_cache(pairs(model, 4))
        expected = base(
            tokens(), attention_mask=long, position_ids=positions + 3, **{cache_argument(base): cache}
        ).logits
        found = model(tokens(), attention_mask=LEFT, position_ids=positions).logits
    torch.testing.assert_close(found[LEFT.bool()], expected[LEFT.bool()])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": LEFT}
    assert torch.equal(model.generate(tokens(), **settings), model.generate(tokens(), use_cache=False, **settings))


def test_the_decoders_own_prefix_equals_one_in_an_encoder_decoder_cache():
    """In a cache the relative bias counts the prefix as tokens; without that bias both are the same."""
    from transformers import DynamicCache, EncoderDecoderCache

    model, base = t5(2), t5(2)
    for one in (model, base):
        nn.init.zeros_(one.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    fill(lp.inject(model, lp.PrefixTuning(**PLAIN, targets=["decoder.*.SelfAttention"])))
    assert [name.split(".")[0] for name in prefixes(model)] == ["decoder", "decoder"]
    cache = EncoderDecoderCache(filled_cache(pairs(model, 4)), DynamicCache())
    x = tokens()
    with torch.no_grad():
        expected = base(x, decoder_input_ids=x, **{cache_argument(base): cache}).logits
        found = model(x, decoder_input_ids=x).logits
    print(f"t5: max difference {(found - expected).abs().max().item():.1e}")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def attention(query, key, value, prefix, mask=None, scale=None):
    """softmax(q [P_k; k]^T) [P_v; v], with heads in front and a mask that adds for k alone."""
    key, value = (torch.cat([p, x], -2) for p, x in zip(prefix, (key, value), strict=True))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + F.pad(mask, (3, 0))
    return scores.softmax(-1) @ value


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(-3, -2)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_formula_on_bert(mode):
    model = fill(lp.inject(MODELS["bert"](), lp.PTuningV2(length=3, dropout=0.0))).double().train(mode == "train")
    host = model.bert.encoder.layer[1].attention.self
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    hidden = torch.tensor([[0, 0, 0, 1, 1], [0] * 5]).bool()[:, None, None]  # True where nobody looks
    q, k, v = (heads(f(x), 4) for f in (host.query, host.key, host.value))
    prefix = [heads(p, 4).expand(2, -1, -1, -1) for p in host.peft["p_tuning_v2"].key_value()]
    additive = torch.zeros(2, 1, 1, 5, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    expected = attention(q, k, v, prefix, additive).transpose(1, 2).flatten(2)
    for mask in (additive, ~hidden, ~hidden.expand(2, 1, 5, 5), additive.expand(2, 4, 5, 5)):
        torch.testing.assert_close(host(x, attention_mask=mask)[0], expected)


@pytest.mark.parametrize("site", ["decoder.block.1.layer.0.SelfAttention", "decoder.block.1.layer.1.EncDecAttention"])
def test_the_formula_on_t5(site):
    """No scaling, a bias that comes as a mask, heads times size unlike the width."""
    model = fill(lp.inject(t5(2), lp.PrefixTuning(**PLAIN))).double()
    host = model.get_submodule(site)
    x, states = (torch.randn(2, n, WIDTH, dtype=torch.float64) for n in (5, 7))
    states = states if "EncDec" in site else x
    bias = torch.randn(1, 4, 5, states.shape[1], dtype=torch.float64)
    q, k, v = heads(host.q(x), 4), heads(host.k(states), 4), heads(host.v(states), 4)
    prefix = [heads(p, 4).expand(2, -1, -1, -1) for p in host.peft["prefix_tuning"].key_value()]
    expected = host.o(attention(q, k, v, prefix, bias, scale=1.0).transpose(1, 2).flatten(2))
    mask = torch.zeros(2, 1, 5, states.shape[1], dtype=torch.float64)
    other = {"key_value_states": states} if "EncDec" in site else {}
    torch.testing.assert_close(host(x, mask=mask, position_bias=bias, **other)[0], expected)


def test_the_formula_of_the_perceptron():
    """As the authors wrote it: one embedding, one linear layer, tanh, and one wide linear layer for all modules."""
    model = lp.inject(MODELS["gpt2"](), lp.PrefixTuning(length=5, hidden_size=7)).double()
    shared = model.transformer.peft["prefix_tuning_encoder"].encoder
    own = list(prefixes(model).values())
    wide = nn.Linear(7, 3 * 2 * WIDTH).double()
    with torch.no_grad():
        wide.weight.copy_(torch.cat([a.projection.weight for a in own]))
        wide.bias.copy_(torch.cat([a.projection.bias for a in own]))
    trans = nn.Sequential(nn.Linear(WIDTH, 7).double(), nn.Tanh(), wide)
    trans[0].load_state_dict(shared.linear.state_dict())
    past = trans(nn.Embedding.from_pretrained(shared.embedding)(torch.arange(5)))
    found = torch.cat([x for a in own for x in a.key_value()], 1)
    torch.testing.assert_close(found, past)
    assert {tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad} == {
        (5, WIDTH), (7, WIDTH), (7,), (2 * WIDTH, 7), (2 * WIDTH,),
    }  # fmt: skip
    assert all(a.projection.weight.abs().max() <= 7**-0.5 for a in own)


@needs_peft
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # peft passes it
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prefix_tuning_equals_peft(name, projection):
    import peft

    method = lp.PrefixTuning(length=3, hidden_size=7, reparameterize=projection, shift_positions=True)
    model = fill(lp.inject(MODELS[name](), method))
    count = 2 if name == "llama" else 4
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=projection, encoder_hidden_size=7
    )
    theirs = peft.get_peft_model(MODELS[name](), config).eval()
    encoder = theirs.prompt_encoder["default"]
    own = list(prefixes(model).values())
    with torch.no_grad():
        if projection:
            (shared,) = (a.encoder for _, _, key, a in lp.adapters(model) if key == "prefix_tuning_encoder")
            first, _, second = encoder.transform
            if count == 2:  # its perceptron is as narrow as the keys
                encoder.embedding, first = nn.Embedding(3, WIDTH), nn.Linear(WIDTH, 7)
                encoder.transform[0] = first
            encoder.embedding.weight.copy_(shared.embedding)
            first.load_state_dict(shared.linear.state_dict())
            second.weight.copy_(torch.cat([a.projection.weight for a in own]))
            second.bias.copy_(torch.cat([a.projection.bias for a in own]))
        else:
            encoder.embedding.weight.copy_(torch.cat([x for a in own for x in a.key_value()], 1))
        x = tokens()
        differences = [(model(x).logits - theirs(x).logits).abs().max().item()]
        left = {"attention_mask": LEFT, "position_ids": (LEFT.cumsum(1) - 1).clamp(min=0)}
        kept = LEFT.bool()
        shifted = {**left, "position_ids": left["position_ids"] + 3}  # peft drops what is given with a warning
        mask = torch.cat([torch.ones(2, 3, dtype=torch.long), LEFT], 1)
        past = filled_cache(pairs(model, count))
        reference = theirs.base_model(x, **{**shifted, "attention_mask": mask, cache_argument(model): past}).logits
        differences.append((model(x, **left).logits - reference)[kept].abs().max().item())
    print(f"{name}, projection={projection}: max differences {differences}")
    assert max(differences) <= 2e-6


def train_once(model, call, **settings):
    model.zero_grad()
    logits(model(**call, **settings)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [{}, {"reparameterize": False}], ids=["perceptron", "plain"])
def test_every_prefix_of_an_encoder_decoder_model_gets_a_gradient(settings):
    model = lp.inject(t5(4), lp.PrefixTuning(length=4, hidden_size=8, **settings)).train()
    sites = [name.split(".")[0] + name.rpartition(".")[2] for name in prefixes(model)]
    assert {site: sites.count(site) for site in sites} == dict.fromkeys(
        ["encoderSelfAttention", "decoderSelfAttention", "decoderEncDecAttention"], 4
    )
    gradients = train_once(model, {"input_ids": tokens(), "decoder_input_ids": tokens()})
    assert len(gradients) == (2 * 12 + 3 if "reparameterize" not in settings else 24)
    zero = [name for name, g in gradients.items() if g is None or not g.abs().amax(-1).gt(0).all()]
    assert not zero


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("base", ["llama", "t5"])
def test_gradient_checkpointing_gives_the_same_gradients(base, reentrant, dropout):
    results = []
    call = {"input_ids": tokens(), **({"decoder_input_ids": tokens()} if base == "t5" else {})}
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = t5(4) if base == "t5" else MODELS[base]()
        lp.inject(model, lp.PrefixTuning(length=4, hidden_size=8, dropout=dropout)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        torch.manual_seed(2)
        results.append(train_once(model, call, use_cache=False))
    assert all(g.abs().sum() > 0 for g in results[1].values())
    torch.testing.assert_close(results[1], results[0], atol=1e-7, rtol=1e-4)


def test_dropout_acts_in_training_alone_and_anew_in_each_row():
    model = fill(lp.inject(MODELS["llama"](), lp.PrefixTuning(**PLAIN, dropout=0.5)))
    x = tokens(1).expand(2, -1)
    plain = fill(lp.inject(MODELS["llama"](), lp.PrefixTuning(**PLAIN)))
    with torch.no_grad():
        assert torch.equal(model(x).logits, plain(x).logits)
        one, two = model.train()(x).logits
        assert (one - two).abs().max() > 1e-3


class Kernels(TorchDispatchMode):
    """Notes which attention kernels run, and whether they got a mask."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in str(func) and "backward" not in str(func):
            self.seen.append((func.__name__.split(".")[0], (kwargs or {}).get("attn_mask") is not None))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [3, 9])
def test_a_long_causal_call_stays_one_without_a_mask_unless_the_prefix_is_longer_than_the_text(length, monkeypatch):
    monkeypatch.setattr("lightning_peft.ops.joined_attention.MASK_LIMIT", 6 * 6)
    model, x = lp.inject(MODELS["llama"](), lp.PrefixTuning(length=length)), tokens()
    with Kernels() as kernels, torch.no_grad():
        model(x)
    assert kernels.seen == [("_scaled_dot_product_flash_attention_for_cpu", length == 9)] * 3


@pytest.mark.parametrize("queries", [4, 9])
def test_a_causal_call_is_the_formula_with_more_keys_than_queries_and_grouped_heads(queries):
    from lightning_peft.ops.joined_attention import attend_joined

    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in ((4, queries), (2, 11), (2, 11)))
    pk, pv = (torch.randn(2, 2, 5, 8, dtype=torch.float64) for _ in range(2))
    joined = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
    y = attend_joined(F.scaled_dot_product_attention, 5, q, *joined, is_causal=True, enable_gqa=True)
    mask = torch.zeros(queries, 11, dtype=torch.float64).masked_fill(
        ~torch.ones(queries, 11, dtype=torch.bool).tril(), float("-inf")
    )
    k, v, pk, pv = (x.repeat_interleave(2, 1) for x in (k, v, pk, pv))
    scores = torch.cat([q @ pk.mT, q @ k.mT + mask], -1) / 8**0.5
    torch.testing.assert_close(y, scores.softmax(-1) @ torch.cat([pv, v], 2))


@pytest.mark.parametrize("base", ["bert", "llama", "gpt2", "plain", "t5"])
def test_a_final_model_computes_the_same_without_a_perceptron(base, tmp_path):
    make = MODELS.get(base, lambda: t5(2))
    call = {"decoder_input_ids": tokens()} if base == "t5" else {}
    model = fill(lp.inject(make(), lp.PrefixTuning(length=4, hidden_size=8)))
    x, kinds = tokens(), {name: type(a) for name, a in prefixes(model).items()}
    with torch.no_grad():
        y = logits(model(x, **call))
        with torch.autocast("cpu", torch.bfloat16):
            narrow = logits(model(x, **call))
        lp.save_adapter(model.train(), tmp_path)
        lp.finalize(model)
        assert torch.equal(logits(model.eval()(x, **call)), y)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(logits(model(x, **call)), narrow)
        fresh = lp.load_adapter(make(), tmp_path)
        assert torch.equal(logits(fresh(x, **call)), y)
    keys = {f"{name}.peft.prefix_tuning.{k}" for name in kinds for k in ("key", "value")}
    for one in (model, fresh):
        assert {n for n, p in one.named_parameters() if p.requires_grad} == keys
    assert torch.equal(logits(copy.deepcopy(model)(x, **call)), y)


@pytest.mark.parametrize("cast", ["autocast", "base"])
@pytest.mark.parametrize("base", ["bert", "llama", "t5"])
def test_16_bits_are_near_32(base, cast):
    model = fill(lp.inject(t5(2) if base == "t5" else MODELS[base](), lp.PrefixTuning(length=4, hidden_size=8)), 0.2)
    call = {"input_ids": tokens(), **({"decoder_input_ids": tokens()} if base == "t5" else {})}
    with torch.no_grad():
        y = logits(model(**call))
        if cast == "base":
            z = logits(model.bfloat16()(**call))
        else:
            with torch.autocast("cpu", torch.bfloat16):
                z = logits(model(**call))
    assert {p.dtype for *_, a in lp.adapters(model) for p in a.parameters()} == {torch.float32}
    assert z.dtype == torch.bfloat16 or base == "t5"
    assert (z.float() - y).norm() < 0.05 * y.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler imports warns
@pytest.mark.parametrize("settings", [{}, {"reparameterize": False, "shift_positions": True}, {"length": 9}], ids=str)
def test_compiles_whole_down_to_kernels(settings):
    torch._dynamo.reset()
    model = fill(lp.inject(MODELS["llama"](), lp.PrefixTuning(**{"length": 4, "hidden_size": 8, **settings})))
    call = {"input_ids": tokens(), "use_cache": False}
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(**call).logits, model(**call).logits, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", "a", "say", "it", "in", "short"])}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)  # noqa: S106
    return str(folder)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_plain_prefix_that_starts_as_words_is_those_words(name, tokenizer):
    settings = {"init": "text", "init_text": "say it in short", "tokenizer": tokenizer, "shift_positions": True}
    base, x = MODELS[name]().train(), tokens()
    model = lp.inject(base, lp.PrefixTuning(reparameterize=False, length=6, **settings))
    assert all(module.training for module in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules() if type(m).__name__ != "AdapterDict")
    words = torch.tensor([2, 3, 4, 5, 2, 3]).expand(2, -1)  # repeated to the length
    with torch.no_grad():
        expected = MODELS[name]()(torch.cat([words, x], 1)).logits[:, 6:]
        torch.testing.assert_close(model.eval()(x).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["bert", "t5"])
def test_a_perceptron_is_fitted_to_words(base, tokenizer, tmp_path):
    make = MODELS.get(base, lambda: t5(2))
    settings = {"init": "text", "init_text": "in short", "tokenizer": tokenizer, "length": 4}
    plain = prefixes(lp.inject(make(), lp.PrefixTuning(reparameterize=False, **settings)))
    torch.manual_seed(1)
    method = lp.PrefixTuning(hidden_size=64, **settings)
    model = lp.inject(make(), method)
    torch.manual_seed(1)
    other = prefixes(lp.inject(make(), lp.PrefixTuning(hidden_size=64, length=4)))
    own, wanted, random = (
        torch.cat([x.detach().flatten() for a in group.values() for x in a.key_value()])
        for group in (prefixes(model), plain, other)
    )
    assert (own - wanted).square().mean() < 0.5 * (random - wanted).square().mean()
    assert all(p.grad is None and p.requires_grad for *_, a in lp.adapters(model) for p in a.parameters())
    torch.manual_seed(1)
    again = lp.inject(make(), method)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    lp.save_adapter(model, tmp_path)
    fresh = lp.load_adapter(make(), tmp_path)  # needs no tokenizer any more
    assert prefixes(fresh).keys() == prefixes(model).keys()
    assert "text" not in (tmp_path / "adapter_config.json").read_text().replace("init_text", "")


def test_words_need_a_model_that_reads_them(tokenizer):
    settings = {"init": "text", "init_text": "in short", "tokenizer": tokenizer, "length": 4}
    with pytest.raises(ValueError, match=r"init must be 'random', since no transformers backbone calls"):
        lp.inject(MODELS["plain"](), lp.PrefixTuning(**settings))
    with torch.device("meta"):
        model = MODELS["llama"].make()
    with pytest.raises(ValueError, match="init must be 'random' while the model is on the meta device"):
        lp.inject(model, lp.PrefixTuning(**settings))


def test_what_cannot_work_is_refused_by_name():
    from transformers import BertConfig, BertModel

    flash = BertModel(BertConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=8, num_attention_heads=2))
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TypeError, match="'flash_attention_2'.*attn_implementation='sdpa'"):
        lp.inject(flash, lp.PrefixTuning())
    with pytest.raises(TypeError, match=r"T5ForConditionalGeneration\) takes no position_ids.*shift_positions=False"):
        lp.inject(t5(1), lp.PrefixTuning(shift_positions=True))
    with pytest.raises(TypeError, match="No transformers backbone"):
        lp.inject(MODELS["plain"](), lp.PrefixTuning(shift_positions=True))
    with pytest.raises(TypeError, match="'prefix_tuning' at .* cannot be merged: no weight gives keys"):
        lp.merge(lp.inject(MODELS["plain"](), lp.PrefixTuning(reparameterize=False)))
    for settings in ({"length": 0}, {"hidden_size": 0}, {"dropout": 1.0}, {"init": "zero"}, {"init_text": "x"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            lp.PrefixTuning(**settings)
    with pytest.raises(ValueError, match="length must be a positive"):
        lp.PTuningV2(length=-1)
