"""python examples/federated.py: three clients share half of an adapter and keep the other half to themselves.

Clients agree on which points belong together, but each names the groups in its own way. FedPara, averaged as a whole
after each round (FedAvg), cannot please everybody. pFedPara, W + (X1 Y1^T) o (X2 Y2^T + 1), shares the first factor and
leaves the second with its client: `lp.global_state` and `lp.local_state` say which is which.
Over Flower, with processes and machines: configs/recipes/federated.md.
"""

import logging

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # a Trainer for each client and round has much to say
CLIENTS, ROUNDS, GROUPS = 3, 6, 4
State = dict[str, Tensor]


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # the same base at all clients; it is never sent
        self.body = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, GROUPS)

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.body(points))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        points, labels = batch
        return nn.functional.cross_entropy(self(points), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def rows(client: int, count: int, seed: int) -> TensorDataset:
    """Points around four centers; client 1 calls group 0 what is group 1 for client 0, and so on."""
    random = torch.Generator().manual_seed(seed + client)
    centers = torch.randn(GROUPS, 16, generator=torch.Generator().manual_seed(9))
    groups = torch.randint(GROUPS, (count,), generator=random)
    points = centers[groups] + 0.7 * torch.randn(count, 16, generator=random)
    return TensorDataset(points, (groups + client) % GROUPS)


def average(states: list[State]) -> State:
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def copied(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


def parts(module: nn.Module) -> tuple[State, State]:
    """Return what a client sends, and what stays with it: of FedPara nothing, of pFedPara half."""
    return copied(lp.global_state(module)), copied(lp.local_state(module))


def federate(personalized: bool) -> tuple[float, int]:
    """Train all clients, and return their mean accuracy on rows of their own and how many numbers a client sends."""
    module = Classifier()  # stands for the copy that each client has
    lp.inject(module, lp.FedPara(rank=4, targets=["body.0", "body.2", "head"], personalized=personalized))
    shared, kept = parts(module)
    own = [kept] * CLIENTS
    for _ in range(ROUNDS):
        received = []
        for client in range(CLIENTS):
            module.load_state_dict(shared | own[client], strict=False)
            trainer = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=[lp.PEFTStrategy(show_summary=False)],
                                logger=False, enable_checkpointing=False, enable_progress_bar=False,
                                enable_model_summary=False)  # fmt: skip
            trainer.fit(module.train(), DataLoader(rows(client, 96, seed=10), 32, shuffle=True))
            update, own[client] = parts(module)
            received.append(update)
        shared = average(received)

    right = 0.0
    for client in range(CLIENTS):
        module.load_state_dict(shared | own[client], strict=False)
        points, labels = rows(client, 256, seed=20).tensors
        with torch.no_grad():
            right += (module.eval()(points).argmax(1) == labels).float().mean().item() / CLIENTS
    return right, sum(value.numel() for value in shared.values())


if __name__ == "__main__":
    accuracy, sent = {}, {}
    for name, personalized in (("FedPara", False), ("pFedPara", True)):
        accuracy[name], sent[name] = federate(personalized)
        print(f"{name:9} accuracy of clients {accuracy[name]:6.1%}, a client sends {sent[name]:,} numbers in a round")
