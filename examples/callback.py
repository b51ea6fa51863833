"""python examples/callback.py: your LightningModule, one callback, an adapter-only checkpoint, and back."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp


class Classifier(L.LightningModule):
    """Any LightningModule: nothing in it knows about adapters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # stands for pretrained weights: the same base wherever it is built
        block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.embed, self.encoder = nn.Embedding(100, 32), nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        tokens, labels = batch
        return nn.functional.cross_entropy(self(tokens), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


if __name__ == "__main__":
    tokens = torch.randint(100, (512, 12), generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(tokens, (tokens < 50).float().mean(1).gt(0.5).long()), 32)
    strategy = lp.PEFTStrategy(lp.LoRA(rank=4, targets=["linear1", "linear2"]), also_train=["head"])
    module = Classifier()
    trainer = L.Trainer(max_epochs=5, callbacks=[strategy], accelerator="cpu", logger=False, enable_model_summary=False)
    trainer.fit(module, data)
    path = trainer.checkpoint_callback.best_model_path
    lp.save_adapter(module, "runs/callback-adapter")
    again = lp.load_adapter(Classifier(), "runs/callback-adapter").eval()
    accuracy = (again(tokens).argmax(1) == (tokens < 50).float().mean(1).gt(0.5)).float().mean()
    print(f"reloaded adapter: accuracy {accuracy:.3f}; checkpoint {path} holds", end=" ")
    print(len(torch.load(path, weights_only=True)["state_dict"]), "tensors")
