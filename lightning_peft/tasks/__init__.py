"""Ready LightningModules and DataModules over transformers: pip install "lightning-peft[text]"."""

from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.classification import TextClassification
from lightning_peft.tasks.cloze import Cloze
from lightning_peft.tasks.data.chat_data import ChatDataModule
from lightning_peft.tasks.data.cloze_data import ClozeDataModule
from lightning_peft.tasks.data.image_data import ImageDataModule
from lightning_peft.tasks.data.instructions import InstructionDataModule
from lightning_peft.tasks.data.mixed_data import MixedDataModule
from lightning_peft.tasks.data.multiple_choice_data import ChoicesDataModule
from lightning_peft.tasks.data.seq2seq_data import Seq2SeqDataModule
from lightning_peft.tasks.data.text_data import TextDataModule
from lightning_peft.tasks.data.token_data import TokenDataModule
from lightning_peft.tasks.image_classification import ImageClassification
from lightning_peft.tasks.multiple_choice import Choices
from lightning_peft.tasks.seq2seq import Seq2Seq
from lightning_peft.tasks.token_classification import TokenClassification

__all__ = [
    "CausalLM",
    "ChatDataModule",
    "Choices",
    "ChoicesDataModule",
    "Cloze",
    "ClozeDataModule",
    "ImageClassification",
    "ImageDataModule",
    "InstructionDataModule",
    "MixedDataModule",
    "Seq2Seq",
    "Seq2SeqDataModule",
    "TextClassification",
    "TextDataModule",
    "TokenClassification",
    "TokenDataModule",
]
