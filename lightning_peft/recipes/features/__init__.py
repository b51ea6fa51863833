"""Feature-based training: outputs of a frozen model are computed once and cached, a classifier is fitted to them."""

from .dataset_rows import Rows, rows_of
from .extraction import Features, extract
from .fitting import features

__all__ = ["Features", "Rows", "extract", "features", "rows_of"]
