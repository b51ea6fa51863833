"""A module and its data for the command line: small, offline, with a base that is the same wherever it is built."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainer_models import data


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


class Net(pl.LightningModule):
    """Classifies six numbers.

    Args:
        late: Whether the network is built in ``configure_model``.
    """

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.late = late
        self.net = None if late else network()

    def configure_model(self) -> None:
        self.net = self.net or network()

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val_loss", self.training_step(batch, index))

    def test_step(self, batch, index):
        self.log("test_accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


class Numbers(pl.LightningDataModule):
    """Random numbers; the class is that of the largest of the first three."""

    def loader(self) -> DataLoader:
        x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)

    train_dataloader = val_dataloader = test_dataloader = loader


class Tokens(pl.LightningDataModule):
    """Random rows of tokens."""

    def train_dataloader(self) -> DataLoader:
        return data()

    val_dataloader = test_dataloader = train_dataloader
