"""Every row goes to one client at most, and what a client holds out it never trains on."""

import json

import numpy as np
import pytest
from datasets import Dataset

from lightning_peft.recipes.federated import Dirichlet, Files, IndexLists
from lightning_peft.recipes.federated.partition import Shard
from lightning_peft.tasks.data.reading.read_table import read_table
from lightning_peft.tasks.data.reading.splits import Splits
from lightning_peft.tasks.data.reading.tables import Table


def table(labels):
    rows = Dataset.from_dict({"label": list(labels)})
    return Table(source="t.csv", dataset=rows, positions=range(len(rows)))


def labels(count=400, kinds=4, seed=3):
    return [f"label {i}" for i in np.random.default_rng(seed).integers(kinds, size=count)]


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_shares_give_each_row_to_one_client(alpha):
    parts = Dirichlet(clients=5, alpha=alpha, min_rows=4).indices(labels())
    assert sorted(row for part in parts for row in part) == list(range(400))
    assert min(map(len, parts)) >= 4
    assert parts == Dirichlet(clients=5, alpha=alpha, min_rows=4).indices(labels())
    assert parts != Dirichlet(clients=5, alpha=alpha, min_rows=4, seed=1).indices(labels())


def test_a_small_alpha_makes_clients_that_differ():
    def spread(alpha):  # mean distance of the clients' shares of labels from those of all rows
        given = np.array(labels(4000))
        parts = Dirichlet(clients=8, alpha=alpha).indices(given.tolist())
        shares = np.array([[(given[part] == name).mean() for name in np.unique(given)] for part in parts])
        return np.abs(shares - 0.25).sum(1).mean()

    assert spread(0.1) > 0.8 > 0.3 > spread(10.0) > spread(1000.0)


def test_a_client_gets_its_rows_in_their_order():
    given, partition = table(labels()), Dirichlet(clients=3, alpha=0.5)
    parts = partition.indices(labels())
    assert partition.count == 3
    assert partition.rows(given, 1).numbers == [given.numbers[row] for row in parts[1]]


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="20 rows give 5 clients no 10 rows each at alpha=0.1. Take fewer clients"):
        Dirichlet(clients=5, alpha=0.1, min_rows=10).indices(labels(20))
    for wrong in ({"clients": 1}, {"alpha": 0.0}, {"min_rows": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Dirichlet(**wrong)


def test_index_lists_say_who_has_what(tmp_path):
    path = tmp_path / "lists.json"
    for content in ([[4, 0], [1, 2]], {"alpha": 0.1, "clients": [[4, 0], [1, 2]]}):
        path.write_text(json.dumps(content))
        partition = IndexLists(path=str(path))
        assert partition.count == 2
        assert partition.rows(table("abcde"), 0).rows == [{"label": "e"}, {"label": "a"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[0, 1], [1]], "gives a row twice"),
        ([[0], [-1]], "something else than row numbers"),
        ([[0], ["1"]], "something else than row numbers"),
        ([[0, 1]], "two clients or more"),
        ({"rows": []}, "two clients or more"),
        ([[0], [5]], "names row 5, but 't.csv' ends with row 4"),
    ],
)
def test_wrong_index_lists_are_refused(tmp_path, content, message):
    path = tmp_path / "lists.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        IndexLists(path=str(path)).rows(table("abcde"), 0)


def test_the_lists_at_hand_fit_their_files(shared):
    lists = shared / "data" / "federated_splits" / "ag_news_train_dirichlet0.1_10clients.json"
    if not lists.is_file():
        pytest.skip("no index lists among the real data")
    rows = read_table(str(shared / "data" / "ag_news" / "train.jsonl.gz"))
    partition = IndexLists(path=str(lists))
    assert partition.count == 10
    assert sum(len(partition.rows(rows, client)) for client in range(10)) == len(rows)


def test_each_client_may_have_a_file(tmp_path):
    for name, text in {"a": "label\nx\ny\n", "b": "label\nz\n"}.items():
        (tmp_path / f"{name}.csv").write_text(text)
    partition = Files(paths=[str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    assert partition.count == 2
    assert partition.rows(table("unused"), 1).rows == [{"label": "z"}]
    with pytest.raises(ValueError, match="two different files or more"):
        Files(paths=["a.csv", "a.csv"])


@pytest.mark.parametrize(("rows", "fraction", "held"), [(10, 0.3, 3), (2, 0.1, 1), (7, 0.5, 4)])
def test_a_shard_holds_rows_out(rows, fraction, held):
    splits = Splits({"train": "whole.csv", "validation": None, "test": None, "predict": None}, {}, 0.1)
    shard = Shard(splits, table(range(rows)), fraction, seed=5)
    train, test = (shard.rows(split).numbers for split in ("train", "test"))
    assert len(test) == held
    assert sorted(train + test) == list(range(1, rows + 1))
    assert test == Shard(splits, table(range(rows)), fraction, seed=5).rows("test").numbers
    assert not shard.has("validation")
    with pytest.raises(ValueError, match="A client has no rows for 'validation'"):
        shard.rows("validation")


def test_a_client_with_too_few_rows_is_refused():
    splits = Splits({"train": None}, {}, 0.1)
    with pytest.raises(ValueError, match="leaves 1 rows, too few to train on and to test"):
        Shard(splits, table("a"), 0.2, seed=0)
