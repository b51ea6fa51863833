"""Models that Lightning's strategies spread over processes: DDP, DeepSpeed, FSDP and tensor parallelism."""

from .base_weights import without_values
from .fsdp1 import FSDP1Strategy
from .fsdp2 import FSDP2Strategy
from .tensor_parallel import parallelize

__all__ = ["FSDP1Strategy", "FSDP2Strategy", "parallelize", "without_values"]
