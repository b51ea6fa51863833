"""Parameter-efficient fine-tuning of any PyTorch model, as one Lightning callback."""

from importlib.metadata import version

from . import losses, plots
from .adapter import Adapter, WeightUpdate
from .checkpoint import full_state_dict, global_state, local_state
from .combining import combine
from .ensembles import ensemble, join_prompts, majority_vote
from .files import load_adapter, save_adapter
from .finalizing import finalize
from .hosts import adapters
from .inject import detach, inject
from .inspecting import compare_adapters, inspect_adapter
from .interop import export_peft, import_loralib, import_peft, import_t_few, push_adapter, vllm_problems
from .merging import merge, merged, unmerge
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
    MultitaskPromptTuning,
    OutputLayers,
    OwnParameters,
    ParallelAdapter,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
)
from .mixing import row_adapters
from .named import add_adapter
from .quantization import dequantize, quantize
from .restoring import load_from_checkpoint
from .rows import row_tasks
from .sharding import FSDP1Strategy, FSDP2Strategy, without_values
from .strategy import PEFTStrategy
from .streaming import merge_files
from .summary import summary
from .switching import activate, active, disabled, remove_adapter
from .templates import Template

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
    "PrefixTuning",
    "PromptTuning",
    "Template",
    "WeightUpdate",
    "activate",
    "active",
    "adapters",
    "add_adapter",
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
    "unmerge",
    "vllm_problems",
    "without_values",
]
