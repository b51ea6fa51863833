"""Data parallel training: one run in several processes is the run of one, for every method."""

from pathlib import Path

import pytest
import torch
from cases import CASES
from parallel_laws import largest_difference, resumed
from processes import together

BASES = ("bert", "llama", "plain", "fused_vit")
DISTRIBUTED = [case for case in CASES if case.model in BASES]


def laws(folder):
    """Return of every case how far gradients are off, and what a continued run ends with differently."""
    torch.distributed.init_process_group("gloo")
    return [
        (str(case), largest_difference(case, "ddp", precision="64-true"), resumed(case, "ddp", Path(folder, str(i))))
        for i, case in enumerate(DISTRIBUTED)
    ]


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one_and_resume_bit_for_bit(tmp_path):
    for rank in together(laws, str(tmp_path)):
        assert max(off for _, off, _ in rank) < 1e-11, max(rank, key=lambda found: found[1])
        assert not [(name, different) for name, _, different in rank if different]
        print(f"largest difference of {len(rank)} cases: {max(off for _, off, _ in rank):.1e}")
