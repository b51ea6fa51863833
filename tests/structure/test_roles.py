"""What roles mean in the models of several libraries: blocks, heads, norms."""

import pytest
import torch
from small_models import small
from torch import nn

import lightning_peft as lp
from lightning_peft.structure.base_model import matches, matches_any
from lightning_peft.structure.roles import ROLES

HEADS = {
    "bert": ["classifier"],
    "bert, alone": [],
    "bert, masks": [],
    "bert in a module": ["top"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "distilbert": ["pre_classifier", "classifier"],
    "deberta": ["pooler.dense", "classifier"],
    "gpt2": [],
    "gpt2, two heads": ["multiple_choice_head.summary"],
    "llama": [],
    "llama, classes": ["score"],
    "t5": [],
    "bart": [],
    "bart, classes": ["classification_head.dense", "classification_head.out_proj"],
    "vit": ["classifier"],
    "fused_vit": ["head"],
    "plain": ["head"],
}


NORMS = {
    "bert": 7,
    "bert, masks": 4,  # that of the vocabulary's head as well
    "distilbert": 7,
    "gpt2": 7,
    "llama": 7,
    "t5": 6 + 9 + 2,
    "bart": 1 + 6 + 1 + 9,
    "vit": 7,
    "encoder": 6,
    "plain": 3,
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_what_only_the_task_uses(name):
    assert ROLES["head"](small(name)) == HEADS[name]


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_found(name):
    assert len(ROLES["norms"](small(name))) == NORMS[name]


def test_a_norm_without_parameters_or_with_statistics_is_none():
    net = nn.Sequential(nn.LayerNorm(3, elementwise_affine=False), nn.BatchNorm1d(3), nn.RMSNorm(3), nn.GroupNorm(1, 3))
    assert ROLES["norms"](net) == ["2", "3"]
    assert ROLES["norms"](lp.inject(net, lp.FullFineTuning())) == ["2", "3"]


class Vectors(nn.Module):
    def __init__(self, size=6):
        super().__init__()
        self.vector = nn.Parameter(torch.ones(size))


class Equalizer(Vectors):
    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).sqrt() * self.vector


class Gated(Vectors):
    def forward(self, x, gate):
        return x / x.norm(dim=-1, keepdim=True) * self.vector * gate


class OneNumber(Vectors):
    def __init__(self):
        super().__init__(1)

    def forward(self, x):
        return self.vector * nn.functional.normalize(x, dim=-1)


class ChannelsFirst(Vectors):
    def forward(self, x):
        return (x - x.mean(1, keepdim=True)) / x.var(1, keepdim=True).sqrt() * self.vector[:, None, None]


class ScaleNorm(Vectors):
    def forward(self, x):
        return x * self.vector


class Around(Vectors):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6, elementwise_affine=False)

    def forward(self, x):
        return self.norm(x) + self.vector


class ConstantNorm(Vectors):
    def forward(self, x):
        return self.vector.expand_as(x)


def test_norms_are_found_by_what_they_do_whatever_they_are_called():
    norms = [Equalizer(), Gated(), OneNumber(), ChannelsFirst(), nn.InstanceNorm1d(6, affine=True)]
    others = [ScaleNorm(), Around(), ConstantNorm(), nn.PReLU(6), nn.Linear(6, 1)]
    net = nn.Sequential(*norms, *others)
    assert ROLES["norms"](net) == ["0", "1", "2", "3", "4"]
    with torch.device("meta"):
        assert ROLES["norms"](nn.Sequential(Equalizer(7), ScaleNorm(7), nn.LayerNorm(7))) == ["0", "2"]


@pytest.mark.parametrize(
    "patterns", [("query", "q_proj"), ("*[0-9].output.dense", "wi*"), ("attn.c_attn",), ("q", "*")]
)
def test_several_globs_match_what_one_of_them_matches(patterns):
    words = ["query", "q_proj", "0", "12", "attn", "c_attn", "output", "dense", "wi_0", "q"]
    names = [*words, *(f"{a}.{b}" for a in words for b in words), *(f"h.{a}.output.{b}" for a in words for b in words)]
    found = [name for name in names if matches_any(name, patterns)]
    assert found == [name for name in names if any(matches(name, pattern) for pattern in patterns)]
    assert found
