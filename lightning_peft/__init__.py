"""Parameter-efficient fine-tuning of any PyTorch model, as one Lightning callback."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

from . import losses
from .analysis.inspect import compare_adapters, inspect_adapter
from .analysis.targets import targets
from .checkpoints.adapter_state import full_state_dict, global_state, local_state
from .checkpoints.save_load import load_adapter, save_adapter
from .composition.combine import combine
from .composition.ensemble import ensemble, join_prompts, majority_vote
from .composition.merge import merge, merged, unmerge
from .composition.merge_files import merge_files
from .composition.named_adapters import add_adapter
from .composition.row_adapters import row_adapters
from .core.active_adapters import activate, active, disabled, remove_adapter
from .core.adapted_module import adapters
from .core.adapter import Adapter
from .core.finalize import finalize
from .core.inject import detach, inject
from .core.method import Method
from .core.weight_update import WeightUpdate
from .interop import export_peft, import_loralib, import_peft, import_t_few, push_adapter, vllm_problems
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
    MultitaskPromptTuning,
    OutputLayers,
    OwnParameters,
    ParallelAdapter,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    TrainableTokens,
)
from .methods.families.vocabulary import add_tokens
from .methods.prompting.row_tasks import row_tasks
from .methods.prompting.template import Template
from .quantization.quantize import dequantize, quantize
from .summary import summary
from .training.callback import PEFTStrategy
from .training.distributed import FSDP1Strategy, FSDP2Strategy, without_values
from .training.lightning_checkpoint import load_from_checkpoint
from .training.prediction_writer import PredictionWriter

if TYPE_CHECKING:
    from . import plots

__version__ = version("lightning-peft")

__all__ = [
    "AdaLoRA",
    "Adapter",
    "BitFit",
    "Bottleneck",
    "FSDP1Strategy",
    "FSDP2Strategy",
    "FedPara",
    "FullFineTuning",
    "IA3",
    "KronA",
    "KronABlock",
    "LLaMAAdapter",
    "LastLayers",
    "LoRA",
    "Method",
    "MultitaskPromptTuning",
    "OutputLayers",
    "OwnParameters",
    "PEFTStrategy",
    "PTuning",
    "PTuningV2",
    "ParallelAdapter",
    "PredictionWriter",
    "PrefixTuning",
    "PromptTuning",
    "Template",
    "TrainableTokens",
    "WeightUpdate",
    "activate",
    "active",
    "adapters",
    "add_adapter",
    "add_tokens",
    "combine",
    "compare_adapters",
    "dequantize",
    "detach",
    "disabled",
    "ensemble",
    "export_peft",
    "finalize",
    "full_state_dict",
    "global_state",
    "import_loralib",
    "import_peft",
    "import_t_few",
    "inject",
    "inspect_adapter",
    "join_prompts",
    "load_adapter",
    "load_from_checkpoint",
    "local_state",
    "losses",
    "majority_vote",
    "merge",
    "merge_files",
    "merged",
    "plots",
    "push_adapter",
    "quantize",
    "remove_adapter",
    "row_adapters",
    "row_tasks",
    "save_adapter",
    "summary",
    "targets",
    "unmerge",
    "vllm_problems",
    "without_values",
]


def __getattr__(name: str) -> object:
    """Import ``plots`` where it is first asked for: who only trains draws nothing."""
    if name == "plots":
        return importlib.import_module(".plots", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
