"""The runner of processes itself: it returns what each found, and no failure is lost."""

import pytest
import torch
from processes import together


def total():
    torch.distributed.init_process_group("gloo")
    mine = torch.tensor([float(torch.distributed.get_rank() + 1)])
    torch.distributed.all_reduce(mine)
    return mine.item()


def fail_on_the_second():
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 1:
        raise ValueError("no good")
    torch.distributed.barrier()


@pytest.mark.slow
def test_processes_talk_and_their_failures_are_told():
    assert together(total) == [3.0, 3.0]
    with pytest.raises(AssertionError, match="rank 1: (.|\n)*no good"):
        together(fail_on_the_second)
