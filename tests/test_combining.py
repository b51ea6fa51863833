"""Combined adapters: formulas written afresh in float64, and what peft makes of the same factors."""

import importlib.util

import numpy as np
import pytest
import torch
from models import MODELS, logits, tokens
from test_switching import stir

import lightning_peft as lp
from lightning_peft.inject import adapters_of, injected, named

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
    return [adapters_of(net, *named(injected(net), name))[host].delta().detach().double().numpy() for name in names]


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
    found = [adapters_of(net, *named(injected(net), name))[HOST] for name in (*"abc", "parts")]
    scales = [w * (3 + n) / 2 for n, w in enumerate(WEIGHTS)]
    for factor, signs in (("a", np.sign(scales)), ("b", np.ones(3))):
        tensors = [getattr(one, factor).detach().double().numpy() for one in found]
        expected = ties(tensors[:3], signs * np.sqrt(np.abs(scales)), 0.5)
        np.testing.assert_allclose(tensors[3], expected, atol=1e-6)


def test_dare_keeps_a_share_and_its_mean():
    from lightning_peft.combining import combined

    x = [torch.full((100, 200), value, dtype=torch.float64) for value in (1.0, 2.0)]
    generator = torch.Generator().manual_seed(0)
    found = combined(x, [1.0, 0.5], "dare_linear", 0.25, generator)
    assert set(found.unique().tolist()) == {0, 4, 8}  # none, one (both give 4), both
    assert abs(found.mean() - 2) < 0.05
    found = combined(x, [1.0, 0.5], "dare_ties", 0.25, generator)
    assert set(found.unique().tolist()) == {0, 4}
    assert torch.equal(combined(x, [1.0, 0.5], "dare_linear", 1.0, generator), torch.full((100, 200), 2.0).double())
    nets = [lp.combine(model(), list("ab"), [1, 1], "d", rule="dare_ties", seed=seed) for seed in (1, 1, 2)]
    one, same, other = (deltas(net, "d")[0] for net in nets)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore")
def test_peft_makes_the_same_of_them():
    import peft

    net, names = model(), list("abc")
    theirs = None
    for number, name in enumerate(names):
        config = peft.LoraConfig(r=2, lora_alpha=3 + number, target_modules=["q_proj", "v_proj"])
        if theirs is None:
            theirs = peft.get_peft_model(MODELS["llama"](), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
        for place, ours in adapters_of(net, *named(injected(net), name)).items():
            layer = theirs.base_model.model.get_submodule(place)
            layer.lora_A[name].weight.data.copy_(ours.a)
            layer.lora_B[name].weight.data.copy_(ours.b)
    pairs = [("svd", {}), ("linear", {"of": "factors"}), ("ties", {"of": "factors", "rule": "ties", "density": 0.5})]
    pairs += [("ties_svd", {"rule": "ties", "density": 0.5})]
    for kind, settings in pairs:
        density = {"density": settings["density"]} if "density" in settings else {}
        theirs.base_model.add_weighted_adapter(names, WEIGHTS, kind, combination_type=kind, **density)
        lp.combine(net, names, WEIGHTS, kind, **settings)
        layer = theirs.base_model.model.get_submodule(HOST)
        expected = layer.get_delta_weight(kind).detach().double().numpy()
        np.testing.assert_allclose(deltas(net, kind)[0], expected, atol=2e-6, err_msg=kind)


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
        with pytest.raises(TypeError, match="it has no factors"):
            lp.combine(net, ["a", other], [1, 1], "new")
    assert net.state_dict().keys() == keys


def test_parts_of_fused_layers_and_convolutions():
    net = model(base="gpt2")
    lp.combine(net, list("ab"), [1, 2], "sum", rank=4)
    places = adapters_of(net, *named(injected(net), "sum"))
    assert any(p.endswith(".query") for p in places)
    for place in places:
        a, b, found = deltas(net, "a", "b", "sum", host=place)
        np.testing.assert_allclose(found, a + 2 * b, atol=1e-6)
    image = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    for name in "ab":
        lp.add_adapter(image, lp.LoRA(rank=1, targets=["0"]), name)
    stir(image, 1)
    lp.combine(image, ["a", "b"], [1, -1], "sum", rank=2)
    a, b, found = deltas(image, "a", "b", "sum", host="0")
    np.testing.assert_allclose(found, a - b, atol=1e-6)
    assert found.shape == (4, 3, 3, 3)
