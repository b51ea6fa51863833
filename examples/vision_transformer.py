"""python examples/vision_transformer.py: a vision transformer as timm has it, query, key and value in one layer.

`example_input_array` is all that is asked of a module: one traced call tells which layers, and which rows of fused
ones, are queries, keys, values and so on. So LoRA's default, queries and values, works whatever things are called.
"""

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(L.LightningModule):
    example_input_array = torch.zeros(1, 1, 16, 16)  # the line that lets roles be measured

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 3, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)  # stands for pretrained weights
        self.patch_embed = nn.Conv2d(1, width, 4, stride=4)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(1))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def gratings(count: int, seed: int) -> TensorDataset:
    """Noisy images of upright, level and slanting stripes."""
    torch.manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    labels = torch.randint(3, (count,))
    along = torch.stack([x, y, (x + y) / 2**0.5])[labels]
    phase, frequency = 6.3 * torch.rand(count, 1, 1), 0.8 + 0.8 * torch.rand(count, 1, 1)
    images = torch.sin(frequency * along + phase) + 0.3 * torch.randn(count, 16, 16)
    return TensorDataset(images[:, None], labels)


if __name__ == "__main__":
    model = VisionTransformer()
    print(lp.targets(model))

    strategy = lp.PEFTStrategy(lp.LoRA(rank=4, alpha=8), also_train=["head"])  # attention.query and attention.value
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=[strategy], logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, DataLoader(gratings(768, seed=1), 32, shuffle=True))

    images, labels = gratings(256, seed=2).tensors
    with torch.no_grad():
        outputs = model.eval()(images)
        accuracy = (outputs.argmax(1) == labels).float().mean().item()
        plain = lp.merge(model)  # the adapters folded in: a plain model with the parameters of the base
        difference = (plain(images) - outputs).abs().max().item()
    print(f"test accuracy {accuracy:.1%}; merged, outputs differ by {difference:.0e}")

    base = VisionTransformer().state_dict()
    fused = "blocks.0.attn.qkv.weight"
    changed = (plain.state_dict()[fused] != base[fused]).any(1).view(3, -1).sum(1).tolist()
    print(f"rows of {fused} that changed: {changed[0]} of queries, {changed[1]} of keys, {changed[2]} of values")
    print("parameters are those of the base:", list(plain.state_dict()) == list(base))
