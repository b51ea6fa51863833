"""A model of a billion parameters, without values, and the memory of this process."""

import re
from pathlib import Path

import lightning.pytorch as pl
import torch

import lightning_peft as lp


class Billion(pl.LightningModule):
    """TinyLlama's shape, in bfloat16, without values.

    Args:
        layers: Number of blocks.
    """

    def __init__(self, layers=22):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
                             num_attention_heads=32, num_key_value_heads=4, dtype="bfloat16")  # fmt: skip
        with lp.without_values():
            self.net = LlamaForCausalLM(config).to(torch.bfloat16)

    def training_step(self, batch, index):
        raise AssertionError("only saved here")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def memory(what):
    """Return a figure of this process from the kernel, in bytes."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
