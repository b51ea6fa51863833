"""Rows of tokens that tied layers share, under DDP and FSDP2 in two processes."""

import functools
from pathlib import Path

import pytest
import torch.distributed as dist
from cases import Case
from models import MODELS, Model
from parallel_laws import Keep, Task, difference, fit, gradients, gradients_alone, resumed, state
from processes import together
from test_fsdp2 import Double, Exact
from token_models import tied_llama

import lightning_peft as lp

TIED = Case("tied", (lp.LoRA(rank=2), lp.TrainableTokens(tokens=list(range(3, 40)))))


def spread(folder):
    """Return by how much gradients differ from those of one process, and what differs after resuming."""
    dist.init_process_group("gloo")
    MODELS["tied"] = Model(tied_llama, positions="given")
    found = [("ddp", difference(gradients(TIED, "ddp", precision="64-true"), gradients_alone(TIED)))]
    differing = resumed(TIED, "ddp", Path(folder, "ddp"))
    for name, strategy in (
        ("one file", lp.FSDP2Strategy),
        ("folder", functools.partial(lp.FSDP2Strategy, save_distributed_checkpoint=True)),
    ):
        keep = Keep()
        differing += resumed(TIED, strategy, Path(folder, name), Double(), keep, make=Exact)
        found.append((name, difference(keep.gradients, gradients_alone(TIED))))
    steps = [state(fit(TIED, s, Double(), make=Exact)) for s in (lp.FSDP2Strategy, "ddp")]
    return found, differing, difference(*steps), sorted(steps[0])


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one_and_resume_bit_for_bit(tmp_path):
    assert issubclass(Exact, Task)
    for found, differing, steps, names in together(spread, str(tmp_path)):
        assert max(value for _, value in found) < 1e-11, found
        assert differing == []
        assert steps < 1e-9
        assert "net.model.embed_tokens.peft.trainable_tokens.weight" in names
        assert not any("lm_head" in name and name.endswith("weight") for name in names)
