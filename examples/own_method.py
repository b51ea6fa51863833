"""python examples/own_method.py: a method of your own is one class; here VeRA, https://arxiv.org/abs/2310.11454.

Two frozen random matrices are shared by all hosts; two small vectors train at each. In YAML its class path is enough:
``method: {class_path: examples.own_method.VeRA, init_args: {targets: [query]}}``.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core import Rows, layer_of, parameter_like, select


@dataclass(frozen=True, kw_only=True)
class VeRA(lp.Method):
    """Trains W + diag(g) B diag(d) A with shared, frozen A and B."""

    name: str = "vera"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["attention.query", "attention.value"])
    rank: int = 16

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, lp.Adapter]]:
        targets = select(model, self.targets)
        shapes = [layer_of(host).shape(host, rows) for _, host, rows in targets]
        tallest, widest = max(out for out, *_ in shapes), max(features for _, features, *_ in shapes)
        a, b = torch.randn(self.rank, widest) / widest**0.5, torch.randn(tallest, self.rank)
        return ((name, VeRAAdapter(host, rows, a, b)) for name, host, rows in targets)


class VeRAAdapter(lp.WeightUpdate):
    def __init__(self, host: nn.Module, rows: Rows | None, a: Tensor, b: Tensor) -> None:
        super().__init__(host, rows)
        out, features = self.shape
        self.register_buffer("a", a[:, :features])
        self.register_buffer("b", b[:out])
        weight = self.layer.parameter(host)
        self.d, self.g = parameter_like(weight, len(a)), parameter_like(weight, out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.d, 0.1)
        nn.init.zeros_(self.g)

    def delta(self) -> Tensor:
        return (self.g[:, None] * self.b) @ (self.d[:, None] * self.a)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    lp.inject(model, VeRA(targets=["0", "2"]))
    print(lp.summary(model))
    x, y = torch.randn(256, 16), torch.randint(4, (256,))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(200):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}")
    live = model(x)
    print(f"merged equals live to {(lp.merge(model)(x) - live).abs().max().item():.1e}")
