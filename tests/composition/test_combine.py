"""Combined adapters: formulas written afresh in float64, and what peft makes of the same factors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from adapter_edits import stir
from models import MODELS, logits, tokens

import lightning_peft as lp
from lightning_peft.composition.combine import combine_tensors
from lightning_peft.core.injection_record import adapters_of, methods_named, require_record

WEIGHTS = [0.7, -0.4, 1.1]
HOST = "model.layers.1.self_attn.v_proj"


def model(rank=2, base="llama"):
    torch.manual_seed(0)
    net = MODELS[base]()
    for number, name in enumerate("abc"):
        lp.add_adapter(net, lp.LoRA(rank=rank, alpha=3 + number), name)
    stir(net, 4)
    return net


def deltas(net, *names, host=HOST):
    return [
        adapters_of(net, *methods_named(require_record(net), name))[host].delta().detach().double().numpy()
        for name in names
    ]


def test_a_sum_is_exact_from_the_sum_of_ranks_on():
    net = model()
    keys = {k: v.clone() for k, v in net.state_dict().items()}
    lp.combine(net, list("abc"), WEIGHTS, "sum", rank=6)
    expected = sum(w * d for w, d in zip(WEIGHTS, deltas(net, *"abc"), strict=True))
    np.testing.assert_allclose(deltas(net, "sum")[0], expected, atol=1e-6)
    assert lp.active(net) == ()
    assert all(torch.equal(net.state_dict()[k], v) for k, v in keys.items())
    one = lp.combine(net, ["b"], [1.0], "copy")
    with torch.no_grad():
        torch.testing.assert_close(logits(lp.activate(one, "copy")(tokens())), logits(lp.activate(one, "b")(tokens())))


def test_a_lower_rank_is_the_best_there_is():
    net = lp.combine(model(), list("abc"), WEIGHTS, "svd", rank=2)
    whole = sum(w * d for w, d in zip(WEIGHTS, deltas(net, *"abc"), strict=True))
    u, s, v = np.linalg.svd(whole)
    np.testing.assert_allclose(deltas(net, "svd")[0], u[:, :2] * s[:2] @ v[:2], atol=1e-6)


def ties(tensors, weights, density, prune=True):
    """TIES entry by entry, as the paper's algorithm 1 has it, with weights."""
    kept = []
    for x in tensors:
        flat = np.sort(np.abs(x).ravel())[::-1]
        least = flat[int(density * x.size) - 1]
        kept.append(np.where(np.abs(x) >= least, x, 0) if prune else x)
    result = np.zeros_like(tensors[0])
    for place in np.ndindex(*result.shape):
        sign = 1 if sum(x[place] for x in kept) >= 0 else -1
        same = [w * x[place] for w, x in zip(weights, kept, strict=True) if np.sign(x[place]) == sign]
        result[place] = sum(same) / len(same) if same else 0
    return result


def test_ties_is_its_formula_of_weights_and_of_factors():
    net = model()
    lp.combine(net, list("abc"), WEIGHTS, "whole", rule="ties", rank=16, density=0.3)
    np.testing.assert_allclose(deltas(net, "whole")[0], ties(deltas(net, *"abc"), WEIGHTS, 0.3), atol=1e-6)
    lp.combine(net, list("abc"), WEIGHTS, "parts", rule="ties", of="factors", density=0.5)
    found = [adapters_of(net, *methods_named(require_record(net), name))[HOST] for name in (*"abc", "parts")]
    scales = [w * (3 + n) / 2 for n, w in enumerate(WEIGHTS)]
    for factor, signs in (("a", np.sign(scales)), ("b", np.ones(3))):
        tensors = [getattr(one, factor).detach().double().numpy() for one in found]
        expected = ties(tensors[:3], signs * np.sqrt(np.abs(scales)), 0.5)
        np.testing.assert_allclose(tensors[3], expected, atol=1e-6)


def test_dare_keeps_a_share_and_its_mean():
    x = [torch.full((100, 200), value, dtype=torch.float64) for value in (1.0, 2.0)]
    generator = torch.Generator().manual_seed(0)
    found = combine_tensors(x, [1.0, 0.5], "dare_linear", 0.25, generator)
    assert set(found.unique().tolist()) == {0, 4, 8}  # none, one (both give 4), both
    assert abs(found.mean() - 2) < 0.05
    found = combine_tensors(x, [1.0, 0.5], "dare_ties", 0.25, generator)
    assert set(found.unique().tolist()) == {0, 4}
    assert torch.equal(
        combine_tensors(x, [1.0, 0.5], "dare_linear", 1.0, generator), torch.full((100, 200), 2.0).double()
    )
    nets = [lp.combine(model(), list("ab"), [1, 1], "d", rule="dare_ties", seed=seed) for seed in (1, 1, 2)]
    one, same, other = (deltas(net, "d")[0] for net in nets)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


