"""python benchmarks/evidence_below.py --data FOLDER: why are some methods below the feature-based bracket?

On TREC, with the first seed of benchmarks/evidence.py and the rate that it chose: the training that it has, one of five
epochs, and one in which prompts and prefixes learn ten times as fast as the head, which has a third of the rate. Writes
results/evidence_below.json.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import evidence
import evidence_encoder
import evidence_methods
import harness
import torch
from evidence_fit import Fit

FASTER = {"p_tuning_v2": {"*.p_tuning_v2.*": 10.0}, "prompt_tuning": {"*.prompt_tuning.*": 10.0}}
METHODS = ["output_layers", *FASTER]


def accuracy(method: str, rate: float, epochs: int, factors: dict[str, float], settings: dict[str, Any]) -> float:
    """Return the test accuracy of one training."""
    section = evidence_methods.peft_section(method) | ({"lr_factors": factors} if factors else {})
    with tempfile.TemporaryDirectory() as folder:
        data = evidence_encoder.data_of(settings["data"] / "trec", 1, settings, Path(folder))
        build = partial(evidence_encoder.built, evidence_encoder.CLASSES["trec"])
        fit = Fit(build, evidence_methods.strategy(section), data, rate, 1, epochs)
        return fit.score("test", "test")["accuracy"]


def main() -> None:
    options = evidence.arguments()
    torch.set_num_threads(1)
    found = evidence.stored(options)
    for method in METHODS:
        run = evidence.run_of(found, (1, method, "trec"))
        harness.write({method: {"as measured": run["test"]}}, "evidence_below")
        cases = {"five epochs": (rate := run["rate"], 5, {})}
        if method in FASTER:
            cases["prompts ten times as fast"] = (rate / 3, 1, FASTER[method])
        for name, case in cases.items():
            result = accuracy(method, *case, vars(options))
            print(method, name, result, flush=True)
            harness.write({method: {name: result}}, "evidence_below")


if __name__ == "__main__":
    main()
