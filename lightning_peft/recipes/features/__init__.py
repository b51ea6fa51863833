"""Feature-based training: what a frozen model returns, computed once and kept, and a classifier on it."""

from .dataset_rows import Rows, rows_of
from .extraction import Features, extract
from .fitting import features

__all__ = ["Features", "Rows", "extract", "features", "rows_of"]
