"""The families that are exchanged."""

from .adalora import AdaLoRAFamily
from .beft import BEFTFamily
from .ia3 import IA3Family
from .llama_adapter import LLaMAAdapterFamily
from .loha import LoHaFamily
from .lokr import LoKrFamily
from .lora import LoRAFamily
from .peft_format import Family
from .prefixes import PrefixFamily
from .prompts import MultitaskPromptFamily, PromptTuningFamily, PTuningFamily

FAMILIES: tuple[Family, ...] = (
    LoRAFamily(),
    IA3Family(),
    AdaLoRAFamily(),
    LoHaFamily(),
    LoKrFamily(),
    PrefixFamily(),
    PromptTuningFamily(),
    PTuningFamily(),
    MultitaskPromptFamily(),
    LLaMAAdapterFamily(),
    BEFTFamily(),
)
