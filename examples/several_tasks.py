"""python examples/several_tasks.py: two tasks over one frozen base, each with a head, and both in one batch."""

import lightning as L
import torch
from existing_module import Classifier
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp


def labels(task: str, tokens: torch.Tensor) -> torch.Tensor:
    """Whether most tokens are small, or whether there is one of the highest."""
    return ((tokens < 50).float().mean(1) > 0.5 if task == "most" else (tokens >= 95).any(1)).long()


def accuracy(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return (logits.argmax(-1) == expected).float().mean().item()


if __name__ == "__main__":
    tokens = torch.randint(100, (1024, 12), generator=torch.Generator().manual_seed(1))
    module = Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for task in ("most", "highest"):
        lp.add_adapter(module, lp.LoRA(rank=4, targets=["linear1", "linear2"]), task, also_train=["embed", "head"])
        lp.activate(module, task)
        trainer = L.Trainer(max_epochs=6, callbacks=[lp.PEFTStrategy()], accelerator="cpu", logger=False,
                            enable_checkpointing=False, enable_progress_bar=False,
                            enable_model_summary=False)  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(tokens, labels(task, tokens)), 64, shuffle=True))
        lp.save_adapter(module, f"runs/several_tasks/{task}", name=task)

    served = Classifier().eval()  # somewhere else, with the base alone
    for task in ("most", "highest"):
        lp.add_adapter(served, f"runs/several_tasks/{task}")
    rows = tokens[:16]
    tasks = ["most", "highest"] * 8
    with torch.no_grad(), lp.row_adapters(served, tasks):
        mixed = served(rows)
    with torch.no_grad(), lp.disabled(served):
        untouched = torch.equal(served(rows), Classifier().eval()(rows))
    for number, task in enumerate(("most", "highest")):
        lp.activate(served, task)
        with torch.no_grad(), lp.merged(served):  # as fast as the base
            whole = served(tokens)
            alone = served(rows)[number::2]
        difference = (mixed[number::2] - alone).abs().max().item()
        score = accuracy(whole, labels(task, tokens))
        print(f"{task}: accuracy {score:.3f}, in a mixed batch the same to {difference:.0e}")
    with lp.full_state_dict(module):
        kept = module.state_dict()
    print("the base is untouched:", all(torch.equal(kept[name], value) for name, value in before.items()))
    print("without adapters the outputs are the base's:", untouched)
