"""Prefixes and LLaMA-Adapter in attention of transformers' interface, and in attention that modules write out."""

import copy
import dataclasses
import inspect
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import BEFORE_5, Attention, Plain, cache_argument, tokens
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import lightning_peft as lp
from lightning_peft.methods.prompting.prefix_init import init_from_text
from lightning_peft.structure.attention.hosts import asks_interface
from lightning_peft.structure.attention.probe import probe_attention
from lightning_peft.structure.attention.thread_changes import thread

needs_interface = pytest.mark.skipif(BEFORE_5, reason="eager attention asks no interface before transformers 5")
LENGTH = 4
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {"attn_logit_softcapping": 2.0, "tie_word_embeddings": False}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FALCON = SIZES | {"bias": False, "alibi": False}
SMALL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
MODELS = {  # type, settings, attention modules, heads in a cache
    "llama": ("llama", GROUPED, "self_attn", 2),
    "gemma2": ("gemma2", GROUPED | WINDOWS | GEMMA, "self_attn", 2),
    "gpt_oss": ("gpt_oss", GROUPED | WINDOWS | EXPERTS, "self_attn", 2),
    "gpt_neox": ("gpt_neox", SIZES, "layers.*.attention", 4),
    "persimmon": ("persimmon", SIZES, "self_attn", 4),
    "falcon, one head of keys": ("falcon", FALCON | {"multi_query": True}, "self_attention", 1),
    "falcon, all heads": ("falcon", FALCON | {"multi_query": False}, "self_attention", 4),
    "falcon, grouped": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, "self_attention", 4),
    "bloom": ("bloom", SMALL | {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "self_attention", 4),
    "mpt": ("mpt", SMALL | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 48}, "attn", 4),
    "gpt_neo": (
        "gpt_neo",
        SMALL | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 48}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 32},
        "attn.attention", 4,
    ),
    "xglm": (
        "xglm",
        SMALL | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 48},
        "self_attn", 4,
    ),
}  # fmt: skip
CASES = [  # name and implementation; None is the model's own
    *(("llama", "eager"), ("llama", "sdpa"), ("gemma2", None), ("gpt_oss", None), ("gpt_neox", "eager")),
    *(("gpt_neox", "sdpa"), ("persimmon", "eager"), ("falcon, one head of keys", "eager")),
    *(("falcon, one head of keys", "sdpa"), ("falcon, all heads", "eager"), ("falcon, grouped", "eager")),
    *(("falcon, grouped", "sdpa"), ("bloom", None), ("mpt", None), ("gpt_neo", None), ("xglm", None)),
]
INTERFACE = {"gemma2", "gpt_oss"}  # where eager attention is out of reach before transformers 5
BY_DISTANCE = {"bloom", "mpt"}  # without positions
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])


def skip_out_of_reach(name):
    if BEFORE_5 and name in INTERFACE:
        pytest.skip("before transformers 5, eager attention with a softcap or sinks is out of reach")


def build(name, implementation=None):
    skip_out_of_reach(name)
    kind, settings, *_ = MODELS[name]
    torch.manual_seed(0)
    extra = {} if implementation is None else {"attn_implementation": implementation}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), **extra).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def filled(model, methods):
    lp.inject(model, methods)
    torch.manual_seed(5)
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    return model


def prefix(**settings):
    return lp.PrefixTuning(**{"length": LENGTH, "reparameterize": False, **settings})


