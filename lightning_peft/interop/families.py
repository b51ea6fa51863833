"""The families that are exchanged."""

from .adalora import AdaLoRAFamily
from .family import Family
from .ia3 import IA3Family
from .loha import LoHaFamily
from .lokr import LoKrFamily
from .lora import LoRAFamily

FAMILIES: tuple[Family, ...] = (LoRAFamily(), IA3Family(), AdaLoRAFamily(), LoHaFamily(), LoKrFamily())
