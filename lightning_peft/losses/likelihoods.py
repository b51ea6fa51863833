"""``Likelihoods``: the log-probabilities of several answers, from which the losses of ``choices.py`` are computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..ops.value_checks import is_true
from .answer_tokens import log_rest
from .choice_checks import PADDING, check_gold, check_labels
from .places import Places


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """What all the losses need, computed once: the log-probability of each token of each choice.

    Args:
        logits: Those of the choices, as in ``choices.py``; None where ``tokens`` are given.
        labels: Token ids.
        gold: Right choices; ``scores`` alone do without.
        tokens: In place of logits, log p and log(1 - p) of all tokens of the labels that are no padding, in order
            (tokens, 2); or log p alone (tokens, 1), with which ``unlikelihood`` needs an epsilon.

    Examples:
        >>> logits, labels = torch.zeros(1, 2, 3, 10), torch.zeros(1, 2, 3, dtype=torch.long)
        >>> shared = lp.losses.Likelihoods(logits, labels, gold=torch.tensor([0]))  # for several losses of one batch
        >>> shared.language_modeling() + shared.length_normalized()
        tensor(2.9957)
    """

    logits: Tensor | None
    labels: Tensor
    gold: Tensor | None = None
    tokens: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.logits is None) == (self.tokens is None):
            raise ValueError("Got logits and tokens, or neither; expected one of the two.")
        if self.logits is not None:
            self._check_logits(self.logits)
        if self.gold is not None:
            check_gold(self.gold, self.present)

    def _check_logits(self, logits: Tensor) -> None:
        check_labels(logits, self.labels)
        shape, choices = self.labels.shape, self.present.sum()
        if logits.shape[:-1] == shape:
            return
        given = f"Got logits {tuple(logits.shape)} with labels {tuple(shape)}, expected logits"
        is_packed = logits.dim() == 3 and logits.shape[1] == shape[2]
        if not is_packed or not is_true(choices == len(logits), f"{given} of the choices that are present."):
            packed = (int(choices), shape[2], "vocabulary")
            raise ValueError(f"{given} {(*shape, 'vocabulary')}, or {packed} without the absent choices.")

    @cached_property
    def present(self) -> Tensor:
        """Which choices there are (batch, choices)."""
        return (self.labels != PADDING).any(-1)

    @cached_property
    def log_probabilities(self) -> Tensor:
        """The log-probability of each token (batch, choices, tokens), 0 at padding."""
        if self.tokens is not None:
            return self._spread(self.tokens[:, 0])
        return self._spread(-cross_entropy(*self._rows, reduction="none"))

    @cached_property
    def scores(self) -> Tensor:
        """Mean log-probability of each choice (batch, choices); minus infinity where it is absent."""
        count = (self.labels != PADDING).sum(-1).clamp(min=1)
        return (self.log_probabilities.sum(-1) / count).masked_fill(~self.present, -torch.inf)

    def language_modeling(self) -> Tensor:
        """Return L_LM."""
        return -self.scores.gather(1, self._gold[:, None]).mean()

    def length_normalized(self) -> Tensor:
        """Return L_LN."""
        return cross_entropy(self.scores, self._gold)

    def unlikelihood(self, epsilon: float = 0.0) -> Tensor:
        """Return L_UL with 1 - p + epsilon inside the logarithm."""
        if not epsilon >= 0:
            raise ValueError(f"Got epsilon={epsilon}, expected 0 (as in the paper) or above, such as 0.01.")
        wrong = self.labels != PADDING
        wrong = wrong.scatter(1, self._gold[:, None, None].expand(-1, 1, wrong.shape[2]), False)
        if epsilon > 0:
            rest = torch.log(epsilon - torch.expm1(self.log_probabilities))
        else:
            rest = self._spread(log_rest(*self._rows) if self.tokens is None else self.tokens[:, 1])
        total = rest.masked_fill(~wrong, 0.0).sum((1, 2))
        return -(total / wrong.sum((1, 2)).clamp(min=1)).mean()

    @property
    def _gold(self) -> Tensor:
        if self.gold is None:
            raise ValueError("Got gold=None, expected the number of each row's right choice.")
        return self.gold

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """Logits (tokens, vocabulary) in a wide type and the tokens of the labels that are no padding."""
        logits, labels = cast(Tensor, self.logits), self.labels.flatten(0, 1)
        places = Places.of(labels != PADDING)
        rows = logits.flatten(0, -2)
        if logits.dim() == 4:
            here = rows.index_select(0, places.numbers)
        else:  # choices that are absent have no logits
            place = self.present.flatten().cumsum(0)[places.numbers // labels.shape[1]] - 1
            here = rows.index_select(0, place * labels.shape[1] + places.numbers % labels.shape[1])
        return here.to(torch.promote_types(here.dtype, torch.float32)), places.take(labels)

    def _spread(self, values: Tensor) -> Tensor:
        """Return a value of each token as (batch, choices, tokens), 0 at padding."""
        known = (self.labels != PADDING).flatten()
        padded = torch.cat([values.new_zeros(1), values])  # where padding takes its value; no mask has to be read
        return padded.index_select(0, known.cumsum(0) * known).view(self.labels.shape)
