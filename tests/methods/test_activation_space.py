"""What holds for all methods on activations: what is packed, quantized or refused; and MAM, which is two of them."""

import pytest
import torch
from families_of_models import disturb, trained
from models import MODELS, logits, tokens

import lightning_peft as lp


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method",
    [lp.IA3(), lp.Bottleneck(size=4), lp.ParallelAdapter(size=4), lp.IA3(targets=["linear1"])],
    ids=["ia3", "bottleneck", "parallel", "ia3, outputs"],
)
def test_rows_that_torch_packs_are_changed_too(method, dtype):
    model = disturb(lp.inject(MODELS["encoder"](), method), 0.1).to(dtype)
    inputs = MODELS["encoder"].inputs("right")
    with torch.no_grad():
        packed, padded = model(**inputs), model.train()(**inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * padded.abs().max()
    torch.testing.assert_close(packed[:, :7], padded[:, :7], atol=tolerance, rtol=tolerance)


REFUSED = {
    "no linear layer": (lambda: lp.Bottleneck(targets=["dropout"]), ValueError, "dropout .* holds no linear layer"),
    "no block": (lambda: lp.ParallelAdapter(targets=["word_embeddings"]), ValueError, "holds no linear layers"),
    "size": (lambda: lp.Bottleneck(size=0), ValueError, "size must be a positive whole number, got 0"),
    "activation": (lambda: lp.ParallelAdapter(activation="tanh"), ValueError, "one of gelu, relu, swish, got 'tanh'"),
    "std": (lambda: lp.Bottleneck(std=-1.0), ValueError, "std must be 0 or more"),
    "scale": (lambda: lp.ParallelAdapter(scale=0.0), ValueError, "scale must be a factor other than 0"),
    "dropout": (lambda: lp.ParallelAdapter(dropout=1.0), ValueError, "dropout must be from 0"),
    "both": (lambda: lp.IA3(targets=["output.dense"]), ValueError, "in one of both lists of targets"),
    "embedding": (lambda: lp.IA3(targets=["word_embeddings"]), ValueError, "must be a layer of features"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name):
    make, kind, said = REFUSED[name]
    with pytest.raises(kind, match=said):
        lp.inject(MODELS["bert"](), make())


@pytest.mark.parametrize(
    "method",
    [lp.IA3(), lp.Bottleneck(size=4), lp.ParallelAdapter(size=4), lp.LLaMAAdapter(layers=2, bias_and_scale=True)],
    ids=lambda method: type(method).__name__,
)
def test_quantized_hosts_are_served(method):
    """What comes out is what adapters of these values do on the dequantized base."""
    results = []
    for dequantized in (False, True):
        model = lp.quantize(MODELS["bert"](), "int8")
        if dequantized:
            lp.dequantize(model)
        disturb(lp.inject(model, method), 0.2)
        if results:
            given = [p for n, p in results[0][0].named_parameters() if ".peft." in n]
            with torch.no_grad():
                for own, other in zip((p for n, p in model.named_parameters() if ".peft." in n), given, strict=True):
                    own.copy_(other)
        results.append((model, logits(model(tokens())), {n: p for n, p in trained(model).items() if ".peft." in n}))
    (_, y, found), (_, z, wanted) = results
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)
    pairs = [torch.autograd.grad(t.square().mean(), list(p.values())) for t, p in ((y, found), (z, wanted))]
    torch.testing.assert_close(*pairs, atol=1e-5, rtol=1e-4)


def test_mam_is_a_prefix_and_a_parallel_adapter():
    model = lp.inject(MODELS["bart"](), [lp.PrefixTuning(length=3), lp.ParallelAdapter(size=6)])
    logits(model(**MODELS["bart"].inputs())).square().sum().backward()
    assert all(p.grad is not None for p in trained(model).values())
