"""Ready LightningModules and DataModules over transformers: pip install "lightning-peft[text]"."""

from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.classification import TextClassification
from lightning_peft.tasks.cloze import Cloze
from lightning_peft.tasks.cloze_data import ClozeDataModule
from lightning_peft.tasks.instructions import InstructionDataModule
from lightning_peft.tasks.mixed_data import MixedDataModule
from lightning_peft.tasks.multiple_choice import Choices
from lightning_peft.tasks.multiple_choice_data import ChoicesDataModule
from lightning_peft.tasks.text_data import TextDataModule

__all__ = [
    "CausalLM",
    "Choices",
    "ChoicesDataModule",
    "Cloze",
    "ClozeDataModule",
    "InstructionDataModule",
    "MixedDataModule",
    "TextClassification",
    "TextDataModule",
]
