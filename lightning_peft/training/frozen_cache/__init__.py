"""What runs before anything that trains: found in a model, computed once for each row, skipped from then on."""

from .cache import FrozenCache

__all__ = ["FrozenCache"]
