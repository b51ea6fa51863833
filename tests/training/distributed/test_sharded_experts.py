"""FSDP2 over experts: two processes train them as one would, from a plain base or one that is read and quantized."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from expert_models import batch, expert_model
from installed import needs
from models import BEFORE_5
from parallel_laws import whole
from processes import together
from safetensors.torch import save_model
from torch.utils.data import DataLoader, DistributedSampler
from trainer_models import trainer

import lightning_peft as lp

pytestmark = [
    pytest.mark.slow,
    needs("torchao"),
    pytest.mark.skipif(BEFORE_5, reason="experts are modules before transformers 5"),
]
METHOD = lp.LoRA(targets=["all-linear"], rank=2)
CASES = [(name, kind) for name in ("mixtral", "gpt_oss") for kind in (None, "int8", "nf4")]


class Task(pl.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.net = expert_model(name, "batched_mm")

    def training_step(self, rows, index=0):
        return self.net(rows).logits.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Start(pl.Callback):
    """Widens a module once its adapters are there, and gives them the same values in all runs once the base is read."""

    def setup(self, trainer, pl_module, stage):
        pl_module.double()

    @torch.no_grad()
    def on_train_start(self, trainer, pl_module):
        generator = torch.Generator().manual_seed(2)
        for _, p in sorted(pl_module.named_parameters()):
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))


def steps_of_two(folder):
    dist.init_process_group("gloo")
    found = []
    for name, kind in CASES:
        rows = batch(8)
        folder_of = Path(folder, f"{name}{kind}")
        folder_of.mkdir(parents=True, exist_ok=True)
        if dist.get_rank() == 0:
            save_model(expert_model(name), str(folder_of / "model.safetensors"))
        dist.barrier()
        with lp.without_values():
            module = Task(name)
        peft = lp.PEFTStrategy(METHOD, show_summary=False, quantize=kind)
        runs = trainer(
            peft, Start(), strategy=lp.FSDP2Strategy(base_weights=str(folder_of)), devices=2, max_steps=2,
            use_distributed_sampler=False,
        )  # fmt: skip
        share = DistributedSampler(rows, 2, dist.get_rank(), shuffle=False)
        runs.fit(module, DataLoader(rows, batch_size=2, sampler=share))
        state = {n: whole(p).numpy() for n, p in module.named_parameters() if p.requires_grad}
        experts = module.net.model.layers[0].mlp.experts._parameters["gate_up_proj"]
        local = experts.to_local()
        found.append((state, tuple(local.shape), tuple(experts.shape)))
    return found


def steps_of_one(name, kind):
    module = Task(name)
    peft = lp.PEFTStrategy(METHOD, show_summary=False, quantize=kind)
    if kind == "nf4":
        lp.quantize(module, "nf4", backend="torchao")
    runs = trainer(peft, Start(), max_steps=2)
    runs.fit(module, DataLoader(batch(8), batch_size=4))
    return {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}


def test_two_processes_train_experts_as_one_does(tmp_path):
    ranks = together(steps_of_two, str(tmp_path))
    for number, (name, kind) in enumerate(CASES):
        expected = steps_of_one(name, kind)
        for rank in ranks:
            state, local, shape = rank[number]
            assert local == (2, *shape[1:])  # half of the experts
            assert state.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(torch.from_numpy(state[key]), value, atol=1e-9, rtol=1e-7)
