"""``FORMATS``: all formats of HF PEFT that are read and written."""

from .adalora import AdaLoRAFormat
from .beft import BEFTFormat
from .ia3 import IA3Format
from .llama_adapter import LLaMAAdapterFormat
from .loha import LoHaFormat
from .lokr import LoKrFormat
from .lora import LoRAFormat
from .peft_format import PeftFormat
from .prefixes import PrefixFormat
from .prompts import MultitaskPromptFormat, PromptTuningFormat, PTuningFormat
from .trainable_tokens import TrainableTokensFormat

FORMATS: tuple[PeftFormat, ...] = (
    LoRAFormat(),
    IA3Format(),
    AdaLoRAFormat(),
    LoHaFormat(),
    LoKrFormat(),
    PrefixFormat(),
    PromptTuningFormat(),
    PTuningFormat(),
    MultitaskPromptFormat(),
    LLaMAAdapterFormat(),
    BEFTFormat(),
    TrainableTokensFormat(),
)
