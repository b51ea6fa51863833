"""Models that are spread over processes by Lightning's strategies."""

from .fsdp1 import FSDP1Strategy
from .fsdp2 import FSDP2Strategy

__all__ = ["FSDP1Strategy", "FSDP2Strategy"]
