"""Models that are spread over processes by Lightning's strategies."""

from .fsdp2 import FSDP2Strategy

__all__ = ["FSDP2Strategy"]
