"""Parameter-efficient fine-tuning of any PyTorch model, as one Lightning callback."""

from importlib.metadata import version

from .adapter import Adapter, WeightUpdate
from .checkpoint import full_state_dict, global_state, local_state
from .files import load_adapter, save_adapter
from .finalizing import finalize
from .inject import adapters, detach, inject
from .merging import merge
from .method import Method
from .methods import (
    IA3,
    AdaLoRA,
    BitFit,
    Bottleneck,
    FedPara,
    FullFineTuning,
    KronA,
    KronABlock,
    LastLayers,
    LLaMAAdapter,
    LoRA,
    OutputLayers,
    ParallelAdapter,
    PromptTuning,
)
from .quantization import dequantize, quantize
from .restoring import load_from_checkpoint
from .strategy import PEFTStrategy
from .summary import summary

__version__ = version("lightning-peft")

__all__ = [
    "AdaLoRA",
    "Adapter",
    "BitFit",
    "Bottleneck",
    "FedPara",
    "FullFineTuning",
    "IA3",
    "KronA",
    "KronABlock",
    "LLaMAAdapter",
    "LastLayers",
    "LoRA",
    "Method",
    "OutputLayers",
    "PEFTStrategy",
    "ParallelAdapter",
    "PromptTuning",
    "WeightUpdate",
    "adapters",
    "dequantize",
    "detach",
    "finalize",
    "full_state_dict",
    "global_state",
    "inject",
    "load_adapter",
    "load_from_checkpoint",
    "local_state",
    "merge",
    "quantize",
    "save_adapter",
    "summary",
]
