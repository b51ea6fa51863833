"""Losses over several answers, one of them right: T-Few, https://arxiv.org/abs/2205.05638.

Everywhere, labels (batch, choices, tokens) hold the token ids of each choice, -100 at padding; a choice that is wholly
-100 is absent, so rows may have different numbers of choices. Logits (batch, choices, tokens, vocabulary) predict the
label at their own place. They may be given without the absent choices, too: (present choices, tokens, vocabulary), in
the order of ``labels``. Gold (batch,) is the number of each row's right choice. Computed in float32 or wider;
what does not fit together is a ValueError.
"""

from __future__ import annotations

from torch import Tensor

from .likelihoods import Likelihoods


def language_modeling(logits: Tensor, labels: Tensor, gold: Tensor) -> Tensor:
    """Return L_LM, the batch's mean of -1/T sum_t log p(y_t | x, y_<t) over the T tokens of the right choice.

    Args:
        logits: (batch, choices, tokens, vocabulary); each predicts the label at its own place.
        labels: Token ids (batch, choices, tokens), -100 at padding.
        gold: Number of the right choice of each row (batch,).

    Examples:
        >>> logits, labels = torch.zeros(1, 2, 3, 10), torch.zeros(1, 2, 3, dtype=torch.long)  # 2 choices of 3 tokens
        >>> lp.losses.language_modeling(logits, labels, gold=torch.tensor([0]))  # log 10: all words are as likely
        tensor(2.3026)
    """
    return Likelihoods(logits, labels, gold).language_modeling()


def unlikelihood(logits: Tensor, labels: Tensor, gold: Tensor, epsilon: float = 0.0) -> Tensor:
    """Return L_UL, the batch's mean of -sum_n sum_t log(1 - p(y^n_t | x, y^n_<t)) / sum_n T^n over wrong choices n.

    A row without a wrong choice counts as 0. Without an epsilon, 1 - p is the sum of all other probabilities: the value
    keeps its digits and the gradient stays finite and right where p rounds to 1.

    Args:
        logits: (batch, choices, tokens, vocabulary); each predicts the label at its own place.
        labels: Token ids (batch, choices, tokens), -100 at padding.
        gold: Number of the right choice of each row (batch,).
        epsilon: Added to 1 - p; 0 in the paper, 0.01 in the authors' code.

    Examples:
        >>> logits, labels = torch.zeros(1, 2, 3, 10), torch.zeros(1, 2, 3, dtype=torch.long)
        >>> lp.losses.unlikelihood(logits, labels, gold=torch.tensor([0]))  # -log(1 - 1/10)
        tensor(0.1054)
    """
    return Likelihoods(logits, labels, gold).unlikelihood(epsilon)


def length_normalized(logits: Tensor, labels: Tensor, gold: Tensor) -> Tensor:
    """Return L_LN, the batch's mean cross entropy of the right choice under softmax(beta), beta being ``scores``.

    Args:
        logits: (batch, choices, tokens, vocabulary); each predicts the label at its own place.
        labels: Token ids (batch, choices, tokens), -100 at padding.
        gold: Number of the right choice of each row (batch,).

    Examples:
        >>> logits, labels = torch.zeros(1, 2, 3, 10), torch.zeros(1, 2, 3, dtype=torch.long)
        >>> lp.losses.length_normalized(logits, labels, gold=torch.tensor([0]))  # log 2: both choices are as likely
        tensor(0.6931)
    """
    return Likelihoods(logits, labels, gold).length_normalized()


def scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Return beta (batch, choices), 1/T sum_t log p(y_t | x, y_<t) of each choice; minus infinity where it is absent.

    The largest of a row is the answer: rank classification with length normalization.

    Args:
        logits: (batch, choices, tokens, vocabulary); each predicts the label at its own place.
        labels: Token ids (batch, choices, tokens), -100 at padding; a choice of padding alone is absent.

    Examples:
        >>> logits, labels = torch.zeros(1, 2, 3, 10), torch.tensor([[[4, 2, 0], [7, -100, -100]]])
        >>> lp.losses.scores(logits, labels)  # of a choice of three tokens, and of one of one token
        tensor([[-2.3026, -2.3026]])
    """
    return Likelihoods(logits, labels).scores


def token_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p of each token (batch, choices, tokens), 0 at padding.

    Args:
        logits: (batch, choices, tokens, vocabulary); each predicts the label at its own place.
        labels: Token ids (batch, choices, tokens), -100 at padding; a choice of padding alone is absent.

    Examples:
        >>> logits, labels = torch.zeros(1, 2, 2, 10), torch.tensor([[[4, 2], [7, -100]]])
        >>> lp.losses.token_log_probabilities(logits, labels)
        tensor([[[-2.3026, -2.3026],
                 [-2.3026,  0.0000]]])
    """
    return Likelihoods(logits, labels).log_probabilities
