"""Adapters of HF PEFT, loralib and T-Few are read and written as a whole, or refused with the reason."""

from .export import export_peft
from .hub import push_adapter
from .import_ import import_peft
from .original_checkpoints import import_loralib, import_t_few
from .vllm import vllm_problems

__all__ = ["export_peft", "import_loralib", "import_peft", "import_t_few", "push_adapter", "vllm_problems"]
