"""Tensor parallelism through Lightning: training, checkpoints of both kinds, and the way to one process and back."""

import os

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from models import tokens
from processes import together
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from trainer_models import LateModule, Module, Resumable, data, trainer

import lightning_peft as lp
from lightning_peft.core.tensor_parallel import mesh_of
from lightning_peft.ops.sharded_tensors import full_tensor

WAYS = [("roles", False), ("roles", True), ("by hand", True)]  # and whether each process writes its part


class ByHand(Module):
    """Splits its layers itself, as Lightning asks for."""

    def configure_model(self):
        self.build()
        if mesh_of(self) is None:
            columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
            plan = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
            plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


def callback():
    method = lp.LoRA(rank=4, targets=["all-linear"])
    return lp.PEFTStrategy(method, also_train=["lm_head"], show_summary=False)


def engine(how, distributed=False, **settings):
    strategy = ModelParallelStrategy(1, 2, save_distributed_checkpoint=distributed)
    if how == "roles":
        strategy = lp.FSDP2Strategy(tensor_parallel_size=2, save_distributed_checkpoint=distributed)
    # All processes read the same rows. Lightning's sampler would shuffle them, and anew where a run goes on.
    return trainer(callback(), devices=2, strategy=strategy, epochs=-1, use_distributed_sampler=False, **settings)


def module_for(how):
    return LateModule("llama", "configure_model") if how == "roles" else ByHand("llama", "configure_model")


def fit(how, distributed, steps, resume=None, save=None, **settings):
    module, run = module_for(how), engine(how, distributed, max_steps=steps, **settings)
    torch.manual_seed(5 + int(os.environ["RANK"]))  # the first process's adapters are everybody's
    run.fit(module, loader(), ckpt_path=resume)
    if save is not None:
        run.save_checkpoint(save)
    return module


def loader():
    return Resumable(data().dataset, batch_size=2)


def trained(module):
    return {n: full_tensor(p.detach()).clone() for n, p in module.named_parameters() if p.requires_grad}


def predicted(run, module, path=None):
    rows = torch.utils.data.DataLoader(tokens(), batch_size=2)
    return torch.cat(run.predict(module, rows, ckpt_path=path))


def train_and_resume(folder):
    """Return, by way, what a run that was stopped in the middle ends with otherwise than one that was not."""
    found = {}
    for how, distributed in WAYS:
        path = f"{folder}/{how}-{distributed}.ckpt"
        fit(how, distributed, 2, save=path)
        modules = [fit(how, distributed, 4, resume) for resume in (path, None)]
        lp.save_adapter(modules[1], f"{folder}/{how}-{distributed}")
        resumed, straight = map(trained, modules)
        assert resumed.keys() == straight.keys()
        found[how, distributed] = [name for name, value in straight.items() if not torch.equal(value, resumed[name])]
        torch.save(straight, f"{folder}/{how}-{distributed}-{torch.distributed.get_rank()}.pt")
    full = f"{folder}/roles-False.ckpt"
    torch.save(predicted(engine("roles"), module_for("roles"), full), f"{folder}/from-split.pt")
    torch.save(predicted(engine("roles"), module_for("roles"), f"{folder}/single.ckpt"), f"{folder}/from-single.pt")
    return found


def alone(**settings):
    return trainer(callback(), epochs=-1, **settings)


@pytest.mark.slow
def test_training_stops_goes_on_and_changes_places(tmp_path):
    torch.manual_seed(5)
    single, run = module_for("roles"), alone(max_steps=4)
    run.fit(single, loader())
    run.save_checkpoint(tmp_path / "single.ckpt")
    for found in together(train_and_resume, str(tmp_path)):
        assert found == dict.fromkeys(WAYS, [])
    for how, distributed in WAYS:
        first, second = (torch.load(tmp_path / f"{how}-{distributed}-{rank}.pt") for rank in range(2))
        loaded = Module("llama")
        lp.load_adapter(loaded, tmp_path / f"{how}-{distributed}")  # which compares the base's fingerprint, too
        assert all(torch.equal(value, first[name]) for name, value in trained(loaded).items())
        for name, value in trained(single).items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], value, atol=1e-4, rtol=0)
    for name, checkpoint in [("split", "roles-False"), ("single", "single")]:
        here = predicted(alone(), module_for("roles"), tmp_path / f"{checkpoint}.ckpt")
        torch.testing.assert_close(torch.load(tmp_path / f"from-{name}.pt"), here, atol=1e-5, rtol=0)
