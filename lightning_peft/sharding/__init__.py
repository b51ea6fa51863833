"""Models that are spread over processes by Lightning's strategies."""

from .base_weights import without_values
from .fsdp2 import FSDP2Strategy

__all__ = ["FSDP2Strategy", "without_values"]
