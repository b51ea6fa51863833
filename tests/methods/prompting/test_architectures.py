"""Virtual tokens in models that read more than embeddings of text: as tokens in front, or a sentence that refuses."""

import copy
import threading

import pytest
import torch
import transformers as t
from models import BEFORE_5, tokens
from prompted_models import FRONT, LENGTH, MODELS, build, front, images, prompted
from torch import nn

import lightning_peft as lp

since_5 = pytest.mark.skipif(BEFORE_5, reason="other arguments before transformers 5")
TIGHT = {"atol": 1e-5, "rtol": 1e-5}
LEFT = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])


def left_padded(padding=0):
    return {"input_ids": tokens().masked_fill(LEFT == 0, padding), "attention_mask": LEFT}


def with_front(call, lead=(0, 0)):
    """Return a call with the tokens of ``FRONT`` in front, which are text."""
    longer = call | {"input_ids": front(call["input_ids"], FRONT, lead)}
    fills = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
    return longer | {name: front(call[name], fill, lead) for name, fill in fills.items() if name in call}


@torch.no_grad()
def generated(model, call, cache, **settings):
    out = model.generate(**call, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cache,
                         output_logits=True, return_dict_in_generate=True, **settings)  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


# Images stand where they stood, moved by the virtual tokens


@since_5
@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])
@torch.no_grad()
def test_images_keep_their_grid_and_see_each_other(name):
    """Virtual tokens with the embeddings of tokens do what these tokens do in front of text and images."""
    found, expected = prompted(name)(**images(name)).logits, build(name)(**with_front(images(name))).logits
    torch.testing.assert_close(found, expected[:, LENGTH:], **TIGHT)
    elsewhere = {"position_ids": torch.arange(12).expand(3, 2, -1)} if name == "qwen2_vl" else {"token_type_ids": None}
    other = build(name)(**with_front(images(name)) | elsewhere).logits
    assert (other - expected).abs().max() > 1e-3  # what could be lost shows


@since_5
@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "blip2"])
def test_text_about_images_is_generated_with_and_without_a_cache(name):
    call = images(name)
    call["attention_mask"][1, 0] = 0
    (ids, logits), (more_ids, more_logits) = (generated(prompted(name), call, cache) for cache in (True, False))
    assert torch.equal(ids, more_ids)
    torch.testing.assert_close(logits, more_logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_that_names_no_backbone_has_one_inside():
    """BLIP-2 puts what it saw before the text; the virtual tokens stand before both."""
    base, given = build("blip2"), []
    base.language_model.register_forward_pre_hook(lambda module, args, call: given.append(call), with_kwargs=True)
    base(**images("blip2"))
    embeddings, mask = given[0]["inputs_embeds"], given[0]["attention_mask"]
    virtual = base.get_input_embeddings()(FRONT).expand(2, -1, -1)
    expected = base.language_model(
        inputs_embeds=torch.cat([virtual, embeddings], 1), attention_mask=front(mask, 1)
    ).logits[:, LENGTH:]
    torch.testing.assert_close(prompted("blip2")(**images("blip2")).logits, expected, **TIGHT)


# What is read from ids besides the input embeddings


def by_hand(model, call, virtual):
    """Give Gemma3n embeddings with virtual tokens in front, and those of its layers, which they have of padding."""
    text, ids = model.model, call["input_ids"]
    embeddings = torch.cat([virtual.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], 1)
    of_layers = text.get_per_layer_inputs(front(ids, [0] * LENGTH))
    return model(inputs_embeds=embeddings, per_layer_inputs=of_layers).logits[:, LENGTH:]


@since_5
@torch.no_grad()
def test_embeddings_of_each_layer_are_kept():
    model, base, call = prompted("gemma3n"), build("gemma3n"), {"input_ids": tokens()}
    virtual = base.get_input_embeddings()(FRONT)
    expected = by_hand(base, call, virtual)
    torch.testing.assert_close(model(**call).logits, expected, **TIGHT)
    dropped = torch.cat([virtual.expand(2, -1, -1), base.get_input_embeddings()(tokens())], 1)
    assert (base(inputs_embeds=dropped).logits[:, LENGTH:] - expected).abs().max() > 1e-3


@since_5
@torch.no_grad()
def test_a_template_keeps_the_embeddings_of_each_layer():
    method = lp.PTuning(template="[P:2] {subject} [P]", encoder="none")
    virtual = torch.randn(3, 32, generator=torch.Generator().manual_seed(4))
    model, base = prompted("gemma3n", method, virtual), build("gemma3n")
    rows = torch.tensor([[-1, -1, 5, 6, -1, 8]])
    embeddings = base.get_input_embeddings()(rows.clamp(min=0))
    embeddings[:, [0, 1, 4]] = virtual
    of_layers = base.model.get_per_layer_inputs(rows.clamp(min=0))
    expected = base(inputs_embeds=embeddings, per_layer_inputs=of_layers).logits
    torch.testing.assert_close(model(rows).logits, expected, **TIGHT)


@since_5
def test_training_reaches_the_prompt_of_a_model_that_needs_ids():
    model = prompted("gemma3n")
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert found == {"model.peft.prompt_tuning.prompt"}


@torch.no_grad()
def test_positions_that_are_counted_from_ids_start_after_padding():
    """M2M100 skips padding when it counts positions, and cannot where it sees embeddings alone."""
    base, model, call = build("m2m"), prompted("m2m"), left_padded()
    answer = {"decoder_input_ids": tokens(2, 4)}
    expected = base(**with_front(call, (0, 3)), **answer).logits
    torch.testing.assert_close(model(**call, **answer).logits, expected, **TIGHT)


@since_5
@torch.no_grad()
def test_the_text_tower_of_a_pair_is_prompted():
    ids = tokens().masked_fill(torch.arange(7) == 6, 63)  # the end of the text, from which it is pooled
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    expected = build("clip")(input_ids=front(ids, FRONT), **pixels)
    found = prompted("clip")(input_ids=ids, **pixels)
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, **TIGHT)
    torch.testing.assert_close(found.image_embeds, expected.image_embeds)


