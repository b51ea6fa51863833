"""Models that are spread over processes by Lightning's strategies."""

from .base_weights import without_values
from .fsdp1 import FSDP1Strategy
from .fsdp2 import FSDP2Strategy
from .lightning_strategies import prepare_strategy, start_evaluation, start_strategy
from .tensor_parallel import parallelize

__all__ = [
    "FSDP1Strategy",
    "FSDP2Strategy",
    "parallelize",
    "prepare_strategy",
    "start_evaluation",
    "start_strategy",
    "without_values",
]
