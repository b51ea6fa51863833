"""The methods, one file each."""

from .adalora import AdaLoRA
from .bitfit import BitFit
from .fedpara import FedPara
from .llama_adapter import LLaMAAdapter
from .lora import LoRA
from .prompt_tuning import PromptTuning
from .subsets import FullFineTuning, LastLayers, OutputLayers

__all__ = [
    "AdaLoRA",
    "BitFit",
    "FedPara",
    "FullFineTuning",
    "LLaMAAdapter",
    "LastLayers",
    "LoRA",
    "OutputLayers",
    "PromptTuning",
]