@since_5
def test_two_prompts_in_a_model_that_needs_ids_are_refused():
    model = lp.inject(build("gemma3n"), [lp.PromptTuning(length=2), lp.PTuning(length=2)])
    with pytest.raises(ValueError, match="a second prompt for Gemma3nTextModel"):
        model(tokens())
    assert not model.get_input_embeddings()._forward_hooks


@since_5
def test_calls_of_other_threads_keep_their_embeddings():
    model, found = prompted("gemma3n"), []
    table, longer = model.get_input_embeddings(), front(tokens(), [0] * LENGTH)
    expected = table(longer)

    def embed_elsewhere(module, args):
        thread = threading.Thread(target=lambda: found.append(table(longer)))
        thread.start()
        thread.join()

    model.model.layers[0].register_forward_pre_hook(embed_elsewhere)
    model(tokens())
    assert torch.equal(found[0], expected)


# Outputs and arguments


@torch.no_grad()
def test_classes_are_pooled_from_the_first_token_not_from_a_virtual_one():
    model, base = prompted("albert"), build("albert")
    hidden = base.albert(front(tokens(), FRONT)).last_hidden_state[:, LENGTH]
    expected = base.classifier(base.albert.pooler_activation(base.albert.pooler(hidden)))
    torch.testing.assert_close(model(tokens()).logits, expected, **TIGHT)


@torch.no_grad()
def test_the_token_that_attends_to_all_remains_the_first():
    sees_all = torch.tensor([[1] + [0] * 6] * 2)
    expected = build("longformer")(front(tokens(), FRONT), global_attention_mask=front(sees_all, 0)).last_hidden_state
    found = prompted("longformer")(tokens(), global_attention_mask=sees_all).last_hidden_state
    torch.testing.assert_close(found, expected[:, LENGTH:], **TIGHT)


def test_what_is_said_of_each_token_and_unknown_is_refused():
    model = prompted("albert")
    with pytest.raises(ValueError, match=r"AlbertModel was given boxes \(2, 7, 4\), one for each token"):
        model.albert(tokens(), boxes=torch.zeros(2, 7, 4))


