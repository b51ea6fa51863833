"""Reads results/evidence.json: means, deviations and paired differences of its runs. Needs nothing but Python."""

import json
import statistics
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "results" / "evidence.json"
SETS = {"sst2": "SST-2", "trec": "TREC", "ag_news": "AG News"}
DECODER = "e2e"
# What tables and charts call methods; others are called by their stem.
TITLES = {
    "adalora": "AdaLoRA", "bitfit": "BitFit", "bottleneck": "Houlsby's adapters", "dora": "DoRA", "fedpara": "FedPara",
    "features": "feature-based", "features_mean": "mean features", "full_fine_tuning": "full fine-tuning",
    "ia3": "(IA)³", "krona": "KronA", "krona_block": "KronA^B", "krona_block_residual": "KronA^B_res",
    "llama_adapter": "LLaMA-Adapter", "llama_adapter_2": "LLaMA-Adapter V2", "lora": "LoRA", "mam": "MAM adapters",
    "multitask_prompt_tuning": "multitask prompts", "p_tuning": "P-tuning", "p_tuning_v2": "P-tuning v2",
    "qlora": "QLoRA",
}  # fmt: skip
# Quantiles of Student's t for an interval of 95 %, by degrees of freedom; beyond the last, that of the last.
STUDENT = [0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20]
Runs = dict[str, dict[str, dict[str, dict[str, Any]]]]


def title(method: str) -> str:
    """Return what tables and charts call a method."""
    return TITLES.get(method, method.replace("_", " "))


def load(path: Path = FILE) -> Runs:
    return json.loads(path.read_text())["runs"] if path.exists() else {}


def each(runs: Runs, name: str, method: str, key: str = "test") -> dict[str, float]:
    """Return a value of the runs of a method on a set by seed."""
    found = runs.get(name, {}).get(method, {})
    return {seed: run[key] for seed, run in sorted(found.items()) if key in run}


def mean(values: Any) -> float:
    return statistics.mean(values)


def spread(values: dict[str, float], unit: float = 100, digits: int = 1) -> str:
    """Return mean and standard deviation of the seeds, as text."""
    if not values:
        return ""
    text = f"{unit * mean(values.values()):.{digits}f}"
    return text + (f" ± {unit * statistics.stdev(values.values()):.{digits}f}" if len(values) > 1 else "")


def average(runs: Runs, method: str, key: str, sets: Any = SETS) -> float | None:
    """Return the mean of a cost over sets and seeds."""
    values = [value for name in sets for value in each(runs, name, method, key).values()]
    return mean(values) if values else None


def differences(runs: Runs, method: str, other: str, sets: Any) -> list[list[float]]:
    """Return by how much a method's result is above another's: for each set, a value for each seed that both ran."""
    found = []
    for name in sets:
        own, theirs = each(runs, name, method), each(runs, name, other)
        if values := [own[seed] - theirs[seed] for seed in own if seed in theirs]:
            found.append(values)
    return found


def interval(groups: list[list[float]]) -> tuple[float, float]:
    """Return the mean over sets and half of its 95 % interval, for these sets: seeds alone are drawn.

    The variance is that of the seeds within sets, the same for all sets. With one seed the interval is infinite.
    """
    center = mean([mean(values) for values in groups])
    freedom = sum(len(values) - 1 for values in groups)
    if freedom == 0:
        return center, float("inf")
    variance = sum((value - mean(values)) ** 2 for values in groups for value in values) / freedom
    error = (variance * sum(1 / len(values) for values in groups)) ** 0.5 / len(groups)
    return center, STUDENT[min(freedom, len(STUDENT) - 1)] * error
