"""The frozen trunk, which runs before anything that trains, is computed once for each row and skipped from then on."""

from .cached_training import CachedTraining

__all__ = ["CachedTraining"]
