"""A tensor that carries a shard is read and written as the whole that it is a part of."""

import torch
from torch import nn

from lightning_peft.ops.sharded_tensors import (
    assign,
    full_tensor,
    global_shape,
    local_shard,
    sample_values,
    set_shard,
    shard_of,
)


class SecondHalf:
    """What the second of two processes holds, with the values of the first at hand."""

    def __init__(self, first):
        self.first, self.global_shape = first, torch.Size([2 * len(first), *first.shape[1:]])

    def full(self, local_values):
        return torch.cat([self.first, local_values])

    def local(self, values):
        return values[len(self.first) :]

    def sample(self, local_values, positions):
        return self.full(local_values).flatten()[positions]


def parameter():
    tensor = nn.Parameter(torch.arange(6.0, 12.0).view(2, 3))
    set_shard(tensor, SecondHalf(torch.arange(6.0).view(2, 3)))
    return tensor


def test_a_shard_tells_the_whole_and_its_shape():
    tensor = parameter()
    assert global_shape(tensor) == (4, 3)
    assert torch.equal(full_tensor(tensor), torch.arange(12.0).view(4, 3))
    assert sample_values(tensor, 4).tolist() == [0, 3, 6, 9]


def test_values_of_the_whole_are_written_into_the_part_that_is_held():
    tensor = parameter()
    assert local_shard(tensor, torch.ones(4, 3)).shape == (2, 3)
    assign(tensor, torch.arange(12.0).view(4, 3) * 2)
    assert tensor.tolist() == [[12, 14, 16], [18, 20, 22]]


def test_what_is_computed_from_a_shard_carries_none():
    tensor = parameter()
    assert shard_of(tensor) is not None
    assert shard_of(tensor * 2) is None
    assert full_tensor(tensor * 2).shape == (2, 3)


def test_a_tensor_without_a_shard_is_the_whole():
    tensor = torch.arange(6.0).view(2, 3)
    assert full_tensor(tensor) is tensor
    assert global_shape(tensor) == (2, 3)
    assert sample_values(tensor, 3).tolist() == [0, 2, 4]
