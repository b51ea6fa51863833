"""Training resumes exactly: the same rows, the same random numbers, the same weights, wherever it stopped."""

from .exact_resume import ExactResume

__all__ = ["ExactResume"]
