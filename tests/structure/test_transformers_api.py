"""What is trusted of transformers holds in the installed release, whatever it calls its arguments."""

import copy
import inspect
import itertools

import pytest
import torch
from models import BEFORE_5, MODELS, cache_argument, cache_of, tokens
from torch import nn

import lightning_peft as lp
from lightning_peft.structure import transformers_api as api
from lightning_peft.structure.cached_tokens import cached_tokens
from lightning_peft.structure.transformers_loading import names_by_loading

transformers = pytest.importorskip("transformers")
DECODERS = ["llama", "gpt2"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


class Renamed(nn.Module):
    """A backbone whose cache is called as no release calls it, as the next one might."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.config = backbone, backbone.config

    @property
    def base_model(self):
        return self

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, memory=None, inputs_embeds=None):
        names = {cache_argument(self.backbone): memory, "attention_mask": attention_mask, "use_cache": True}
        return self.backbone(input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, **names)


METHODS = {
    "PromptTuning": lp.PromptTuning(length=3),
    "MultitaskPromptTuning": lp.MultitaskPromptTuning(length=3),
    "PTuning": lp.PTuning(length=3),
    "PTuning in a template": lp.PTuning(template="[P:2] {x}"),
    "shifted PrefixTuning": lp.PrefixTuning(length=3, hidden_size=8, shift_positions=True),
}


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "left padding"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_is_found_whatever_its_argument_is_called(name, method, masked):
    """If this fails, virtual tokens enter again at each generated token, and the text is silently wrong."""
    model = lp.inject(Renamed(MODELS[name]().base_model), METHODS[method]).eval()
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    x, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    if "template" in method:
        x[:, 2:4] = -1
    positions = None
    if masked:
        mask[0, :2] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)

    def call(columns, memory=None):
        given = {"memory": memory} | ({"attention_mask": mask[:, : columns.stop]} if masked else {})
        return model(x[:, columns], position_ids=None if positions is None else positions[:, columns], **given)

    with torch.no_grad():
        whole = call(slice(0, 9))[0]
        first = call(slice(0, 5))
        steps, memory = [first[0]], cache_of(first)
        for start in range(5, 9):
            steps.append(call(slice(start, start + 1), memory)[0])
    torch.testing.assert_close(torch.cat(steps, 1)[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=1e-5)


def test_state_of_earlier_calls_that_is_no_cache_is_refused():
    """Models with a cache class of their own tell nobody how many tokens it holds."""

    class OwnState:
        __module__ = "transformers.models.any.modeling_any"

    model = lp.inject(Renamed(MODELS["llama"]().base_model), lp.PromptTuning(length=3))
    with pytest.raises(TypeError, match="was given a OwnState as 'memory'.*use_cache=False"):
        model(tokens(), memory=OwnState())


def test_a_cache_of_pairs_of_tensors_counts_as_one():
    keys = torch.zeros(2, 4, 6, 8)
    assert cached_tokens(nn.Identity(), {"any": ((keys, keys), (keys, keys)), "other": ("a", 1)}) == 6
    assert cached_tokens(nn.Identity(), {"any": None, "other": (), "mask": keys}) == 0


class MixedCache:
    """A cache whose first layer has linear attention, which counts no tokens."""

    layers = (None, None, None)

    def __init__(self, tokens):
        self.tokens = tokens

    def get_seq_length(self, layer=0):
        return self.tokens if layer else 0


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_cache_counts_the_tokens_of_the_first_layer_that_counts(tokens):
    assert cached_tokens(nn.Identity(), {"past": MixedCache(tokens)}) == tokens


@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_without_the_virtual_tokens_is_refused(name):
    model, base = lp.inject(MODELS[name](), lp.PromptTuning(length=3)).eval(), MODELS[name]()
    x, mask = tokens(), torch.ones(2, 7, dtype=torch.long)
    with torch.no_grad():
        cache = cache_of(base(x[:, :5], use_cache=True))
        with pytest.raises(ValueError, match="holds 5 tokens, expected 8: 3 virtual tokens"):
            model(x[:, 5:], attention_mask=mask, **{cache_argument(model): cache})
        cache = cache_of(model(x[:, :5], use_cache=True))
        model(x[:, 5:], attention_mask=mask, **{cache_argument(model): cache})


@pytest.mark.parametrize("name", DECODERS)
def test_an_assistant_model_is_refused_or_changes_nothing(name):
    """It cuts what it rejects off the cache, by a length that knows nothing of virtual tokens."""
    model, assistant = lp.inject(MODELS[name](), lp.PromptTuning(length=3)).eval(), MODELS[name]()
    for *_, adapter in lp.adapters(model):
        nn.init.normal_(adapter.prompt)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    x = tokens(1, 7)
    expected = model.generate(x, **settings)
    try:
        found = model.generate(x, assistant_model=assistant, **settings)
    except ValueError as error:
        assert "without an assistant model" in str(error)  # noqa: PT017
    else:
        assert torch.equal(found, expected)


# Names that the installed release must still have


def test_the_release_has_the_names_that_are_trusted():
    """Each of these is used by its name; the message says what a release that renames it breaks."""
    model = MODELS["llama"]()
    takes = inspect.signature(type(model.base_model).forward).parameters
    for argument in ("input_ids", "attention_mask", "position_ids", "inputs_embeds"):
        assert argument in takes, f"prompts pass {argument}, which LlamaModel.forward does not take any more"
    bert = inspect.signature(transformers.BertModel.forward).parameters
    assert "token_type_ids" in bert, "prompts extend token_type_ids, which BertModel.forward does not take any more"
    decoder = inspect.signature(type(MODELS["bart"]().get_decoder()).forward).parameters
    assert "encoder_attention_mask" in decoder, "decoders that see an encoder's prompt are masked by another name"
    assert callable(transformers.Cache.get_seq_length), "caches do not say how many tokens they hold"
    output = model.base_model(tokens(), output_hidden_states=True)
    assert {"last_hidden_state", "hidden_states"} <= output.keys(), "virtual tokens stay in a backbone's output"
    assert api.from_config(model, "max_position_embeddings") == 48, "texts that are too long are not refused"


def test_backbones_are_found_in_heads_shells_and_halves():
    found = {name: [n for n, _ in api.backbones(MODELS[name]())] for name in ("llama", "gpt2", "bert", "t5", "bart")}
    assert found == {"llama": ["model"], "gpt2": ["transformer"], "bert": ["bert"], "t5": [""], "bart": ["model"]}
    opt = transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)
    assert [n for n, _ in api.backbones(transformers.OPTForCausalLM(opt))] == ["model.decoder"]
    assert [api.is_encoder_decoder(MODELS[name]()) for name in ("t5", "bart", "llama", "plain")] == [1, 1, 0, 0]


def test_attention_says_what_it_calls_and_how_many_heads_it_has():
    """Else flash attention, which added keys would make wrong, is not refused any more."""
    for name in DECODERS:
        model = MODELS[name]()
        attention = model.get_submodule({"llama": "model.layers.0.self_attn", "gpt2": "transformer.h.0.attn"}[name])
        assert api.attention_implementation(attention) == "sdpa"
        assert api.attention_heads(attention) == 4
        model.set_attn_implementation("eager")
        assert api.attention_implementation(attention) == "eager"
    assert api.attention_implementation(nn.Linear(1, 1)) is None
    assert api.attention_heads(nn.Linear(1, 1)) is None


@pytest.mark.skipif(BEFORE_5, reason="attention modules ask no interface before transformers 5")
def test_every_attention_function_comes_from_the_interface_that_is_reached(monkeypatch):
    """Else prefixes do not reach eager attention, or change calls of torch's function twice."""
    interface, asked = api.attention_interface(), []
    assert interface._global_mapping["sdpa"].__name__ == api.SDPA_FUNCTION
    original = interface.get_interface

    def get_interface(self, attn_implementation, default):
        asked.append((attn_implementation, default.__name__))
        return original(self, attn_implementation, default)

    monkeypatch.setattr(interface, "get_interface", get_interface)
    model = MODELS["llama"]()
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        model(tokens())
        assert asked == [(implementation, "eager_attention_forward")] * 3
        asked.clear()


@pytest.mark.skipif(BEFORE_5, reason="attention modules ask no interface before transformers 5")
def test_the_function_around_torchs_attention_is_understood():
    """Else prefixes see other keys than the text has, or are causal where the text is not."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from lightning_peft.structure.attention.sdpa_call import change_sdpa_call

    unchanged = lambda attend, *args, **settings: attend(*args, **settings)  # noqa: E731
    torch.manual_seed(0)
    masks = {
        "none": lambda n, m: None,
        "bool": lambda n, m: torch.ones(2, 1, n, m, dtype=torch.bool).tril(1),
        "added": lambda n, m: torch.randn(2, 4, n, m),
    }
    for mask, groups, (n, m), own, given in itertools.product(
        masks, (1, 2), ((1, 1), (1, 6), (5, 5), (5, 8)), (None, False), (None, False, True)
    ):
        module = nn.Module()
        module.num_key_value_groups = groups
        if own is not None:
            module.is_causal = own
        q, (k, v) = torch.randn(2, 4, n, 8), (torch.randn(2, 4 // groups, m, 8) for _ in range(2))
        arguments = (sdpa_attention_forward, module, q, k, v, masks[mask](n, m))
        settings = {"scaling": 0.3, "is_causal": given, "sliding_window": None}
        expected, _ = sdpa_attention_forward(*arguments[1:], **settings)
        found, weights = change_sdpa_call(unchanged, *arguments, **settings)
        torch.testing.assert_close(found, expected, msg=f"{mask} {groups} {n} {m} {own} {given}")
        assert (found.is_contiguous(), weights) == (True, None)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpointing_is_seen_switched_and_made_non_reentrant():
    """Else a plan counts what is not saved, and frozen embeddings leave adapters without gradients."""
    model = MODELS["llama"]().train()
    assert not any(map(api.is_checkpointing, model.modules()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    on = [module for module in model.modules() if api.is_checkpointing(module)]
    assert len(on) >= 3
    with api.without_checkpointing(model) as switched:
        assert switched
        assert not any(map(api.is_checkpointing, model.modules()))
    assert [module for module in model.modules() if api.is_checkpointing(module)] == on
    api.checkpoint_without_reentry(model)
    functions = [vars(module)["_gradient_checkpointing_func"] for module in on]
    assert [function.keywords["use_reentrant"] for function in functions] == [False] * len(on)
    api.checkpoint_without_reentry(copy.deepcopy(model))  # once more changes nothing


def test_conv1d_is_still_where_its_type_is_looked_up():
    """Else LoRA refuses GPT-2, whose linear layers are of this type."""
    kind = type(MODELS["gpt2"]().transformer.h[0].attn.c_attn)
    assert f"{kind.__module__}.{kind.__qualname__}" == api.CONV1D


def test_the_rules_by_which_weights_are_renamed_are_found():
    """If this fails, adapters of older releases are refused on models whose modules have other names now."""
    text, vision = (
        transformers.LlamaConfig(**SIZES),
        transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8),
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=vision, text_config=text)
        )
    place = names_by_loading(model, set(model.state_dict()), "")
    old, new = "language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"
    assert (place(old), place(new)) == (new, new)
    assert place("language_model.lm_head.weight") == "lm_head.weight"
    assert names_by_loading(nn.Linear(2, 2), {"weight"}, "")(old) == old
