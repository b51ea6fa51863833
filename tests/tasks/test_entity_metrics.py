"""Entities beside rules written afresh, and beside cases that were counted by hand."""

from __future__ import annotations

import random

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_peft.tasks.entity_metrics import EntityF1, EntityMetric, EntityPrecision, EntityRecall, split_tags

IOB = ["O", "B-a", "I-a", "B-b", "I-b"]
IOBES = ["O", *(f"{place}-{kind}" for kind in "ab" for place in "BIES")]
BILOU = ["O", *(f"{place}-{kind}" for kind in "ab" for place in "BILU")]
PLAIN = ["O", "a", "b"]


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """Return the first and last word and the type of each entity, tag after tag."""
    found, first, place_before, kind_before = set(), None, "O", None
    for position, tag in enumerate([*tags, "O"]):
        place, _, kind = tag.rpartition("-") if tag != "O" else ("O", "", None)
        new = place in ("B", "S", "U") or place_before in ("E", "S", "L", "U", "O") or kind != kind_before
        if first is not None and (tag == "O" or new):
            found.add((first, position - 1, kind_before))
            first = None
        if tag != "O" and new:
            first = position
        place_before, kind_before = place, kind
    return found


def measured(tags: list[str], predicted: list[str], true: list[str]) -> list[float]:
    metrics: list[EntityMetric] = [kind(len(tags)) for kind in (EntityF1, EntityPrecision, EntityRecall)]
    rows = [torch.tensor([[tags.index(tag) for tag in row]]) for row in (predicted, true)]
    for metric in metrics:
        metric.read_tags(tags)
        metric.update(*rows)
    return [metric.compute().item() for metric in metrics]


@pytest.mark.parametrize(
    ("tags", "predicted", "true", "right", "found", "real"),
    [
        (IOB, "B-a I-a O B-b", "B-a I-a O B-b", 2, 2, 2),
        (IOB, "I-a I-a O I-b", "B-a I-a O B-b", 2, 2, 2),  # I after O begins an entity, as conlleval has it
        (IOB, "B-a I-b I-b O", "B-a B-b I-b O", 2, 2, 2),  # and so does I of another type
        (IOB, "B-a B-a O O", "B-a I-a O O", 0, 2, 1),
        (IOB, "B-a I-a I-a O", "B-a I-a O O", 0, 1, 1),  # one end is wrong
        (IOB, "B-b I-b O O", "B-a I-a O O", 0, 1, 1),  # the type is wrong
        (["O", "I-a", "B-a"], "I-a B-a O I-a", "I-a B-a O O", 2, 3, 2),  # IOB1: B where entities touch
        (IOBES, "B-a E-a S-b O", "B-a E-a S-b S-b", 2, 2, 3),
        (IOBES, "B-a E-a E-a O", "B-a E-a S-a O", 2, 2, 2),  # what follows an end is another entity
        (BILOU, "B-a L-a U-b O", "B-a L-a U-b O", 2, 2, 2),
        (PLAIN, "a a b O", "a a b b", 1, 2, 2),  # runs of equal tags
        (["B", "I", "O"], "B I B O", "B I B I", 1, 2, 2),  # entities without a type
        (IOB, "O O O O", "B-a O O O", 0, 0, 1),
        (IOB, "O O O O", "O O O O", 0, 0, 0),
    ],
)
def test_entities_counted_by_hand(
    tags: list[str], predicted: str, true: str, right: int, found: int, real: int
) -> None:
    expected = [2 * right / max(1, found + real), right / max(1, found), right / max(1, real)]
    assert measured(tags, predicted.split(), true.split()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "tags", [IOB, IOBES, BILOU, ["O", "I-a", "B-a", "I-b"]], ids=["IOB2", "IOBES", "BILOU", "IOB1"]
)
def test_batches_of_rows_with_gaps_are_counted_as_the_rules_say(tags: list[str]) -> None:
    draw = random.Random(0)
    metrics: dict[str, EntityMetric] = {"f1": EntityF1(len(tags)), "p": EntityPrecision(len(tags))}
    collection = MetricCollection({**metrics, "r": EntityRecall(len(tags))})  # which share what they count
    for metric in collection.values(copy_state=False):
        metric.read_tags(tags)
    both = {"right": 0, "found": 0, "real": 0}
    of_a = dict(both)
    for _ in range(12):
        rows, length = draw.randint(1, 5), 8
        true, predicted = torch.full((rows, length), -100), torch.randint(len(tags), (rows, length))
        for row in range(rows):
            places = sorted(draw.sample(range(length), draw.randint(0, length)))
            for place in places:
                true[row, place] = draw.randrange(len(tags))
                if draw.random() < 0.7:
                    predicted[row, place] = true[row, place]
            real, found = (entities([tags[x[row, place]] for place in places]) for x in (true, predicted))
            for counts, kinds in ((both, "ab"), (of_a, "a")):
                real_, found_ = ({entity for entity in x if entity[2] in kinds} for x in (real, found))
                for name, amount in (("right", real_ & found_), ("found", found_), ("real", real_)):
                    counts[name] += len(amount)
        collection.update(predicted, true)
    assert both["right"] > 20
    values = {name: value.item() for name, value in collection.compute().items()}
    expected = [2 * both["right"] / (both["found"] + both["real"])]
    expected += [both["right"] / both["found"], both["right"] / both["real"]]
    assert [values["f1"], values["p"], values["r"]] == pytest.approx(expected)
    by_type = collection["f1"].by_type()
    assert by_type["a"] == pytest.approx(2 * of_a["right"] / (of_a["found"] + of_a["real"]))


def test_an_entity_ends_with_its_row() -> None:
    metric = EntityRecall(5)
    metric.read_tags(IOB)
    metric.update(torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0, 1], [2, 0]]))
    assert metric.true.tolist() == [2, 0, 0, 0, 0]


def test_processes_add_their_counts() -> None:
    ranks = [EntityF1(5) for _ in range(2)]
    rows = [[[1, 2, 0]], [[3, 0, 1]]], [[[1, 2, 0]], [[3, 4, 1]]]
    for metric, predicted, true in zip(ranks, *rows, strict=True):
        metric.read_tags(IOB)
        metric.update(torch.tensor(predicted), torch.tensor(true))
    others = [getattr(ranks[1], name) for name in ("right", "predicted", "true")]
    waiting = iter(others)
    ranks[0].dist_sync_fn = lambda x, group=None: [x, next(waiting)]
    ranks[0].distributed_available_fn = lambda: True
    assert ranks[0].compute().item() == pytest.approx(2 * 2 / (3 + 3))
    waiting = iter(others)
    assert ranks[0].by_type() == pytest.approx({"a": 2 * 2 / (2 + 2), "b": 0})


def test_tags_are_needed_and_all_of_them() -> None:
    metric = EntityF1(3)
    with pytest.raises(RuntimeError, match="names of the tags, which tell entities, are not known. Call read_tags"):
        metric.update(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="Got 5 tags for a metric of 3"):
        metric.read_tags(IOB)


def test_tags_are_split_into_place_and_type() -> None:
    assert split_tags(["O", "B-creative-work", "I_geo", "MISC"]) == [
        ("O", None),
        ("B", "creative-work"),
        ("I", "geo"),
        ("I", "MISC"),
    ]
    assert split_tags(["B", "I", "O"]) == [("B", ""), ("I", ""), ("O", None)]
