"""What a reader of the pages has: small networks, a LightningModule around one, and data for it."""

import lightning.pytorch as pl
import torch
import transformers
from torch.utils.data import DataLoader

_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


class Module(pl.LightningModule):
    """Trains a network that computes its loss.

    Args:
        model: The network.
    """

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, index):
        return self(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def bert(kind: str = "SequenceClassification"):
    """Return a BERT of three layers with two classes, or with another head."""
    return getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(vocab_size=60, **_SIZES)).eval()


def llama():
    """Return a Llama of three layers with 60 words."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=60, **_SIZES)).eval()


def rows(model: str = "classifier", count: int = 8):
    """Return rows of eight tokens with a class, or with the tokens to predict."""
    ids = torch.randint(5, 60, (count, 8))
    return [{"input_ids": x, "labels": x if model == "decoder" else x[0] % 2} for x in ids]


def loader(model: str = "classifier"):
    """Return batches of four rows."""
    return DataLoader(rows(model), 4)


def on_meta(kind: str, **config):
    """Return a model of transformers without values, in the size of its configuration."""
    cls = getattr(transformers, kind)
    with torch.device("meta"):
        return cls(cls.config_class(**config))


def trained(model) -> int:
    """Return the number of parameters that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
