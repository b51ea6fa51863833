"""Attention calls of every kind, and what is done to them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_peft.attention import AttentionCalls


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


@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
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
