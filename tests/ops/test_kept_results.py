"""Results and views that inference keeps: nothing that changes a value goes unnoticed."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_peft.ops import joined_attention
from lightning_peft.ops.joined_attention import attend_joined, kept_causal_mask
from lightning_peft.ops.kept_result import LIMIT, KeptResult
from lightning_peft.ops.kept_rows import KeptRows

WRITES = {
    "in place": lambda p: p.add_(1),
    "through .data": lambda p: p.data.mul_(2),
    "through numpy": lambda p: p.detach().numpy().__setitem__((0, 0), 7),
    "other memory": lambda p: setattr(p, "data", p.data + 1),
    "of another type": lambda p: setattr(p, "data", p.data.double()),
}


class Doubled:
    """A function of one parameter that counts its calls."""

    def __init__(self):
        self.p, self.kept, self.calls = nn.Parameter(torch.randn(3, 4)), KeptResult(), 0

    def compute(self):
        self.calls += 1
        return self.p.detach() * 2

    def __call__(self, key=()):
        return self.kept.get(key, [self.p], self.compute)


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_a_result_is_kept_until_a_value_is_written(write):
    f = Doubled()
    first = f()
    assert f() is first
    assert f.calls == 1
    WRITES[write](f.p)
    torch.testing.assert_close(f(), f.p.detach() * 2, atol=0, rtol=0)
    assert f.calls == 2
    assert f() is f()
    assert f.calls == 2


def test_nothing_is_kept_where_it_could_be_wrong():
    f = Doubled()
    f(), f()
    assert f.calls == 2, "with gradients"
    with torch.no_grad():
        with torch.autocast("cpu"):
            f(), f()
        assert f.calls == 4, "under autocast"
        f()
        f("another key")
        assert f.calls == 6
        f.p = nn.Parameter(torch.zeros(LIMIT + 1, 1))
        f(), f()
        assert f.calls == 8, "with many numbers"
        assert f.kept.value.shape == (3, 4), "of the small one"
        f.p = nn.Parameter(torch.zeros(2, 2, device="meta"))
        f(), f()
        assert f.calls == 10, "on another device"


@torch.no_grad()
def test_copies_and_files_start_without_a_result():
    f = Doubled()
    f()
    assert f.kept.value is not None
    for twin in (copy.deepcopy(f.kept), pickle.loads(pickle.dumps(f.kept))):
        assert twin.value is None


def heads(p, x):
    return p.to(x.dtype).view(len(p), -1, x.shape[-1]).transpose(0, 1).expand(len(x), -1, -1, -1)


def counted(kept, pair, joined):
    calls = []
    rows = kept.get(pair, joined, lambda p, x: calls.append(0) or heads(p, x))
    for row, p, x in zip(rows, pair, joined, strict=True):
        torch.testing.assert_close(row, heads(p.detach(), x), atol=0, rtol=0)
    return len(calls)


@torch.no_grad()
def test_views_see_what_is_written_and_are_made_again_for_other_memory():
    kept, pair = KeptRows(), tuple(nn.Parameter(torch.randn(4, 6)) for _ in range(2))
    joined = torch.randn(3, 2, 5, 3), torch.randn(3, 2, 5, 3)
    assert [counted(kept, pair, joined) for _ in range(2)] == [2, 0]
    for write in ("in place", "through .data", "through numpy"):
        WRITES[write](pair[0])
        assert counted(kept, pair, joined) == 0, write
    pair[1].data = pair[1].data.clone()
    assert [counted(kept, pair, joined) for _ in range(2)] == [2, 0]
    pair[0].data = pair[0].data.view(6, 4).T.contiguous().T.reshape(4, 6).T.contiguous().T
    assert [counted(kept, pair, joined) for _ in range(2)] == [2, 0]
    more = tuple(x[:, :, :2].repeat(2, 1, 1, 1) for x in joined)
    assert [counted(kept, pair, more) for _ in range(2)] == [2, 0]
    wider = tuple(x.view(3, 1, 5, 6) for x in joined)
    assert [counted(kept, pair, wider) for _ in range(2)] == [2, 0]
    cast = tuple(x.bfloat16() for x in joined)
    assert [counted(kept, pair, cast) for _ in range(2)] == [2, 2], "a cast is no view"
    assert copy.deepcopy(kept)._kept is None


def test_views_are_not_taken_for_tensors_that_torch_func_maps():
    kept, pair = KeptRows(), tuple(nn.Parameter(torch.randn(4, 6)) for _ in range(2))
    joined = torch.randn(3, 2, 5, 3), torch.randn(3, 2, 5, 3)
    with torch.no_grad():
        kept.get(pair, joined, heads)
        several = tuple(torch.stack([p, p + 1]) for p in pair)
        mapped = torch.func.vmap(lambda a, b: torch.stack(kept.get((a, b), joined, heads)))(*several)
        torch.testing.assert_close(mapped[1][0], heads(pair[0] + 1, joined[0]), atol=0, rtol=0)
        assert counted(kept, pair, joined) == 2


@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("heads_of_keys", [4, 2])
def test_the_kept_mask_of_a_causal_call_gives_what_empty_queries_give(length, heads_of_keys, monkeypatch):
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, heads_of_keys, length + 5, 8, requires_grad=True) for _ in range(2))
    results = []
    for limit in (joined_attention.MASK_LIMIT, 0):
        monkeypatch.setattr(joined_attention, "MASK_LIMIT", limit)
        assert (kept_causal_mask(q, length + 5, length) is None) is (limit == 0)
        y = attend_joined(F.scaled_dot_product_attention, length, q, k, v, is_causal=True, enable_gqa=True)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    torch.testing.assert_close(*results)


def test_a_causal_mask_is_made_once_and_serves_training_after_inference_mode():
    joined_attention._masks.clear()
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    with torch.inference_mode():
        mask = kept_causal_mask(q, 8, 3)
    assert mask is kept_causal_mask(q, 8, 3)
    assert not mask.is_inference()
    assert mask.tolist() == [[0.0] * (3 + row + 1) + [float("-inf")] * (4 - row) for row in range(5)]
    assert kept_causal_mask(q.double(), 8, 3).dtype == torch.float64
    for keys in range(8, 40):
        kept_causal_mask(q, keys, 3)
    assert len(joined_attention._masks) <= joined_attention._MASKS
    with torch.device("meta"):
        assert kept_causal_mask(torch.empty(2, 4, 5, 8), 8, 3) is None
