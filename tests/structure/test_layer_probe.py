"""What a layer computes is measured: a subclass that does more than its base class is learned or refused."""

import copy
import dataclasses
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from installed import needs
from models import BEFORE_5
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import lightning_peft as lp
from lightning_peft.core import layer_of


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.5


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), 1


class Rolled(nn.Linear):
    def forward(self, x):
        return super().forward(x).roll(3, -1)


class Normalized(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Two(nn.Linear):
    def forward(self, x, y):
        return super().forward(x + y)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Shifted(nn.Embedding):
    def forward(self, x):
        return super().forward(x + 2)


class Logged(nn.Linear):
    """Computes what its base class does."""

    calls = 0

    def forward(self, x):
        Logged.calls += 1
        return super().forward(x)


class Doubled(nn.Embedding):
    def __init__(self, *args, factor=2.0):
        super().__init__(*args)
        self.factor = factor

    def forward(self, x):
        return super().forward(x) * self.factor


REFUSED = {
    "scaled": (lambda: Scaled(6, 4), "computes another output"),
    "clipped": (lambda: Clipped(6, 4), "computes another output"),
    "pair": (lambda: Pair(6, 4), "returns a tuple"),
    "rolled": (lambda: Rolled(6, 4), "computes another output"),
    "normalized": (lambda: Normalized(6, 4), "computes another output"),
    "two inputs": (lambda: Two(6, 4), "cannot be called alone"),
    "standardized": (lambda: Standardized(3, 4, 3), "computes another output"),
    "shifted": (lambda: Shifted(9, 4), "computes another output"),
    "max_norm": (lambda: nn.Embedding(9, 4, max_norm=1.0), "renormalizes its weight"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("method", [lp.LoRA(rank=2, targets=["0"]), lp.KronA(targets=["0"]), lp.FedPara(targets=["0"])])
def test_what_computes_something_else_is_refused_and_left_alone(name, method):
    make, reason = REFUSED[name]
    net = nn.Sequential(make())
    before, cls = copy.deepcopy(net.state_dict()), type(net[0])
    with pytest.raises(TypeError, match=reason):
        lp.inject(net, method)
    assert type(net[0]) is cls
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


COMPUTED = {
    "weight_norm": lambda: weight_norm(nn.Linear(6, 4)),
    "spectral_norm": lambda: spectral_norm(nn.Linear(6, 4)),
    "prune": lambda: prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5),
    "parametrized weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("method", [lp.LoRA(rank=2), lp.KronA(), lp.IA3(feedforward_targets=[])])
@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_is_refused_since_nothing_could_be_merged_into_it(name, method):
    net = nn.Sequential(OrderedDict(layer=COMPUTED[name]()))
    with pytest.raises(TypeError, match=r"layer computes its weight from .*weight.* in each call"):
        lp.inject(net, dataclasses.replace(method, targets=["layer"]))
    assert not any("peft" in key for key in net.state_dict())


def test_what_needs_no_weight_may_follow_a_computed_one():
    net = nn.Sequential(OrderedDict(layer=parametrizations.weight_norm(nn.Linear(6, 4))))
    lp.inject(net, lp.Bottleneck(size=2, targets=["layer"], train_norms=False))
    assert [name for name, *_ in lp.adapters(net)] == ["layer"]


def test_a_subclass_that_computes_the_same_is_adapted_and_measured_once():
    Logged.calls = 0
    net = nn.Sequential(*(Logged(6, 6) for _ in range(5)))
    lp.inject(net, lp.LoRA(rank=2, targets=["*"]))
    assert len(list(lp.adapters(net))) == 5
    assert Logged.calls == 2  # as it is, and with another weight


def test_measuring_leaves_the_layer_its_hooks_and_the_random_numbers_as_they_were():
    class Drops(nn.Linear):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    called, layer = [], Drops(40, 30)
    layer.register_forward_hook(lambda *args: called.append(1))
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    assert type(layer_of(layer)).__name__ == "LinearType"
    assert called == []
    assert layer.training
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert (layer.out_features, layer.in_features) == (30, 40)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_of_any_size_are_measured_on_a_few_numbers(device):
    layer = Logged(2**15, 2**15, device="meta") if device == "meta" else Logged(300, 500)
    assert layer_of(layer).maps_features
    assert layer.weight.is_meta == (device == "meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [lp.LoRA(rank=2, targets=["0"]), lp.KronA(targets=["0"]), lp.FedPara(targets=["0"])])
def test_an_embedding_that_scales_its_output_merges_to_what_it_computes(method, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(Doubled(9, 6, factor=3.0)).to(dtype)
    x = torch.arange(9)
    lp.inject(net, method)
    ((_, host, _, adapter),) = lp.adapters(net)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    expected = 3 * (host.weight.double() + adapter.delta().detach().double().T)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(net(x).double(), expected, **tolerance)
    live = net(x)
    torch.testing.assert_close(lp.merge(net)(x), live, **tolerance)


def test_each_factor_of_a_class_is_measured():
    scales = [layer_of(Doubled(9, 6, factor=factor)).scale for factor in (2.0, 5.0, 2.0)]
    assert scales == pytest.approx([2.0, 5.0, 2.0])


@needs("transformers")
@pytest.mark.parametrize("family", ["gemma3", *([] if BEFORE_5 else ["bart"])])  # whose embeddings were always shared
def test_scaled_embeddings_of_transformers_agree_live_merged_and_in_peft(family, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import BartConfig, BartForConditionalGeneration, Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "pad_token_id": 0}
    if family == "gemma3":
        config = Gemma3TextConfig(
            **sizes, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=False,
        )  # fmt: skip
        make, target = (lambda: Gemma3ForCausalLM(config)), "embed_tokens"
    else:
        config = BartConfig(
            **sizes, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, scale_embedding=True,
            max_position_embeddings=64, tie_word_embeddings=False,
        )  # fmt: skip
        make, target = (lambda: BartForConditionalGeneration(config)), "decoder.embed_tokens"
    base = make().eval()
    model = lp.inject(copy.deepcopy(base), lp.LoRA(rank=4, targets=[target])).eval()
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(3, 64, (2, 7))
    with torch.no_grad():
        live = model(ids).logits
        assert (live - base(ids).logits).abs().max() > 1e-2
        lp.export_peft(model, tmp_path)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(theirs(ids).logits, live, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(lp.merge(model)(ids).logits, live, atol=1e-4, rtol=1e-4)