@pytest.mark.parametrize("both", [False, True], ids=["", "configuration of both halves"])
@torch.no_grad()
def test_an_encoder_alone_embeds_by_a_module_that_shares_the_weight(both):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = t.T5EncoderModel(t.T5Config(**sizes)).eval()
    model.config.is_encoder_decoder = both  # as UMT5 leaves it
    expected = model(front(tokens(), FRONT)).last_hidden_state[:, LENGTH:]
    lp.inject(model, lp.PromptTuning(length=LENGTH)).eval()
    model.peft.prompt_tuning.prompt.copy_(model.get_input_embeddings()(FRONT))
    torch.testing.assert_close(model(tokens()).last_hidden_state, expected, **TIGHT)


@torch.no_grad()
def test_llama4_reads_virtual_tokens_as_tokens():
    expected = build("llama4")(front(tokens(), FRONT)).logits[:, LENGTH:]
    torch.testing.assert_close(prompted("llama4")(tokens()).logits, expected, **TIGHT)


# States that count no tokens


@since_5
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize("call", [{"input_ids": tokens()}, left_padded()], ids=["", "left padding"])
def test_a_state_holds_the_virtual_tokens_once(name, call):
    (ids, logits), (more_ids, more_logits) = (generated(prompted(name), call, cache) for cache in (True, False))
    assert torch.equal(ids, more_ids)
    torch.testing.assert_close(logits, more_logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_state_of_rwkv_holds_the_virtual_tokens_once():
    model = prompted("rwkv")
    whole = model(tokens(), use_cache=False).logits
    begun = model(tokens()[:, :5], use_cache=True)
    rest = model(tokens()[:, 5:], state=begun.state, use_cache=True).logits
    torch.testing.assert_close(torch.cat([begun.logits, rest], 1), whole, **TIGHT)


# Refused before anything changes


class RoutesByIds(t.LlamaModel):
    """Scales each token by a sum of the ids before it, as no embedding can tell."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **rest):
        output = super().forward(input_ids, attention_mask, inputs_embeds=inputs_embeds, **rest)
        if input_ids is not None:
            output.last_hidden_state = output.last_hidden_state * (1 + input_ids.cumsum(1) % 5)[..., None]
        return output


class AddsPositions(t.LlamaModel):
    """Returns more than the tokens, as models do that put an image before them."""

    def forward(self, input_ids=None, attention_mask=None, image=False, **rest):
        output = super().forward(input_ids, attention_mask, **rest)
        if image:
            output.last_hidden_state = torch.cat([output.last_hidden_state[:, :2], output.last_hidden_state], 1)
        return output


class Renames(t.LlamaModel):
    """Embeds by another module than it says."""

    def forward(self, input_ids=None, attention_mask=None, **rest):
        embeddings = nn.functional.embedding(input_ids, self.embed_tokens.weight)
        return super().forward(attention_mask=attention_mask, inputs_embeds=embeddings, **rest)


def routed(cls):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return cls(t.LlamaConfig(**sizes, vocab_size=64, pad_token_id=0))


REFUSED = {
    "sound": (lambda: build("whisper"), r"Whisper\w+ reads input_features.*such as targets=\['model.encoder.layers'\]"),
    "routes": (lambda: routed(RoutesByIds), "RoutesByIds does not treat them as tokens.*also reads ids.*PrefixTuning"),
    "own table": (lambda: routed(Renames), "Renames fails with them.*did not embed its input_ids"),
    "convolutions": (
        lambda: t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
        "ResNetModel reads pixel_values and has no backbone that embeds tokens.*use LoRA",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("method", [lp.PromptTuning, lp.PTuning, lp.MultitaskPromptTuning])
def test_what_cannot_read_virtual_tokens_is_refused_before_anything_changes(case, method):
    make, words = REFUSED[case]
    model = make()
    before, required = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match=words):
        lp.inject(model, method(length=2))
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == required
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_the_targets_that_the_refusal_of_images_names_work():
    """Prompts before the blocks of a vision transformer, as in Visual Prompt Tuning."""
    config = t.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         image_size=32, patch_size=8, num_labels=3)  # fmt: skip
    torch.manual_seed(0)
    model = t.ViTForImageClassification(config).eval()
    with pytest.raises(TypeError, match="such as targets=") as refusal:
        lp.inject(model, lp.PromptTuning(length=2))
    (target,) = [word for word in str(refusal.value).split("'") if word.startswith("vit.")]
    pixels = torch.randn(2, 3, 32, 32)
    blocks, x = model.get_submodule(target), model.vit.embeddings(pixels)
    lp.inject(model, lp.PromptTuning(length=2, targets=[target])).eval()
    adapter = blocks[0].peft.prompt_tuning
    found = model(pixels).logits
    with lp.disabled(model):
        y = torch.cat([adapter.prompt.expand(2, -1, -1), x], 1)
        for block in blocks:
            y = block(y)
            y = y if isinstance(y, torch.Tensor) else y[0]
        torch.testing.assert_close(found, model.classifier(model.vit.layernorm(y)[:, 2]), **TIGHT)


def test_positions_that_virtual_tokens_cannot_be_told_from_are_refused():
    model = lp.inject(routed(AddsPositions), lp.PromptTuning(length=2))
    assert model(tokens()).last_hidden_state.shape == (2, 7, 32)
    with pytest.raises(TypeError, match=r"returned last_hidden_state of \(2, 11, 32\) for \(2, 9\) tokens"):
        model(tokens(), image=True)


def test_the_measure_does_not_need_the_attention_of_a_gpu():
    model = build("llama4")
    model.config._attn_implementation = "flash_attention_2"
    lp.inject(model, lp.PromptTuning(length=2))
    assert model.model.peft.prompt_tuning.insert.keywords["stand_in"] is None
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_measure_does_not_need_weights_that_can_be_computed_with(kind):
    model = routed(t.LlamaForCausalLM)
    if kind == "nf4":
        pytest.importorskip("torchao")
    lp.inject(lp.quantize(model, kind), lp.PromptTuning(length=2))
    assert model.model.peft.prompt_tuning.insert.keywords["stand_in"] is None


@since_5
@torch.no_grad()
def test_rows_have_prompts_of_their_own_in_a_model_that_needs_ids():
    model = prompted("gemma3n")
    lp.add_adapter(model, lp.PromptTuning(length=LENGTH, name="other"))
    with lp.row_adapters(model, ["prompt_tuning", "other"]):
        mixed = model(tokens()).logits
    expected = [model(tokens()).logits[0]]
    lp.activate(model, "other")
    expected.append(model(tokens()).logits[1])
    torch.testing.assert_close(mixed, torch.stack(expected), **TIGHT)
    assert (expected[0] - model(tokens()).logits[0]).abs().max() > 1e-3


@since_5
def test_the_measure_needs_no_values():
    with torch.device("meta"):
        model = MODELS["gemma3n"]()
    lp.inject(model, lp.PromptTuning(length=LENGTH))
    assert model.model.peft.prompt_tuning.insert.keywords["stand_in"] == 0
    assert prompted("llama4").model.peft.prompt_tuning.insert.keywords["stand_in"] is None


@torch.no_grad()
def test_a_head_that_tells_the_number_of_tokens_tells_the_longer_one():
    """ModernBERT's heads did so before transformers 5."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = t.ModernBertConfig(**sizes, num_attention_heads=4, pad_token_id=0, cls_token_id=1, sep_token_id=2,
                                classifier_pooling="mean", reference_compile=False)  # fmt: skip
    model = t.ModernBertForSequenceClassification(config).eval()
    call = {"input_ids": tokens(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    hidden = model.model(**with_front(call)).last_hidden_state[:, LENGTH:]
    expected = model.classifier(model.drop(model.head(hidden.mean(1))))
    lp.inject(model, lp.PromptTuning(length=LENGTH)).eval()
    model.model.peft.prompt_tuning.prompt.copy_(model.get_input_embeddings()(FRONT))
    torch.testing.assert_close(model(**call).logits, expected, **TIGHT)
