"""Parameter-efficient fine-tuning of any PyTorch model, as one Lightning callback."""

from importlib.metadata import version

from .adapter import Adapter, WeightUpdate
from .checkpoint import full_state_dict
from .files import load_adapter, save_adapter
from .inject import adapters, detach, inject, merge
from .method import Method
from .methods import (
    AdaLoRA,
    BitFit,
    FullFineTuning,
    KronA,
    KronABlock,
    LastLayers,
    LLaMAAdapter,
    LoRA,
    OutputLayers,
    PromptTuning,
)
from .restoring import load_from_checkpoint
from .strategy import PEFTStrategy
from .summary import summary

__version__ = version("lightning-peft")

__all__ = [
    "AdaLoRA",
    "Adapter",
    "BitFit",
    "FullFineTuning",
    "KronA",
    "KronABlock",
    "LLaMAAdapter",
    "LastLayers",
    "LoRA",
    "Method",
    "OutputLayers",
    "PEFTStrategy",
    "PromptTuning",
    "WeightUpdate",
    "adapters",
    "detach",
    "full_state_dict",
    "inject",
    "load_adapter",
    "load_from_checkpoint",
    "merge",
    "save_adapter",
    "summary",
]