PEFT = {  # what peft calls it, and what it is here
    "linear": {"of": "factors"},
    "cat": {"rank": 6},
    "svd": {},
    "magnitude_prune": {"of": "factors", "rule": "magnitude_prune", "density": 0.5},
    "magnitude_prune_svd": {"rule": "magnitude_prune", "density": 0.3},
    "ties": {"of": "factors", "rule": "ties", "density": 0.5},
    "ties_svd": {"rule": "ties", "density": 0.3},
    "dare_linear": {"of": "factors", "rule": "dare_linear", "density": 0.6, "seed": 3},
    "dare_linear_svd": {"rule": "dare_linear", "density": 0.6, "seed": 3},
    "dare_ties": {"of": "factors", "rule": "dare_ties", "density": 0.6, "seed": 3},
    "dare_ties_svd": {"rule": "dare_ties", "density": 0.6, "seed": 3},
}


@pytest.fixture(scope="module")
def both():
    peft, net, theirs = pytest.importorskip("peft"), model(), None
    for number, name in enumerate("abc"):
        config = peft.LoraConfig(r=2, lora_alpha=3 + number, target_modules=["q_proj", "v_proj"])
        if theirs is None:
            theirs = peft.get_peft_model(MODELS["llama"](), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
        for place, ours in adapters_of(net, *methods_named(require_record(net), name)).items():
            layer = theirs.base_model.model.get_submodule(place)
            layer.lora_A[name].weight.data.copy_(ours.a)
            layer.lora_B[name].weight.data.copy_(ours.b)
    return net, theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 1.0, 1.0]])
def test_peft_makes_the_same_of_them(kind, weights, both, monkeypatch):
    net, theirs = both
    draws = torch.Generator().manual_seed(3)  # what peft draws from torch's own generator is given to it
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.rand(p.shape, generator=draws) < p).to(p))
    name = f"{kind}_{len(set(weights))}"
    density = {"density": PEFT[kind]["density"]} if "density" in PEFT[kind] else {}
    theirs.base_model.add_weighted_adapter(list("abc"), weights, name, combination_type=kind, **density)
    lp.combine(net, list("abc"), weights, name, **PEFT[kind])
    for place, found in adapters_of(net, *methods_named(require_record(net), name)).items():
        expected = theirs.base_model.model.get_submodule(place).get_delta_weight(name)
        torch.testing.assert_close(found.delta(), expected, rtol=0, atol=1e-5)  # it works in float32
        assert expected.abs().max() > 1e-3


def test_pefts_other_majority_is_another_rule():
    """peft can elect by the number of signs as well; here, as in the paper, it is always their total."""
    merging = pytest.importorskip("peft.utils.merge_utils")
    x = [torch.tensor([value]) for value in (3.0, -1.0, -1.0)]
    found = combine_tensors(x, [1.0] * 3, "ties", 1.0, torch.Generator())
    ones = torch.ones(3)
    with pytest.warns(UserWarning, match="no pruning"):
        assert torch.equal(found, merging.ties(x, ones, 1.0, "total"))
    with pytest.warns(UserWarning, match="no pruning"):
        assert merging.ties(x, ones, 1.0, "frequency") == -1


KIN = [lp.LoRA(rank=2), lp.LoRA(rank=3, init="pissa"), lp.AdaLoRA(initial_rank=4, target_rank=2), lp.FedPara(rank=2)]