def filled_cache(model, heads, order=slice(None)):
    """Heads of 8 features, each repeated where the model caches more of them."""
    cache, adapters = DynamicCache(), [adapter for *_, adapter in lp.adapters(model)]
    for layer, adapter in enumerate(adapters[order]):
        pair = (x.detach().unflatten(1, (-1, 8)).transpose(0, 1).repeat(2, 1, 1, 1) for x in adapter.key_value())
        cache.update(*(x.repeat_interleave(heads // x.shape[1], 1) for x in pair), layer)
    return cache


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_a_prefix_equals_keys_and_values_in_a_cache(name, implementation):
    """In rows with and without padding; another prefix, or none, gives something else."""
    base = build(name, implementation)
    model, x = filled(copy.deepcopy(base), prefix()), tokens()
    call = lambda: {} if name in BY_DISTANCE else {"position_ids": torch.arange(7).repeat(2, 1)}  # noqa: E731
    long, results = F.pad(LEFT, (LENGTH, 0), value=1), []
    with torch.no_grad():
        for order in (slice(None), slice(None, None, -1)):
            cache = filled_cache(model, MODELS[name][3], order)
            results.append(base(x, attention_mask=long, **{cache_argument(base): cache}, **call()).logits)
        found = model(x, attention_mask=LEFT, use_cache=False, **call()).logits
        bare = base(x, attention_mask=LEFT, use_cache=False, **call()).logits
    difference, control, moved = ((found - y)[LEFT.bool()].abs().max().item() for y in (*results, bare))
    print(f"{name}, {implementation}: max difference {difference:.1e}, to another prefix {control:.2f}, {moved:.2f}")
    assert difference < 1e-5
    assert min(control, moved) > 0.02


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_greedy_tokens_do_not_depend_on_the_cache(name, implementation):
    """No cache, one that grows, one of a fixed size."""
    model = filled(build(name, implementation), prefix())
    settings = {"attention_mask": LEFT, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens(), use_cache=False, **settings)
    assert torch.equal(model.generate(tokens(), **settings), expected)
    if not BEFORE_5:
        assert torch.equal(model.generate(tokens(), cache_implementation="static", **settings), expected)
    assert (model(tokens()).logits - build(name, implementation)(tokens()).logits).abs().max() > 0.02


def gradients(model, call):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(model(**call).logits.square().mean(), trained)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gpt_neo", "bloom"])
def test_recomputed_activations_give_the_same_gradients(name):
    model, call = filled(build(name), prefix(reparameterize=True, hidden_size=8)), {"input_ids": tokens()}
    expected = gradients(model, call)
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(model, call | {"use_cache": False}), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler imports warns
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gpt_neo", "llama"])
@pytest.mark.parametrize("method", ["prefix", "prompts"])
def test_compiles_whole(name, method):
    torch._dynamo.reset()
    made = prefix() if method == "prefix" else lp.LLaMAAdapter(length=3, layers=2)
    model, call = filled(build(name, "eager"), made), {"input_ids": tokens(), "use_cache": False}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # before any call outside of it
    found = compiled(**call).logits
    torch.testing.assert_close(found, model(**call).logits, atol=1e-5, rtol=1e-5)
    assert (found - build(name, "eager")(**call).logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "llama", "gpt_neo"])
def test_llama_adapter_is_the_papers_attention_beside_that_of_the_model(name):
    """softmax(cap(q K^T)) V, gated, with the scale and softcap of the model and without its sinks."""
    base = build(name, "eager")
    model = filled(copy.deepcopy(base), lp.LLaMAAdapter(length=3, layers=2))
    (path, host, _, adapter) = next(iter(lp.adapters(model)))
    plain, x, mask = base.get_submodule(path), torch.randn(2, 5, 32), torch.full((5, 5), -1e4).triu(1)[None, None]
    call, cos, sin = {"attention_mask": mask}, torch.ones(1), torch.zeros(1)
    if name != "gpt_neo":
        cos, sin = base.model.rotary_emb(x, torch.arange(5)[None])
        call["position_embeddings"] = (cos, sin)
    found, expected = host(x, **call)[0], plain(x, **call)[0]

    split = lambda t: t.unflatten(-1, (-1, 8)).transpose(-3, -2)  # noqa: E731
    q, k, v = split(plain.q_proj(x)), *(split(f(adapter.prompt)) for f in (plain.k_proj, plain.v_proj))
    if name == "gpt_oss":
        one, two = q.chunk(2, -1)
        q = torch.cat([one * cos[:, None] - two * sin[:, None], two * cos[:, None] + one * sin[:, None]], -1)
    elif name != "gpt_neo":
        one, two = q.chunk(2, -1)
        q = q * cos[:, None] + torch.cat([-two, one], -1) * sin[:, None]
    k, v = (t.repeat_interleave(4 // len(t), 0) for t in (k, v))
    scores = q @ k.mT * getattr(plain, "scaling", 1.0)  # GPT-Neo scales nothing
    if name == "gemma2":
        scores = 2.0 * torch.tanh(scores / 2.0)
    added = (adapter.gate.tanh()[:, None, None] * scores.softmax(-1)) @ v
    output = plain.out_proj if name == "gpt_neo" else plain.o_proj
    expected = expected + F.linear(added.transpose(1, 2).flatten(2), output.weight)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert (found - plain(x, **call)[0]).abs().max() > 1e-2


class Watching(TorchFunctionMode):
    """What else a program may use to see operations."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gemma2", "gpt_neo"])
def test_modes_of_others_see_the_operations_of_attention_as_before(name):
    seen = []
    for model in (build(name), filled(build(name), prefix())):
        watching = Watching()
        with watching, torch.no_grad():
            model(tokens())
        seen.append(watching.seen)
    assert seen[0].count("softmax") == 2
    assert seen[1].count("softmax") == (2 if name == "gemma2" else 4)  # of the tokens alone, and of all keys


def test_llama_adapter_reads_and_changes_attention_that_bloom_writes_out():
    """Rows of a fused layer for each head, batched products with a factor, and no distances to prompts."""
    base = build("bloom")
    model = filled(copy.deepcopy(base), lp.LLaMAAdapter(length=3, layers=2))
    (path, host, _, adapter) = next(iter(lp.adapters(model)))
    plain, x = base.get_submodule(path), torch.randn(2, 5, 32)
    slopes = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625]).view(4, 1, 1)
    call = {"residual": torch.zeros(1), "alibi": (slopes * torch.arange(5)).repeat(2, 1, 1)}
    call["attention_mask"] = torch.full((5, 5), -1e4).triu(1)[None, None]
    q, _, _ = plain.query_key_value(x).view(2, 5, 4, 3, 8).transpose(1, 2).unbind(3)
    _, k, v = plain.query_key_value(adapter.prompt).view(3, 4, 3, 8).transpose(0, 1).unbind(2)
    added = adapter.gate.tanh()[:, None, None] * (q @ k.mT / 8**0.5).softmax(-1) @ v
    expected = plain(x, **call)[0] + F.linear(added.transpose(1, 2).flatten(2), plain.dense.weight)
    torch.testing.assert_close(host(x, **call)[0], expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain(x, **call)[0]).abs().max() > 1e-2


@needs_interface
def test_configurations_and_the_functions_of_other_models_stay_as_they_are():
    model, base = build("gemma2"), build("gemma2")
    before = model.config.to_dict()
    filled(model, prefix())(tokens())
    assert model.config.to_dict() == before
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", gradients) is gradients
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is AttentionInterface._global_mapping["sdpa"]
    with torch.no_grad():
        torch.testing.assert_close(lp.detach(model)(tokens()).logits, base(tokens()).logits, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neo"])
def test_another_thread_does_not_see_the_prefix_of_a_call_that_is_under_way(name):
    model, base, found = filled(build(name), prefix()), build(name), []
    expected, changed = base(tokens()).logits, model(tokens()).logits

    def call_in_other_thread(*_):
        thread = threading.Thread(target=lambda: found.append(base(tokens()).logits))
        thread.start()
        thread.join()

    next(m for n, m in model.named_modules() if n.endswith("k_proj")).register_forward_hook(call_in_other_thread)
    assert torch.equal(model(tokens()).logits, changed)
    assert torch.equal(found[0], expected)
    assert (changed - expected).abs().max() > 1e-2


def mine(module, query, key, value, attention_mask, **settings):
    """What a user registers around torch's function: causal without a mask."""
    return AttentionInterface._global_mapping["sdpa"](module, query, key, value, attention_mask, **settings)


def softmax_of_mine(module, query, key, value, attention_mask, scaling, **settings):
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.mT * scaling
    return ((scores + attention_mask).softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def registered():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register("mine", mine)
    AttentionInterface.register("softmax_of_mine", softmax_of_mine)
    ALL_MASK_ATTENTION_FUNCTIONS.register("softmax_of_mine", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    yield
    for name in ("mine", "softmax_of_mine"):
        del AttentionInterface._global_mapping[name]
    del type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping["softmax_of_mine"]


@needs_interface
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("length", [3, 9])
@pytest.mark.parametrize("implementation", ["mine", "softmax_of_mine"])
@pytest.mark.parametrize("method", ["prefix", "prompts"])
def test_functions_that_a_user_registers_are_reached(method, implementation, length, registered):
    made = {"prefix": prefix(length=length), "prompts": lp.LLaMAAdapter(length=length, layers=2)}[method]
    model = filled(build("llama", "sdpa"), made)
    expected = model(tokens()).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-5, rtol=1e-5)


@needs_interface
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler imports warns
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("method", ["prefix", "prompts"])
def test_flex_attention_equals_eager_attention(name, method):
    made = {"prefix": prefix(), "prompts": lp.LLaMAAdapter(length=3, layers=2)}[method]
    model, call = filled(build(name, "eager"), made), {"input_ids": tokens(), "attention_mask": LEFT}
    expected = model(**call).logits[LEFT.bool()]
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():  # torch has no backward of it on a CPU
        torch.testing.assert_close(model(**call).logits[LEFT.bool()], expected, atol=1e-5, rtol=1e-5)


@needs_interface
def test_a_prefix_under_flash_attention_is_noticed_at_run_time():
    model = filled(build("llama"), prefix())

    def flash_attention_forward(module, query, *_, **__):
        return query.transpose(1, 2), None

    AttentionInterface.register("flash_of_mine", flash_attention_forward)
    model.config._attn_implementation = "flash_of_mine"
    with pytest.raises(RuntimeError, match="calls flash_attention_forward.*'sdpa', 'eager' or 'flex_attention'"):
        model(tokens())
    del AttentionInterface._global_mapping["flash_of_mine"]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neo", "bloom"])
def test_two_prefixes_are_one_that_is_as_long_as_both(name):
    """The later method's stand in front; ALiBi of Bloom lets each of them end where the text begins."""
    model = filled(build(name), [prefix(), prefix(name="second", length=3)])
    whole = filled(build(name), prefix(length=LENGTH + 3))
    with torch.no_grad():
        for path, _, key, one in lp.adapters(model):
            if key == "second":
                continue
            two, long = (m.get_submodule(path).peft[k] for m, k in ((model, "second"), (whole, key)))
            for kind in ("key", "value"):
                getattr(long, kind).copy_(torch.cat([getattr(two, kind), getattr(one, kind)]))
    x = tokens()
    torch.testing.assert_close(model(x).logits, whole(x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("methods", [["prefix", "prompts"], ["prompts", "prefix"]], ids=" then ".join)
@pytest.mark.parametrize("name", ["gpt_neo", "gemma2", "llama"])
def test_a_prefix_and_prompts_add_up_in_either_order(name, methods):
    """The prompts' part does not depend on the keys beside them."""
    made = {"prefix": prefix(), "prompts": lp.LLaMAAdapter(length=3, layers=2)}
    model = filled(build(name), [made[method] for method in methods])
    host, x = next(iter(lp.adapters(model)))[1], torch.randn(2, 5, 32)
    call = {"attention_mask": torch.full((5, 5), -1e4).triu(1)[None, None]}
    if name != "gpt_neo":
        call["position_embeddings"] = (torch.ones(1, 5, 8), torch.zeros(1, 5, 8))
    results = []
    for keys in ((), ("prefix_tuning",), ("llama_adapter",), host.peft_order):
        host.peft_order = tuple(keys)
        results.append(host(x, **call)[0])
    none, prefixed, prompted, both = results
    torch.testing.assert_close(both, prefixed + prompted - none, atol=1e-5, rtol=1e-5)
    assert min((prefixed - none).abs().max(), (prompted - none).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "xglm", "bloom"])
def test_a_prefix_that_starts_as_words_is_those_words(name):
    """With positions, or ALiBi's distances, as if the words stood in front."""
    base, x, words = build(name), tokens(), [11, 7, 5, 9]
    prefixes = list(prefix().adapters(base))
    init_from_text(base, prefixes, words)
    model = lp.inject(copy.deepcopy(base), prefix(shift_positions=name not in BY_DISTANCE))
    with torch.no_grad():
        for path, adapter in prefixes:
            model.get_submodule(path).peft["prefix_tuning"].load_state_dict(adapter.state_dict())
        expected = base(torch.cat([torch.tensor([words] * 2), x], 1)).logits[:, LENGTH:]
        torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=1e-5)
        assert (base(x).logits - expected).abs().max() > 0.02


TRUE_WIDTHS = {"gpt_neox": 32, "persimmon": 32, "bloom": 32, "falcon, one head of keys": 8, "gpt_oss": 16}


@pytest.mark.parametrize("name", TRUE_WIDTHS)
def test_widths_of_keys_and_values_are_measured_without_values_of_weights(name):
    skip_out_of_reach(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(MODELS[name][0], **MODELS[name][1]))
        path = next(n for n, _ in model.named_modules() if n.endswith(MODELS[name][2].rpartition(".")[2]))
        found_there = probe_attention(model, [path])
    assert found_there == probe_attention(model, [path]) == {path: (TRUE_WIDTHS[name], TRUE_WIDTHS[name])}


ASKING = {
    "llama": True,
    "gemma2": True,
    "gpt_oss": True,
    "gpt_neox": True,
    "bloom": False,
    "mpt": False,
    "gpt_neo": False,
}


@needs_interface
@pytest.mark.parametrize("name", ASKING)
def test_the_code_of_attention_says_whether_it_asks_the_interface_alone(name):
    """Then calls need no function mode; what asks nothing, or does more, gets one."""
    model = build(name)
    lp.inject(model, [prefix(), lp.LLaMAAdapter(length=2, layers=2)])
    assert {adapter.by_interface for *_, adapter in lp.adapters(model)} == {ASKING[name]}
    assert not asks_interface(Plain().trunk.blocks[0].attention)


@needs_interface
def test_no_function_mode_is_entered_where_attention_asks_the_interface(monkeypatch):
    model = filled(build("llama"), [prefix(), lp.LLaMAAdapter(length=2, layers=2)])
    expected = model(tokens()).logits
    monkeypatch.setattr("lightning_peft.structure.attention.calls.AttentionCalls.__enter__", pytest.fail)
    assert torch.equal(model(tokens()).logits, expected)
    for *_, adapter in lp.adapters(model):
        adapter.by_interface = False
    monkeypatch.undo()
    torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-5, rtol=1e-5)


@needs_interface
def test_attention_that_asks_nothing_during_a_call_is_said_and_leaves_no_change_behind():
    model = filled(build("llama"), prefix())
    host, expected = next(iter(lp.adapters(model)))[1], model(tokens()).logits
    x, positions = torch.randn(1, 3, 32), (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(host), "forward", lambda self, x, **_: next(iter(self.peft.values()))(self, lambda x: x, x))
        with pytest.raises(RuntimeError, match="LlamaAttention did not call attention that can be changed"):
            host(x, position_embeddings=positions)
    assert thread.change is None
    with pytest.raises(ZeroDivisionError):
        host.peft["prefix_tuning"](host, lambda: 1 / 0)
    assert thread.change is None
    assert torch.equal(model(tokens()).logits, expected)


@needs_interface
def test_injection_reaches_the_interface_before_anything_is_compiled(monkeypatch):
    """A trace that begins before, in a layer without an adapter, would differ when it is begun again."""
    build("llama")
    reached = ALL_ATTENTION_FUNCTIONS.get_interface.__func__
    original = inspect.getclosurevars(reached).nonlocals.get("original", reached)
    monkeypatch.setattr(AttentionInterface, "get_interface", original)
    lp.inject(build("llama"), lp.LLaMAAdapter(length=2, layers=1))
    assert AttentionInterface.get_interface is not original


def test_one_token_does_not_tell_how_alibi_falls():
    model = filled(build("bloom"), prefix())
    with pytest.raises(ValueError, match="start from two tokens"):
        model(tokens(length=1))


@pytest.mark.filterwarnings("ignore:Adapters reach 1 of 2 blocks")
def test_attention_that_keys_cannot_be_added_to_is_left_out_and_said():
    sizes = {f"{part}_{kind}": n for part in ("encoder", "decoder") for kind, n in
             (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    positions = {f"max_{part}_position_embeddings": 48 for part in ("encoder", "decoder")}
    config = AutoConfig.for_model(
        "led", d_model=32, vocab_size=64, attention_window=[4], pad_token_id=0, **sizes, **positions
    )
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    with pytest.warns(
        UserWarning, match=r"1 of 3 attention modules are left out: .*\(LEDEncoderSelfAttention\).*chunk"
    ):
        filled(model, lp.PrefixTuning(length=3))
    assert [n.rpartition(".")[2] for n, *_ in lp.adapters(model)][-2:] == ["self_attn", "encoder_attn"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(model, {"input_ids": tokens(), "decoder_input_ids": tokens()})
    assert all(gradient.abs().sum() > 0 for gradient in found)


class Written(Attention):
    """Attention by products; ``weigh`` makes weights of scores, which are divided by a tensor of one number."""

    def __init__(self, weigh):
        super().__init__()
        self.weigh = weigh
        self.divisor = torch.tensor(8.0).sqrt()

    def forward(self, x, attention_mask=None):
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        scores = q @ k.transpose(-1, -2) / self.divisor
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask[:, None, None].bool(), float("-inf"))
        return self.out_proj((self.weigh(scores) @ v).transpose(1, 2).flatten(2))


class Own(Plain):
    """A model without an attention function, which brings an example of its input."""

    example_input_array = tokens()

    def __init__(self, weigh):
        super().__init__()
        for block in self.trunk.blocks:
            block.attention = Written(weigh)


@pytest.mark.parametrize("method", [lp.PTuningV2(length=3), lp.LLaMAAdapter(length=3)], ids=["prefix", "prompts"])
def test_attention_that_somebody_wrote_out_is_that_of_torch(method):
    torch.manual_seed(1)
    own, plain = filled(Own(lambda scores: scores.softmax(-1)), method), filled(Plain(), method)
    plain.load_state_dict(own.state_dict())
    expected = plain.eval()(tokens(), LEFT)
    torch.testing.assert_close(own.eval()(tokens(), LEFT), expected, atol=1e-5, rtol=1e-5)
    assert (lp.detach(plain)(tokens(), LEFT) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("method", [lp.PTuningV2(length=3), lp.LLaMAAdapter(length=3)], ids=["prefix", "prompts"])
@pytest.mark.parametrize(
    "weigh",
    [
        *(torch.relu, torch.sigmoid, lambda s: (s - s.mean()).softmax(-1), lambda s: s.clamp(max=9.0).softmax(-1)),
        *(lambda s: (s * torch.ones(4, 1, 1)).softmax(-1), lambda s: (s + s @ s).softmax(-1)),
    ],
    ids=["relu", "sigmoid", "shifted", "clamped", "scaled by a tensor", "of two products"],
)
def test_a_trace_finds_that_attention_cannot_be_changed_before_anything_is(method, weigh):
    model = Own(weigh)
    before = list(model.state_dict())
    with pytest.raises(TypeError, match=r"blocks.0.attention \(Written\) calls no attention function, and computes no"):
        lp.inject(model, dataclasses.replace(method, targets=["blocks.*.attention"]))
    assert list(model.state_dict()) == before
    assert all(type(module).__mro__[1] is not Written for module in model.modules())
