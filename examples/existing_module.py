"""python examples/existing_module.py: a LightningModule that you have, unchanged, and one line for the Trainer.

It is trained twice, whole and with the line. Both learn the task; the second checkpoint holds what trained alone.
"""

from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp


class Classifier(L.LightningModule):
    """Nothing in it knows about adapters: its own network, optimizer and schedule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # stands for pretrained weights: the same base wherever it is built
        block = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.embed, self.encoder = nn.Embedding(100, 64), nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        tokens, labels = batch
        loss = nn.functional.cross_entropy(self(tokens), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def rows(seed: int, count: int = 1024) -> tuple[Tensor, Tensor]:
    """Random tokens, and whether most of them are below 50."""
    tokens = torch.randint(100, (count, 12), generator=torch.Generator().manual_seed(seed))
    return tokens, (tokens < 50).float().mean(1).gt(0.5).long()


def fit(folder: str, callbacks: list[L.Callback]) -> tuple[Classifier, str]:
    """Train a module, and return it with the path of its checkpoint."""
    module = Classifier()
    trainer = L.Trainer(max_epochs=5, accelerator="cpu", callbacks=callbacks, logger=False, enable_model_summary=False,
                        enable_progress_bar=False, default_root_dir=folder)  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*rows(seed=1)), 32, shuffle=True))
    return module.eval(), trainer.checkpoint_callback.best_model_path


@torch.no_grad()
def accuracy(module: nn.Module) -> float:
    tokens, labels = rows(seed=2)
    return (module(tokens).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    whole, whole_path = fit("runs/existing_module/whole", callbacks=[])

    strategy = lp.PEFTStrategy(lp.LoRA(rank=4, targets=["linear1", "linear2"]), also_train=["head"])  # the line
    adapted, path = fit("runs/existing_module/adapted", callbacks=[strategy])

    adapter = lp.save_adapter(adapted, "runs/existing_module/adapter")  # to share: what trained, without the optimizer
    from_adapter = lp.load_adapter(Classifier(), adapter).eval()
    from_checkpoint = lp.load_from_checkpoint(Classifier, path).eval()  # which says what to inject

    accuracies = {name: accuracy(module) for name, module in (("whole", whole), ("adapter", adapted))}
    sizes = {name: Path(place).stat().st_size for name, place in (("whole", whole_path), ("adapter", path))}
    print("\n         test accuracy   checkpoint")
    for name in accuracies:
        print(f"{name:8} {accuracies[name]:13.1%} {sizes[name] / 1000:9,.0f} kB")
    with torch.no_grad():
        tokens, _ = rows(seed=2)
        same = [torch.equal(module(tokens), adapted(tokens)) for module in (from_adapter, from_checkpoint)]
    print(f"loaded again, from the adapter's folder and the checkpoint, outputs are the same: {same}")
