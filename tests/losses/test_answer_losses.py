"""T-Few's losses against their formulas, written afresh with loops in float64."""

import math

import pytest
import torch

import lightning_peft as lp
from lightning_peft.losses import Likelihoods

ROWS, CHOICES, TOKENS, WORDS = 4, 3, 5, 11


def case(dtype=torch.float64, seed=0):
    """Choices of 1 to 5 tokens, padded on either side or inside; row 2 has two choices, row 3 the right one alone."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(ROWS, CHOICES, TOKENS, WORDS, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, WORDS, (ROWS, CHOICES, TOKENS), generator=generator)
    labels[0, 0, 2:], labels[0, 1, :3], labels[1, 2, 1::2] = -100, -100, -100
    labels[2, 1], labels[3, 0], labels[3, 1] = -100, -100, -100
    return logits.to(dtype).requires_grad_(), labels, torch.tensor([0, 2, 2, 2])


def by_hand(logits, labels, gold, epsilon=0.0):
    """Return L_LM, L_UL and L_LN."""
    lm, ul, ln = [], [], []
    for row in range(len(labels)):
        betas, wrong, right = {}, [], []
        for choice in range(labels.shape[1]):
            terms = []
            for place, word in enumerate(labels[row, choice].tolist()):
                if word != -100:
                    exponentials = logits[row, choice, place].double().exp()
                    terms.append(exponentials[word] / exponentials.sum())
            if terms:
                betas[choice] = sum(p.log() for p in terms) / len(terms)
                right, wrong = (terms, wrong) if choice == gold[row] else (right, wrong + terms)
        lm.append(-sum(p.log() for p in right) / len(right))
        ul.append(-sum((1 - p + epsilon).log() for p in wrong) / len(wrong) if wrong else torch.zeros(()).double())
        ln.append(-(betas[int(gold[row])].exp() / sum(b.exp() for b in betas.values())).log())
    return tuple(sum(terms) / len(terms) for terms in (lm, ul, ln))


def ours(logits, labels, gold, epsilon=0.0):
    last = lp.losses.unlikelihood(logits, labels, gold, epsilon=epsilon)
    return lp.losses.language_modeling(logits, labels, gold), last, lp.losses.length_normalized(logits, labels, gold)


@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_values_and_gradients_are_the_papers(epsilon):
    logits, labels, gold = case()
    for found, wanted in zip(ours(logits, labels, gold, epsilon), by_hand(logits, labels, gold, epsilon), strict=True):
        assert found.item() == pytest.approx(wanted.item(), abs=1e-12)
        gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, wanted)]
        assert gradients[1].abs().max() > 1e-3
        assert torch.allclose(*gradients, atol=1e-12)


def test_scores_are_mean_log_probabilities_and_absent_choices_never_win():
    logits, labels, _ = case()
    scores, tokens = lp.losses.scores(logits, labels), lp.losses.token_log_probabilities(logits, labels)
    p = logits.softmax(-1)
    assert scores[0, 0].item() == pytest.approx(
        sum(math.log(p[0, 0, t, labels[0, 0, t]].item()) for t in (0, 1)) / 2, abs=1e-12
    )
    assert scores.isinf().tolist() == [[False] * 3, [False] * 3, [False, True, False], [True, True, False]]
    assert tokens.shape == labels.shape
    assert (tokens[labels == -100] == 0).all()
    assert torch.allclose(
        tokens[labels != -100], p.log().gather(-1, labels.clamp(0)[..., None])[..., 0][labels != -100]
    )


def test_logits_may_leave_out_absent_choices():
    logits, labels, gold = case()
    packed = logits[(labels != -100).any(-1)]
    assert packed.shape == (9, TOKENS, WORDS)
    for a, b in zip(ours(packed, labels, gold), ours(logits, labels, gold), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logits_are_computed_in_float32(dtype):
    logits, labels, gold = case(dtype)
    for found, wanted in zip(ours(logits, labels, gold), by_hand(logits.double(), labels, gold), strict=True):
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(wanted.item(), abs=1e-6)
        found.backward()
        assert logits.grad.dtype == dtype


@pytest.mark.parametrize("height", [20.0, 60.0, 1e4])
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_a_certain_wrong_token_keeps_value_and_gradient(height, epsilon):
    """p rounds to 1: without an epsilon, the loss is the height less log 2, and its gradient that of a plain logit."""
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 1, 0, 0] = height
    logits.requires_grad_()
    labels, gold = torch.tensor([[[1], [0]]]), torch.tensor([0])
    loss = lp.losses.unlikelihood(logits, labels, gold, epsilon)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(0.01) if epsilon else height - math.log(2), rel=1e-5)
    wanted = torch.zeros(3) if epsilon else torch.tensor([1.0, -0.5, -0.5])
    assert torch.allclose(logits.grad[0, 1, 0], wanted, atol=1e-5)
    assert not logits.grad[0, 0].any()


def test_impossible_tokens_give_finite_losses_to_the_others():
    """p of a wrong token is 0: nothing to learn there."""
    logits, labels, gold = case(torch.float32)
    far = logits.detach().clone()
    far[0, 1, 4, labels[0, 1, 4]] = -1e5
    far.requires_grad_()
    loss = lp.losses.unlikelihood(far, labels, gold)
    loss.backward()
    assert loss.isfinite()
    assert far.grad.isfinite().all()
    assert far.grad[0, 1, 4].abs().max() < 1e-6


def test_a_single_choice_teaches_language_alone():
    logits, labels = torch.randn(1, 1, 2, 5, requires_grad=True), torch.tensor([[[3, 4]]])
    lm, ul, ln = ours(logits, labels, torch.tensor([0]))
    assert ul == 0
    assert ln == 0
    (lm + ul + ln).backward()
    assert lm > 0
    assert logits.grad.isfinite().all()


def test_the_log_probabilities_are_computed_once(monkeypatch):
    from lightning_peft.losses import likelihoods as losses

    calls, own = [], losses.cross_entropy
    monkeypatch.setattr(losses, "cross_entropy", lambda *args, **kw: calls.append(args[0].dim()) or own(*args, **kw))
    found = Likelihoods(*case())
    _ = found.language_modeling() + found.unlikelihood(0.01) + found.length_normalized() + found.scores.sum()
    assert len(calls) == 2  # over the vocabulary, and over the choices


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logits": torch.zeros(4, 3, 6, 11)},
            r"logits \(4, 3, 6, 11\) .* labels \(4, 3, 5\), .*\(9, 5, 'voc",
        ),
        ({"logits": torch.zeros(8, 5, 11)}, r"without the absent choices"),
        ({"logits": torch.zeros(4, 11)}, r"expected logits \(batch, choices, tokens, vocabulary\)"),
        ({"labels": torch.zeros(4, 3, 5)}, "whole numbers as labels"),
        ({"labels": torch.full((4, 3, 5), 11)}, "label 11, expected a token from 0 to 10, or -100"),
        ({"labels": torch.full((4, 3, 5), -1)}, "label -1, expected a token"),
        ({"gold": torch.tensor([0, 2, 2])}, r"gold \(3,\), expected torch.int64 of shape \(4,\)"),
        ({"gold": torch.zeros(4)}, "torch.float32 gold"),
        ({"gold": torch.tensor([0, 3, 2, 2])}, "gold=3, expected the number of a choice from 0 to 2"),
        ({"gold": torch.tensor([0, -1, 2, 2])}, "gold=-1"),
        ({"gold": torch.tensor([0, 2, 1, 2])}, "Row 2 has gold=1, but that choice is absent"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = dict(zip(("logits", "labels", "gold"), case(), strict=True)) | change
    for loss in (lp.losses.language_modeling, lp.losses.unlikelihood, lp.losses.length_normalized):
        with pytest.raises(ValueError, match=message):
            loss(**given)


def test_settings_and_gold_are_needed():
    logits, labels, gold = case()
    with pytest.raises(ValueError, match="epsilon=-1, expected 0"):
        lp.losses.unlikelihood(logits, labels, gold, -1)
    with pytest.raises(ValueError, match="gold=None"):
        Likelihoods(logits, labels).length_normalized()
