"""Models that are spread over processes by Lightning's strategies."""

from .deepspeed import prepare_strategy, start_strategy
from .fsdp1 import FSDP1Strategy
from .fsdp2 import FSDP2Strategy

__all__ = ["FSDP1Strategy", "FSDP2Strategy", "prepare_strategy", "start_strategy"]
