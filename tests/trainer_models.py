"""LightningModules of the tests, over the same bases, with networks built in each of the usual places."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from models import MODELS, VOCABULARY, logits
from torch.utils.data import DataLoader


class Module(pl.LightningModule):
    """Trains a base model of the tests.

    Args:
        model: Its name.
        place: Where the network is built: init, setup or configure_model.
    """

    def __init__(self, model: str = "llama", place: str = "init") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.place = place
        if place == "init":
            self.build()

    def build(self) -> None:
        if not hasattr(self, "net"):
            self.net = MODELS[self.hparams["model"]]()

    def training_step(self, batch, index):
        out = logits(self.net(batch)).flatten(0, -2)
        loss = F.cross_entropy(out, batch.flatten()[: len(out)] % 3)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.training_step(batch, index))

    test_step = validation_step

    def predict_step(self, batch, index):
        return logits(self.net(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class SetupModule(Module):
    def setup(self, stage: str) -> None:
        self.build()


class LateModule(Module):
    def configure_model(self) -> None:
        self.build()


PLACES = {"init": Module, "setup": SetupModule, "configure_model": LateModule}


def module(model: str = "llama", place: str = "init") -> Module:
    return PLACES[place](model, place)


def data(shuffle: bool = False) -> DataLoader:
    rows = torch.randint(3, VOCABULARY, (16, 7), generator=torch.Generator().manual_seed(0))
    return DataLoader(rows, batch_size=2, shuffle=shuffle)


class Resumable(DataLoader):
    """A loader that goes on where it stopped, in the same order if it has a generator of its own."""

    start = given = 0
    drawn = None  # the generator's state before the order was drawn

    def __iter__(self):
        self.given, self.start = self.start, 0
        self.drawn = None if self.generator is None else self.generator.get_state()
        return self.rest(super().__iter__())

    def rest(self, batches):
        for position, batch in enumerate(batches):
            if position >= self.given:
                self.given = position + 1
                yield batch

    def state_dict(self):
        return {"given": self.given, "drawn": self.drawn}

    def load_state_dict(self, state):
        self.start = state["given"]
        if state["drawn"] is not None:
            self.generator.set_state(state["drawn"])


def trainer(*callbacks, epochs: int = 1, **settings) -> pl.Trainer:
    saves = any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    defaults = {"accelerator": "cpu", "max_epochs": epochs, "accumulate_grad_batches": 2, "log_every_n_steps": 1}
    return pl.Trainer(callbacks=list(callbacks), enable_checkpointing=saves, **{**quiet, **defaults, **settings})