def test_updates_of_every_kind_and_rank_sum_up():
    net, roles = MODELS["gpt2"](), ["attention.query", "attention.value", "feedforward.down"]
    for number, method in enumerate([*KIN, lp.KronA(), lp.LoRA(rank=2)]):
        lp.add_adapter(net, replace(method, targets=roles), f"k{number}")
    stir(net, 8)
    names, weights = [f"k{number}" for number in range(6)], [1.0, -0.5, 2.0, 0.3, 0.1, -1.0]
    lp.combine(net, names, weights, "all", rank=32)
    for place, found in adapters_of(net, *methods_named(require_record(net), "all")).items():
        expected = sum(w * d for w, d in zip(weights, deltas(net, *names, host=place), strict=True))
        np.testing.assert_allclose(found.delta().detach(), expected, atol=1e-5)
    lp.combine(net, ["k0", "k2", "k5"], [1, 1, 1], "low")  # the largest rank
    assert {len(a.a) for a in adapters_of(net, *methods_named(require_record(net), "low")).values()} == {4}
    with pytest.raises(ValueError, match="rank must be given, since not all updates have one"):
        lp.combine(net, ["k0", "k4"], [1, 1], "new")
    with pytest.raises(TypeError, match="KronAUpdate of 'k4' at .* has no factors"):
        lp.combine(net, ["k0", "k4"], [1, 1], "new", of="factors", rank=2)
    with pytest.raises(ValueError, match="rank at .* must be at most 32"):
        lp.combine(net, ["k0", "k4"], [1, 1], "new", rank=33)
    assert not [n for n in net.state_dict() if ".new" in n]


def test_refusals():
    net = model()
    lp.add_adapter(net, lp.IA3())
    lp.add_adapter(net, lp.LoRA(rank=3), "wide")
    lp.add_adapter(net, lp.LoRA(rank=2, targets=["q_proj"]), "elsewhere")
    lp.add_adapter(net, lp.LoRA(rank=2, decompose=True), "dora")
    keys = net.state_dict().keys()
    wrong = {
        "finite": {"weights": [float("nan"), 1]},
        "one number for each": {"weights": [1]},
        "rule must be one of": {"rule": "cat"},
        "share in": {"density": 0},
        "one for all factors": {"names": ["a", "wide"], "of": "factors"},
        "no adapter named 'x'": {"names": ["a", "x"]},
        "lie at the same places": {"names": ["a", "elsewhere"]},
        "Two methods are named 'b'": {"name": "b"},
    }
    for said, changed in wrong.items():
        with pytest.raises(ValueError, match=said):
            lp.combine(net, **{"names": ["a", "b"], "weights": [1, 1], "name": "new"} | changed)
    for other in ("ia3", "dora"):
        with pytest.raises(TypeError, match="is no update W . D of a weight"):
            lp.combine(net, ["a", other], [1, 1], "new")
    assert net.state_dict().keys() == keys


def test_parts_of_fused_layers():
    net = model(base="gpt2")
    lp.combine(net, list("ab"), [1, 2], "sum", rank=4)
    places = adapters_of(net, *methods_named(require_record(net), "sum"))
    assert any(p.endswith(".query") for p in places)
    for place in places:
        a, b, found = deltas(net, "a", "b", "sum", host=place)
        np.testing.assert_allclose(found, a + 2 * b, atol=1e-6)


@pytest.mark.parametrize(
    "layer", [torch.nn.Conv2d(3, 4, 3), torch.nn.Conv1d(4, 6, 2, groups=2), torch.nn.Embedding(9, 4)]
)
def test_convolutions_and_embeddings(layer):
    net = torch.nn.Sequential(layer)
    for name, rank in (("a", 1), ("b", 2)):
        lp.add_adapter(net, lp.LoRA(rank=rank, targets=["0"]), name)
    stir(net, 1)
    lp.combine(net, ["a", "b"], [1, -1], "sum", rank=3)
    lp.combine(net, ["a", "b"], [1, -1], "ties", rank=4, rule="ties")
    a, b, found, elected = deltas(net, "a", "b", "sum", "ties", host="0")
    np.testing.assert_allclose(found, a - b, atol=1e-6)
    np.testing.assert_allclose(elected, ties([a, b], [1, -1], 0.5), atol=1e-6)


def test_names_of_several_methods_or_without_adapters_are_refused():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    lora, fedpara = lp.LoRA(targets=["0"], rank=1), lp.FedPara(targets=["0"], rank=1)
    lp.add_adapter(lp.inject(net, lp.BitFit(targets=["0"])), [lora, fedpara], "pair")
    keys = net.state_dict().keys()
    with pytest.raises(TypeError, match="'bitfit' has no adapters: BitFit adds nothing to a weight"):
        lp.combine(net, ["bitfit"], [1], "new")
    with pytest.raises(TypeError, match="'pair' is LoRA and FedPara under one name"):
        lp.combine(net, ["pair"], [1], "new", rank=2)
    assert net.state_dict().keys() == keys
