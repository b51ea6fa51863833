"""Prompts in calls that continue a cache, have one of a fixed size, reach the last position, or hold packed rows."""

import copy
import pickle

import pytest
import torch
from models import BEFORE_5, MODELS, cache_argument, cache_of, tokens

import lightning_peft as lp

PROMPTS = {"prompt": lp.PromptTuning(length=3), "p-tuning": lp.PTuning(length=3)}
DECODERS = ["llama", "gpt2"]
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}


def prompted(name, method="prompt"):
    torch.manual_seed(0)
    return lp.inject(MODELS[name](), PROMPTS[method]).eval()


def filled(model, x):
    """Return the cache of the first tokens of a text."""
    with torch.no_grad():
        return cache_of(model(x, use_cache=True))


@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.parametrize("name", DECODERS)
def test_generation_goes_on_from_a_cache_that_the_user_filled(name, method):
    how = copy.deepcopy if name == "llama" else lambda cache: pickle.loads(pickle.dumps(cache))
    model, x = prompted(name, method), tokens(2, 12)
    ones = torch.ones_like(x)
    expected = model.generate(x, attention_mask=ones, **GREEDY)
    cache = filled(model, x[:, :6])
    assert cache.get_seq_length() == 6
    given = {cache_argument(model): how(cache)}
    assert torch.equal(model.generate(x, attention_mask=ones, **given, **GREEDY), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_calls_by_hand_go_on_from_a_cache_with_and_without_masks_and_positions(name):
    model, x = prompted(name), tokens(2, 12)
    cache, argument = filled(model, x[:, :6]), cache_argument(model)
    with torch.no_grad():
        expected = model(x).logits[:, 6:]
        for more in ({}, {"attention_mask": torch.ones_like(x)}, {"position_ids": torch.arange(6, 12)[None]}):
            given = {argument: copy.deepcopy(cache)}
            y = model(x[:, 6:], **given, **more).logits
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
            assert given[argument].get_seq_length() == 12


def test_positions_that_count_virtual_tokens_are_refused():
    model, x = prompted("llama"), tokens(2, 12)
    cache = filled(model, x[:, :6])
    with pytest.raises(ValueError, match="position_ids begin at 9, .* its tokens go on at 6"):
        model(x[:, 6:], position_ids=torch.arange(9, 15)[None], **{cache_argument(model): cache})


@pytest.mark.parametrize("name", DECODERS)
def test_another_prompt_hides_as_many_tokens_as_it_has(name):
    model, x = prompted(name), tokens(2, 12)
    lp.add_adapter(model, lp.PromptTuning(name="other", length=5))
    lp.activate(model, "other")
    assert filled(model, x).get_seq_length() == 12
    assert type(filled(model, x)).get_seq_length(filled(model, x)) == 17


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 2}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_what_cuts_and_reorders_a_cache_changes_nothing(name, how):
    model, x = prompted(name), tokens(1, 12)
    settings = {"attention_mask": torch.ones_like(x), **GREEDY, **({"num_beams": how.get("num_beams", 1)})}
    expected = model.generate(x, use_cache=False, **settings)
    assert torch.equal(model.generate(x, **{**settings, **how}), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_of_a_fixed_size_is_refused_before_anything_is_computed(name):
    model, x, calls = prompted(name), tokens(1, 12), []
    layer = next(m for n, m in model.named_modules() if n.endswith(("layers.0", "h.0")))
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="StaticCache, a cache of a fixed size.*use PrefixTuning"):
        model.generate(x, attention_mask=torch.ones_like(x), cache_implementation="static", **GREEDY)
    assert calls == []


def test_gpt2_generates_to_its_last_position_and_says_where_it_is():
    model, x = prompted("gpt2"), tokens(1, 12)
    settings = {"attention_mask": torch.ones_like(x), "do_sample": False}
    assert model.generate(x, max_length=45, min_length=45, **settings).shape == (1, 45)
    with pytest.raises(ValueError, match=r"48 positions, and this would be number 49, 3 virtual.*max_length=45"):
        model.generate(x, max_length=48, min_length=48, **settings)
    rotary = prompted("llama")  # which computes positions
    assert rotary.generate(x, max_length=48, min_length=48, **settings).shape == (1, 48)


def packed(model, rows, **settings):
    """Return the outputs of rows as one, and of each alone."""
    positions = torch.arange(rows.shape[1]).repeat(len(rows))[None]
    with torch.no_grad():
        alone = torch.cat([model(row[None]).logits for row in rows], 1)
        return model(rows.flatten()[None], position_ids=positions, use_cache=False, **settings).logits, alone


@pytest.mark.parametrize("method", PROMPTS)
def test_packed_rows_are_refused(method):
    model = prompted("llama", method)
    with pytest.raises(ValueError, match="position_ids that restart within a row.*Give each sequence a row"):
        packed(model, tokens(2, 6))
    ends = torch.tensor([0, 6, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q: several sequences in one row"):
        model(tokens(1, 12), cu_seq_lens_q=ends, cu_seq_lens_k=ends)


@pytest.mark.skipif(BEFORE_5, reason="masks of packed rows are made since transformers 5")
@pytest.mark.parametrize(
    "method",
    [lp.PrefixTuning(length=3, hidden_size=8), lp.PTuningV2(length=3), lp.LLaMAAdapter(length=3), lp.LoRA()],
    ids=lambda method: type(method).__name__,
)
def test_methods_without_virtual_tokens_are_right_on_packed_rows(method):
    torch.manual_seed(0)
    model = lp.inject(MODELS["llama"](), method).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    together, alone = packed(model, tokens(2, 6))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padded_rows_are_no_packed_ones(side):
    model, inputs = prompted("llama"), MODELS["llama"].inputs(side)
    assert inputs["position_ids"].min() == 0
    ones = inputs["attention_mask"]
    inputs["position_ids"] = (ones.cumsum(1) - 1).masked_fill(ones == 0, 1)  # as generate numbers them
    y = model(**inputs).logits[ones.bool()].view(2, 7, -1)
    torch.testing.assert_close(y, model(tokens()).logits, atol=1e-5, rtol=1e-5)
