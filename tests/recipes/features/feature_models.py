"""Models and rows whose features are taken: small, offline, the same wherever they are built."""

import os
import time

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader


def bert(seed: int = 0) -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertModel(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes))


class Slow(nn.Module):
    """A perceptron that takes its time: the seconds of the environment's SLOW."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
            self.head = nn.Linear(8, 3)

    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return self.head(self.net(x))


class Numbers(pl.LightningDataModule):
    """Random numbers; the class is that of the largest of the first three.

    Args:
        rows: Number of rows of each split.
    """

    def __init__(self, rows: int = 90) -> None:
        super().__init__()
        self.rows = rows

    def loader(self, seed: int) -> DataLoader:
        x = torch.randn(self.rows, 6, generator=torch.Generator().manual_seed(seed))
        return DataLoader(list(zip(x, x[:, :3].argmax(1).tolist(), strict=True)), 8, shuffle=seed == 1)

    def train_dataloader(self):
        return self.loader(1)

    def val_dataloader(self):
        return self.loader(2)

    def test_dataloader(self):
        return self.loader(3)


def sentences(count: int = 30, seed: int = 0) -> list[dict]:
    """Items of token ids of many lengths, the last of which repeats the first."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    ids = [torch.randint(1, 40, (length,), generator=generator).tolist() for length in lengths]
    rows = [{"input_ids": row, "labels": row[0] % 2} for row in ids]
    return [*rows, dict(rows[0])]


class Collate:
    """Pads with noise, so that what reads padding is found out.

    Args:
        side: Where padding goes.
        extra: How much more padding there is than needed.
    """

    def __init__(self, side: str = "right", extra: int = 2) -> None:
        self.side, self.extra = side, extra

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(item["input_ids"]) for item in items) + self.extra
        ids, mask = torch.full((len(items), width), 39), torch.zeros(len(items), width, dtype=torch.long)
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            place = slice(0, length) if self.side == "right" else slice(width - length, width)
            ids[row, place], mask[row, place] = torch.tensor(item["input_ids"]), 1
        labels = torch.tensor([item["labels"] for item in items])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
