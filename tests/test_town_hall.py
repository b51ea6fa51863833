"""The data set of the quick start: made by its script, and no part of a test message is in what is trained on."""

import csv
import importlib.util
import shutil
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples/town_hall"
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def derive():
    spec = importlib.util.spec_from_file_location("town_hall_derive", FOLDER / "derive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(split):
    with (FOLDER / f"requests_{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_script_writes_the_very_files(derive, tmp_path, monkeypatch):
    shutil.copytree(FOLDER / "parts", tmp_path / "parts")
    derive.parts.cache_clear()
    monkeypatch.setattr(derive, "FOLDER", tmp_path)
    for split in SPLITS:
        derive.write_requests(split, derive.random.Random(f"requests {split}"))
        name = f"requests_{split}.csv"
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_each_department_has_as_many_messages(derive):
    for split in SPLITS:
        counts = Counter(row["label"] for row in rows(split))
        assert counts == dict.fromkeys(derive.DEPARTMENTS, derive.SHARES[split][2])
        assert len({row["text"] for row in rows(split)}) == sum(counts.values())


def test_no_request_or_mention_is_in_two_splits_nor_like_one_of_another(derive):
    compared = 0
    for department in derive.DEPARTMENTS:
        found = derive.parts(department)
        for kind, limit in ((0, derive.LIKE), (1, 1)):
            for split in SPLITS:
                others = [text for other in SPLITS if other != split for text in found[other][kind]]
                likest = max(derive.likeness(text, other) for text in found[split][kind] for other in others)
                assert likest < limit
                compared += 1
    assert compared == 8 * 2 * 3


def test_a_test_message_asks_for_what_no_other_asks_for(derive):
    for department in derive.DEPARTMENTS:
        texts = [row["text"] for row in rows("test") if row["label"] == department]
        asked = derive.parts(department)["test"][0]
        assert Counter(sum(request in text for text in texts) for request in asked) == {1: 64}
        assert {sum(request in text for request in asked) for text in texts} == {2}


def test_test_messages_are_not_near_any_train_message(derive):
    train = [row["text"] for row in rows("train")]
    nearest = [max(derive.likeness(row["text"], other) for other in train) for row in rows("test")]
    assert len(nearest) == 256
    assert max(nearest) < 0.5
