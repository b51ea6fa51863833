"""The families that are exchanged."""

from .family import Family
from .ia3 import IA3Family
from .lora import LoRAFamily

FAMILIES: tuple[Family, ...] = (LoRAFamily(), IA3Family())
