"""Rows of about the same length share a batch: each row once in an epoch, in random order, with little padding."""

import random

import pytest
import torch
from data_cases import DATA, prepare, save_rows
from torch.utils.data import RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_peft.tasks.data.encoding.length_groups import LengthGroupedBatchSampler
from lightning_peft.tasks.data.task_sampling import Mixture

DRAW = random.Random(0)  # noqa: S311
LENGTHS = [DRAW.randint(1, 300) for _ in range(1003)]


def padding(batches, lengths=LENGTHS):
    """Return the share of tokens that are padding."""
    sizes = [(max(lengths[row] for row in batch) * len(batch), sum(lengths[row] for row in batch)) for batch in batches]
    return 1 - sum(full for _, full in sizes) / sum(size for size, _ in sizes)


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_has_each_row_once_and_its_length(drop_last):
    sampler = LengthGroupedBatchSampler(RandomSampler(LENGTHS), 8, drop_last, LENGTHS)
    epochs = [list(sampler) for _ in range(2)]
    for batches in epochs:
        assert len(batches) == len(sampler) == (125 if drop_last else 126)
        assert [len(batch) for batch in batches] == [8] * 125 + ([] if drop_last else [3])
        rows = [row for batch in batches for row in batch]
        assert len(set(rows)) == len(rows) == (1000 if drop_last else 1003)
        assert padding(batches) < 0.03
    assert epochs[0] != epochs[1]
    shuffled = torch.randperm(1000).view(-1, 8).tolist()
    assert padding(shuffled) > 0.4


def test_batches_do_not_come_in_the_order_of_their_lengths():
    batches = list(LengthGroupedBatchSampler(SequentialSampler(LENGTHS), 8, True, LENGTHS))
    firsts = [LENGTHS[batch[0]] for batch in batches]
    assert abs(torch.corrcoef(torch.tensor([firsts, list(range(len(firsts)))]).float())[0, 1]) < 0.2


def test_processes_have_batches_of_about_the_same_length_at_each_step():
    epochs = []
    for rank in range(2):
        sampler = DistributedSampler(LENGTHS, 2, rank, seed=3)
        sampler.set_epoch(1)
        epochs.append(list(LengthGroupedBatchSampler(sampler, 4, False, LENGTHS)))
    first, second = epochs
    assert len(first) == len(second) == 126
    whole = [max(LENGTHS[row] for row in batch) for batch in first[:64]]
    other = [max(LENGTHS[row] for row in batch) for batch in second[:64]]
    assert sum(abs(a - b) for a, b in zip(whole, other, strict=True)) / 64 < 15
    assert len({row for batch in first + second for row in batch}) == len(LENGTHS)


@pytest.mark.parametrize("world", [1, 2])
def test_a_pass_over_mixed_tasks_has_each_row_once_and_little_padding(world):
    mixture = Mixture([500, 503], 8, "proportional", 0, LENGTHS, world)
    for _ in range(2):
        batches = [next(mixture) for _ in range(len(mixture))]
        assert sorted(row for batch in batches for row in batch) == list(range(1003))
        assert padding(batches) < 0.03
        assert sum(min(batch) < 500 <= max(batch) for batch in batches) > 100
        widths = [max(LENGTHS[row] for row in batch) for batch in batches[: 120 // world * world]]
        pairs = list(zip(widths[::2], widths[1::2], strict=True))
        far = sum(abs(a - b) for a, b in pairs) / len(pairs)
        assert far < 8 if world == 2 else far > 50


@pytest.mark.parametrize("name", DATA)
def test_train_batches_of_each_kind_of_data_are_grouped(name, tmp_path):
    prepare(tmp_path)
    save_rows(tmp_path / "train.jsonl", 300)
    data = DATA[name](tmp_path)
    batches = list(data.train_dataloader())
    masks = [batch["attention_mask"] for batch in batches]
    assert 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks) < 0.12
    different = {tuple(map(int, batch["input_ids"].flatten())) for batch in batches}
    assert len(batches) >= 75
    assert len(different) == len(batches) or "pieces" in name  # of a few tokens, some are the same


def test_lengths_are_those_of_the_longest_list_of_each_row(tmp_path):
    prepare(tmp_path)
    for name in ("text", "choices"):
        data = DATA[name](tmp_path)
        examples = data.examples("train")
        rows = [row["input_ids"] for row in examples]
        expected = [max(map(len, row)) for row in rows] if name == "choices" else list(map(len, rows))
        assert data.lengths(examples) == examples.lengths("input_ids") == expected
