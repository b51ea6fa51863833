"""Models that are spread over processes by Lightning's strategies."""

from .base_weights import without_values
from .fsdp2 import FSDP2Strategy
from .tensor_parallel import parallelize

__all__ = ["FSDP2Strategy", "parallelize", "without_values"]
