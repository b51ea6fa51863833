"""Adapters of other libraries, in and out: all of one, or a refusal that names what does not fit."""

from .export import export_peft
from .hub import push_adapter
from .import_ import import_peft
from .original_checkpoints import import_loralib, import_t_few
from .vllm import vllm_problems

__all__ = ["export_peft", "import_loralib", "import_peft", "import_t_few", "push_adapter", "vllm_problems"]
