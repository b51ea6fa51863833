"""The frozen trunk, which runs before anything that trains, is computed once for each row and skipped from then on."""

from .cache import FrozenCache

__all__ = ["FrozenCache"]
