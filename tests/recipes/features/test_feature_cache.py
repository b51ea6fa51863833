"""The cache of features: a row is computed once, and again when anything changed that its features depend on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_models import Collate, Numbers, Slow, bert, sentences
from safetensors.torch import load_file
from torch import nn

import lightning_peft as lp
from lightning_peft.recipes.features import Rows, extract, extraction, rows_of
from lightning_peft.recipes.features.digests import row_digest


def run(folder, model=None, items=None, layer=1, pooling="cls"):
    data = Rows("train", sentences() if items is None else items, Collate(), "labels")
    return extract(model or bert(), [data], folder, layer, pooling, batch_size=4)


def test_a_second_run_reads_the_same_bits(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    assert (first.computed, first.cached, second.computed, second.cached) == (30, 0, 0, 30)
    assert torch.equal(first.values["train"], second.values["train"])
    assert first.cache == second.cache


def test_only_changed_and_added_rows_are_computed(tmp_path):
    run(tmp_path)
    items = sentences()
    items[3] = {"input_ids": [*items[3]["input_ids"], 7], "labels": 0}
    items[5] = {**items[5], "labels": 1 - items[5]["labels"]}  # the label is no part of a row's features
    items.insert(0, {"input_ids": [9, 9, 9], "labels": 1})
    found = run(tmp_path, items=items)
    assert (found.computed, found.cached) == (2, 29)
    torch.testing.assert_close(found.values["train"], run(tmp_path / "new", items=items).values["train"])


def change(model, name):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] += 1e-4  # too little for a digest of rounded samples
    return model


def set_epsilon(model):
    model.encoder.layer[0].output.LayerNorm.eps = 1e-6
    return model


def set_scale(model):
    model.embeddings._scale = 2.0
    return model


def inject(model, method):
    lp.inject(model, method)
    for name, parameter in model.named_parameters():
        if ".peft." in name:
            nn.init.ones_(parameter)
    return model


LoRA = lp.LoRA(rank=2, targets=["encoder.layer.0.attention.self.query"])
LATER = lp.LoRA(rank=2, targets=["encoder.layer.2.attention.self.query"])
CHANGES = {
    "embeddings": lambda: change(bert(), "embeddings.word_embeddings.weight"),
    "block": lambda: change(bert(), "encoder.layer.1.output.dense.bias"),
    "setting": lambda: set_epsilon(bert()),
    "private setting": lambda: set_scale(bert()),
    "type": lambda: bert().bfloat16(),
    "adapter": lambda: inject(bert(), LoRA),
}
NO_CHANGES = {
    "later block": lambda: change(bert(), "encoder.layer.2.output.dense.bias"),
    "head": lambda: change(bert(), "pooler.dense.weight"),
    "mode": lambda: bert().train(),
    "frozen": lambda: bert().requires_grad_(False),
    "later adapter": lambda: inject(bert(), LATER),
}


@pytest.mark.parametrize("make", CHANGES.values(), ids=CHANGES)
def test_what_features_depend_on_is_in_the_key(make, tmp_path):
    run(tmp_path)
    found = run(tmp_path, make())
    assert (found.computed, found.cached) == (30, 0)


@pytest.mark.parametrize("make", NO_CHANGES.values(), ids=NO_CHANGES)
def test_what_follows_the_layer_is_not(make, tmp_path):
    first = run(tmp_path)
    found = run(tmp_path, make())
    assert (found.computed, found.cached) == (0, 30)
    assert torch.equal(found.values["train"], run(tmp_path / "new", make()).values["train"])
    assert torch.equal(found.values["train"], first.values["train"])


def test_rows_of_one_length_share_batches_so_that_none_is_padded(tmp_path):
    seen = []

    class Watch(Collate):
        def __call__(self, items):
            seen.append([len(item["input_ids"]) for item in items])
            return super().__call__(items)

    extract(bert(), [Rows("train", sentences(), Watch(), "labels")], tmp_path, batch_size=4)
    batches = seen[2:]  # after one row for the width and one for the key
    assert [len(batch) for batch in seen[:2]] == [1, 1]
    assert all(len(set(batch)) == 1 and len(batch) <= 4 for batch in batches)
    assert sum(batches, []) == sorted(len(item["input_ids"]) for item in sentences()[:-1])
    assert len(batches) == sum(-(-sum(batches, []).count(n) // 4) for n in set(sum(batches, [])))


def test_layer_and_pooling_are_in_the_key(tmp_path):
    folders = {run(tmp_path, **kind).cache for kind in ({}, {"layer": 0}, {"pooling": "mean"})}
    assert len(folders) == 3
    assert run(tmp_path, layer=-2).cached == 30  # the same block, counted from the end


def test_buffers_and_what_runs_before_are_in_the_key_wherever_they_were_defined(tmp_path):
    class Late(nn.Module):
        def __init__(self, mean):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(6)
            self.norm.running_mean.fill_(mean)

        def forward(self, x):
            return self.layer(self.norm(x))

    data = rows_of(Numbers(9), "train", "labels")
    found = [extract(Late(mean), [data], tmp_path, "layer", None) for mean in (0.0, 1.0)]
    assert [one.computed for one in found] == [9, 9]
    assert not torch.equal(found[0].values["train"], found[1].values["train"])


def test_splits_share_rows(tmp_path):
    splits = [Rows(name, sentences(), Collate(), "labels") for name in ("train", "test")]
    found = extract(bert(), splits, tmp_path)
    assert (found.computed, found.cached) == (30, 0)
    assert torch.equal(found.values["train"], found.values["test"])


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(extraction, "SHARD_ROWS", 9)


@pytest.mark.usefixtures("small_shards")
def test_shards_are_bounded_and_hold_whole_rows(tmp_path):
    found = run(tmp_path)
    shards = [load_file(path) for path in found.cache.glob("*.safetensors")]
    assert len(shards) > 3
    assert all(len(shard["digests"]) == len(shard["features"]) <= 9 for shard in shards)
    assert sum(len(shard["features"]) for shard in shards) == 30
    assert not [path for path in found.cache.iterdir() if path.suffix not in (".safetensors", ".json")]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("lost", [0, 2, -1])
def test_a_missing_shard_is_computed_again_with_the_same_bits(lost, tmp_path):
    first = run(tmp_path)
    files = {path.name: path.read_bytes() for path in first.cache.glob("*.safetensors")}
    (first.cache / sorted(files)[lost]).unlink()
    second = run(tmp_path)
    assert 0 < second.computed <= 9
    assert torch.equal(first.values["train"], second.values["train"])
    assert {path.name: path.read_bytes() for path in first.cache.glob("*.safetensors")} == files


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_a_damaged_shard_is_computed_again_with_a_warning(damage, tmp_path):
    first = run(tmp_path)
    path = min(first.cache.glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with pytest.warns(UserWarning, match=f"{path.name} is damaged; its rows are computed again"):
        second = run(tmp_path)
    assert torch.equal(first.values["train"], second.values["train"])
    assert path.read_bytes() == content
    assert run(tmp_path).computed == 0


def test_a_digest_is_the_same_in_every_process():
    item = {"b": [1, 2], "a": (torch.arange(3), np.float32(0.5)), "c": {"d": "x", "e": None}, "f": b"\x00"}
    assert row_digest(item).hex() == "5ad986f993d8cad6826dc02e26b61dd2"
    assert row_digest(dict(reversed(item.items()))) == row_digest(item)


def test_rows_that_differ_in_any_way_have_different_digests():
    x = torch.arange(4)
    kinds = [1, 1.0, "1", True, [1], [[1]], {"a": 1}, {"b": 1}, x, x.float(), x.view(2, 2), x.numpy(), x.tolist()]
    long = torch.zeros(5000)
    kinds += [long, long.index_fill(0, torch.tensor(2500), 1.0), float("nan"), None, b"1"]
    assert len({row_digest(kind) for kind in kinds}) == len(kinds)
    assert row_digest(x) == row_digest(torch.arange(8)[:4]) == row_digest(torch.stack([x, x], 1)[:, 0])


def test_what_has_no_digest_is_refused():
    with pytest.raises(TypeError, match="A row holds Linear, of which no digest is known"):
        row_digest({"x": nn.Linear(1, 1)})


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    def command(folder):
        words = ["--model", "feature_models.Slow", "--layer", "net", "--pooling", "null"]
        words += ["--data", "feature_models.Numbers", "--data.rows", "2000", "--accelerator", "cpu"]
        places = ["--cache", str(tmp_path / folder), "--output", str(tmp_path / folder / "out")]
        return [sys.executable, "-m", "lightning_peft", "features", *words, *places]

    here = Path(__file__)
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here.parents[3]}", "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command("killed"), env=environment | {"SLOW": "0.03"}, start_new_session=True)
    while not list((tmp_path / "killed").rglob("*.safetensors")):
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    subprocess.run(command("killed"), env=environment, check=True)
    report = json.loads((tmp_path / "killed" / "out" / "report.json").read_text())
    assert report["rows"]["cached"] >= 1000
    assert report["rows"]["computed"] == 6000 - report["rows"]["cached"] > 0
    splits = [rows_of(Numbers(2000), name, "labels") for name in ("train", "validation", "test")]
    one, other = (extract(Slow(), splits, tmp_path / folder, "net", None) for folder in ("killed", "undisturbed"))
    assert (one.computed, other.computed) == (0, 6000)
    assert all(torch.equal(one.values[name], other.values[name]) for name in one.values)
