"""python examples/oft.py: orthogonal finetuning as a method of your own, https://arxiv.org/abs/2306.07280.

W' = W R with R block by block: no sum of the weight and something else, so that the method says what the updated weight
is. Each block of R is (I - S) (I + S)^-1 of a skew-symmetric S = Q - Q^T: R is orthogonal and starts as the identity.
In YAML: ``method: {class_path: examples.oft.OFT, init_args: {block_size: 8}}``.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core import Rows, check_setting, parameter_like, select


@dataclass(frozen=True, kw_only=True)
class OFT(lp.Method):
    """Trains a rotation of each block of a layer's inputs."""

    name: str = "oft"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["attention.query", "attention.value"])
    block_size: int = 4

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, lp.Adapter]]:
        return ((name, Rotation(host, rows, self.block_size)) for name, host, rows in select(model, self.targets))


class Rotation(lp.WeightUpdate):
    def __init__(self, host: nn.Module, rows: Rows | None, size: int) -> None:
        super().__init__(host, rows)
        blocks, rest = divmod(self.shape[1], size)
        check_setting(rest == 0, "block_size", size, f"a divisor of {self.shape[1]} inputs")
        self.q = parameter_like(self.layer.parameter(host), blocks, size, size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.q)

    def updated(self, weight: Tensor) -> Tensor:
        skew, identity = self.q - self.q.mT, torch.eye(self.q.shape[-1], device=self.q.device, dtype=self.q.dtype)
        rotation = torch.linalg.solve(identity + skew, identity - skew)
        blocks = weight.unflatten(1, self.q.shape[:2])  # (out, blocks, size, *kernel)
        return torch.einsum("obi...,bij->obj...", blocks, rotation.to(weight.dtype)).flatten(1, 2)


if __name__ == "__main__":
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    before = layer.weight.detach().clone()
    model = lp.inject(nn.Sequential(layer), OFT(targets=["0"]))
    print(lp.summary(model))
    x, y = torch.randn(256, 16), torch.randn(256, 8)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(50):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = lp.merge(model)[0].weight.detach()
    change = (after - before).abs().max().item()
    stretch = (after.norm(dim=1) - before.norm(dim=1)).abs().max().item()
    print(f"weights moved by up to {change:.2f}, lengths of their rows by {stretch:.0e}")
