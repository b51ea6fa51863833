"""Each method as the fewest lines of torch that train it: what a user would write in place of a library."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK, SCALE, DROPOUT = 8, 2.0, 0.05


def filled(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(shape))


class LoRA(nn.Module):
    """W x + b + s B A x."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = filled(rank, base.in_features), filled(base.out_features, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a) * SCALE, self.b)


class LoRADropout(LoRA):
    """The same, with dropout on the way into A."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(F.dropout(x, DROPOUT, self.training), self.a) * SCALE, self.b)


class DoRA(LoRA):
    """m V / |V| x + b, with V = W + s B A and a norm that gets no gradient."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__(base, rank)
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(base.weight.detach(), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        v = torch.addmm(self.base.weight, self.b, self.a, alpha=SCALE)
        factor = self.magnitude / torch.linalg.vector_norm(v.detach(), dim=1)
        return F.linear(x, v * factor[:, None], self.base.bias)


class AdaLoRA(LoRA):
    """W x + b + s P diag(l) Q x, without the schedule, which is the same for all."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__(base, rank)
        self.values = filled(rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a) * (self.values * SCALE), self.b)


class FedPara(nn.Module):
    """(W + (X1 Y1^T) o (X2 Y2^T)) x + b."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.x1, self.x2 = filled(base.out_features, rank), filled(base.out_features, rank)
        self.y1, self.y2 = filled(base.in_features, rank), filled(base.in_features, rank)

    def forward(self, x: Tensor) -> Tensor:
        update = (self.x1 @ self.y1.T) * (self.x2 @ self.y2.T)
        return F.linear(x, self.base.weight + update, self.base.bias)


class KronA(nn.Module):
    """(W + s (A (x) B)^T) x + b, with A as square as it gets."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        inputs, outputs = closest_divisor(base.in_features), closest_divisor(base.out_features)
        self.a = filled(inputs, outputs)
        self.b = filled(base.in_features // inputs, base.out_features // outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + SCALE * torch.kron(self.a, self.b).T, self.base.bias)


def closest_divisor(n: int) -> int:
    return max(d for d in range(1, int(n**0.5) + 1) if n % d == 0)


class ScaledOutput(nn.Module):
    """l o (W x + b): IA3 on keys and values."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scales = base.requires_grad_(False), nn.Parameter(torch.ones(base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.scales


class ScaledInput(ScaledOutput):
    """W (l o x) + b: IA3 on what enters a down-projection, for a square layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x * self.scales)


class TrainedBias(nn.Module):
    """W x + b, of which b alone trains: BitFit."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.bias = base.requires_grad_(False), filled(base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight, self.bias)


class Bottleneck(nn.Module):
    """y + U f(D y), with y = W x + b."""

    def __init__(self, base: nn.Linear, size: int = RANK) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.out_features, size), nn.Linear(size, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.up(F.gelu(self.down(y)))
