"""Fine-tuning methods, one module each."""

from ..core.own_parameters import OwnParameters
from .adalora import AdaLoRA
from .bitfit import BitFit
from .bottleneck import Bottleneck
from .fedpara import FedPara
from .ia3 import IA3
from .krona import KronA
from .krona_block import KronABlock
from .llama_adapter import LLaMAAdapter
from .lora import LoRA
from .multitask_prompt_tuning import MultitaskPromptTuning
from .p_tuning import PTuning
from .parallel_adapter import ParallelAdapter
from .prefix_tuning import PrefixTuning, PTuningV2
from .prompt_tuning import PromptTuning
from .subsets import FullFineTuning, LastLayers, OutputLayers
from .trainable_tokens import TrainableTokens

__all__ = [
    "AdaLoRA",
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
    "MultitaskPromptTuning",
    "OutputLayers",
    "OwnParameters",
    "PTuning",
    "PTuningV2",
    "ParallelAdapter",
    "PrefixTuning",
    "PromptTuning",
    "TrainableTokens",
]
