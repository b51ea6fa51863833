"""``next_token`` has the value and the gradients of all logits, whatever makes the logits and whatever trains."""

import copy
import functools

import pytest
import torch
from adapter_edits import stir
from decoders import DECODERS, batch, decoder, difference, full, gradients
from models import MODELS

import lightning_peft as lp
from lightning_peft.losses import head_inputs

next_token = lp.losses.next_token
TRAINED = {
    "everything": lambda net: net,
    "nothing near the head": lambda net: lp.inject(
        net, lp.LoRA(rank=2, targets=["attention.query", "attention.value"])
    ),
    "the head": lambda net: lp.inject(net, [lp.LoRA(rank=2), lp.OutputLayers()]),
    "LoRA on the head": lambda net: lp.inject(net, lp.LoRA(rank=2, targets=["*q_proj", "lm_head"])),
    "prompts": lambda net: lp.inject(net, lp.PromptTuning(length=3)),
    "prefixes": lambda net: lp.inject(net, lp.PrefixTuning(length=3)),
    "a bias of the head": lambda net: lp.inject(net, lp.BitFit(add_missing=True)),
    "tokens": lambda net: lp.inject(net, [lp.LoRA(rank=2), lp.TrainableTokens(tokens=[3, 7])]),
}
ON_ALL = ("everything", "nothing near the head", "prompts")
PAIRS = [(name, trained) for name in DECODERS for trained in TRAINED if name == "llama" or trained in ON_ALL]
PAIRS += [("tied llama", "tokens"), ("gemma2 with a softcap", "LoRA on the head"), ("granite with a scale", "the head")]


def trained(name, what):
    net = TRAINED[what](decoder(name))
    if what != "everything":
        stir(net, 1)
    return net


@pytest.fixture
def seen(monkeypatch):
    """What each call found: a head that is called in chunks, or logits."""
    calls, own = [], head_inputs.HeadInputs
    monkeypatch.setattr(head_inputs, "HeadInputs", lambda *args: calls.append(own(*args)) or calls[-1])
    return calls


@pytest.mark.parametrize(("name", "what"), PAIRS)
def test_value_and_gradients_are_those_of_all_logits(name, what, seen):
    net, given = trained(name, what).double(), batch()
    wanted = full(net, given)
    expected = gradients(wanted, net)
    for reduction in ("mean", "sum", "none"):
        loss = next_token(net, given, reduction=reduction, chunk=2).sum() / (1 if reduction == "mean" else 9)
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-12)
        assert difference(gradients(loss, net), expected) < 1e-12
    assert [found.head is None for found in seen] == [False] * 3
    changes = name in ("gemma2 with a softcap", "granite with a scale")
    assert [found.finish is not None for found in seen] == [changes] * 3


@pytest.mark.parametrize("name", ["llama", "gemma2 with a softcap"])
@pytest.mark.parametrize("what", ["nothing near the head", "LoRA on the head"])
def test_in_mixed_precision_gradients_differ_by_rounding_alone(name, what):
    net, given = trained(name, what), batch()
    expected = gradients(full(net.double(), given), net)
    net.float()
    with torch.autocast("cpu", torch.bfloat16):
        losses = full(net, given), next_token(net, given, chunk=2)
    errors = [difference(gradients(loss, net), expected) for loss in losses]
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-2)
    assert 1e-4 < errors[1] < 1.5 * errors[0]


def test_in_float16_gradients_keep_the_digits_that_the_scale_of_the_loss_saves():
    net, given = trained("llama", "nothing near the head"), batch()
    expected = gradients(full(net, given), net)
    net.lm_head.weight.data[given["labels"].unique()[1:]] *= 1e-4  # so that their gradients are tiny
    expected = gradients(full(net, given), net)
    with torch.autocast("cpu", torch.float16):
        losses = full(net, given), next_token(net, given, chunk=2)
    scaled = [{name: g / 2**12 for name, g in gradients(loss * 2**12, net).items()} for loss in losses]
    errors = [difference(each, expected) for each in scaled]
    assert 0 < errors[1] <= 1.1 * errors[0] < 5e-3 * max(g.abs().max() for g in expected.values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_changes_nothing(reentrant):
    net, given = trained("llama", "LoRA on the head").double(), batch()
    expected = gradients(full(net, given), net)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    net.enable_input_require_grads()
    next_token(net, given, chunk=2).backward()
    assert difference({name: p.grad for name, p in net.named_parameters() if p.requires_grad}, expected) < 1e-12


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_labels_of_a_model_with_an_encoder_are_not_shifted(name, seen):
    net, given = MODELS[name]().double(), batch()
    if name == "bart":
        net.final_logits_bias.normal_()
    given["labels"][0, 0] = 5
    wanted = net(**given).loss
    loss = next_token(net, given, chunk=2)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-12)
    assert difference(gradients(loss, net), gradients(wanted, net)) < 1e-12
    losses = next_token(net, given, reduction="none", chunk=2)
    assert ((losses > 0) == (given["labels"] != -100)).all()
    assert [found.head is None for found in seen] == [False] * 2


@pytest.mark.parametrize("left", [False, True])
def test_losses_of_each_token_stand_at_its_label(left):
    net, given = decoder("llama").eval(), batch(left)
    with torch.inference_mode():
        logits = net(given["input_ids"], attention_mask=given["attention_mask"]).logits[:, :-1].log_softmax(-1)
        losses = next_token(net, given, reduction="none", chunk=2)
    expected = -logits.gather(2, given["labels"][:, 1:].clamp(0)[..., None])[..., 0]
    counts = given["labels"][:, 1:] != -100
    torch.testing.assert_close(losses[:, 1:], expected * counts)
    assert not losses[:, 0].any()


@pytest.mark.parametrize("what", TRAINED)
def test_without_labels_loss_and_gradients_are_zero(what):
    net, given = trained("llama", what), batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    loss = next_token(net, given)
    assert loss == 0
    found = gradients(loss, net)
    assert found
    assert all(not g.any() for g in found.values())
    assert next_token(net, given, reduction="sum") == 0
    assert not next_token(net, given, reduction="none").any()


def test_the_gradient_can_be_asked_for_twice():
    net, given = trained("llama", "nothing near the head"), batch()
    for reduction in ("mean", "none"):
        loss = next_token(net, given, reduction=reduction).sum()
        first, second = (torch.autograd.grad(loss, net.model.layers[0].self_attn.q_proj.peft.parameters(), **k)
                         for k in ({"retain_graph": True}, {}))  # fmt: skip
        assert all(a.any() for a in first[1:])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_quantized_head_and_copies_of_a_model_are_called_as_they_are():
    net, given = decoder("llama"), batch()
    lp.quantize(net, "int8", targets=["lm_head", "q_proj"])
    lp.inject(net, lp.LoRA(rank=2))
    stir(net, 1)
    expected = gradients(full(net, given), net)
    for each in (net, copy.deepcopy(net)):
        assert difference(gradients(next_token(each, given, chunk=2), each), expected) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, r"Got labels None, expected a label for each token \(3, 8\), -100"),
        ({"labels": torch.zeros(3, 7, dtype=torch.long)}, r"Got labels \(3, 7\), expected .* \(3, 8\)"),
        ({"reduction": "max"}, "Got reduction='max', expected 'mean'"),
        ({"chunk": 0}, "Got chunk=0, expected a number of places"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = batch() | {key: value for key, value in change.items() if key == "labels"}
    settings = {key: value for key, value in change.items() if key != "labels"}
    with pytest.raises(ValueError, match=message):
        next_token(functools.partial(decoder, "llama")(), given, **settings)
