"""Losses of language models: of the next token, and over several answers, one of them right (T-Few)."""

from .choice_checks import PADDING
from .choices import language_modeling, length_normalized, scores, token_log_probabilities, unlikelihood
from .likelihoods import Likelihoods
from .next_token_loss import next_token

__all__ = [
    "PADDING",
    "Likelihoods",
    "language_modeling",
    "length_normalized",
    "next_token",
    "scores",
    "token_log_probabilities",
    "unlikelihood",
]
