"""python benchmarks/evidence.py --data FOLDER: every method on three sets of text and a decoder's, over three seeds.

Each run is a process of its own, forked after the imports; what results/evidence.json holds already is not run again,
and what fails or is killed is listed as missing and runs at the next call. With the first seed a run tries three
learning rates, a factor of three apart around that of the method's configuration, and one more beyond the best if that
is at the edge, all judged by validation rows; test rows see the chosen one alone, and so do the runs of other seeds. A
seed draws the train rows, their order and the first values, the same for all methods. docs/evidence.md says more.
"""

import argparse
import json
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  imported before processes are forked
import evidence_decoder
import evidence_encoder
import evidence_fit
import evidence_methods
import harness
import lightning.pytorch as pl
import torch

import lightning_peft as lp

ROOT = Path(__file__).parents[2]
STEPS = (1 / 3, 1, 3)  # by which learning rates differ from that of a configuration
SETTINGS = {
    "train_rows": 640, "validation_rows": 300, "test_rows": 600, "max_length": 32, "batch_size": 8, "epochs": 1,
    "decoder_rows": 800, "decoder_test_rows": 200, "decoder_batch_size": 8,
}  # fmt: skip
BRACKETS = ["majority", "features", "features_mean"]
METHODS = {name: [*BRACKETS, *evidence_methods.ENCODER] for name in evidence_encoder.CLASSES}
METHODS["e2e"] = evidence_decoder.METHODS
Run = tuple[int, str, str]  # seed, method, set


def wanted(options: argparse.Namespace) -> Iterator[Run]:
    """All runs: those of a seed before those of the next, and those of a method together."""
    methods = list(dict.fromkeys(method for each in METHODS.values() for method in each))
    for seed in range(1, options.seeds + 1):
        for method in options.methods or methods:
            yield from ((seed, method, name) for name in options.sets if method in METHODS[name])


def stored(options: argparse.Namespace) -> dict[str, Any]:
    """What the file holds, which must be of the same settings."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    if not options.output.exists():
        return {"where": harness.environment(), "settings": settings, "runs": {}}
    found = json.loads(options.output.read_text())
    if found["settings"] != settings:
        raise SystemExit(f"{options.output} is of the settings {found['settings']}, not {settings}. Give --output.")
    return found


def missing(options: argparse.Namespace, found: dict[str, Any]) -> list[Run]:
    return [run for run in wanted(options) if run_of(found, run) is None]


def run_of(found: dict[str, Any], run: Run) -> dict[str, Any] | None:
    seed, method, name = run
    return found["runs"].get(name, {}).get(method, {}).get(str(seed))


def keep(run: Run, result: dict[str, Any], options: argparse.Namespace) -> None:
    """Add a run to the file, which a kill leaves whole."""
    seed, method, name = run
    found = stored(options)
    found["runs"] = harness.merge(found["runs"], {name: {method: {str(seed): result}}})
    new = options.output.with_suffix(".new")
    new.write_text(harness.as_json(found) + "\n")
    os.replace(new, options.output)


def rates(run: Run, found: dict[str, Any]) -> list[float]:
    """Learning rates to try: the one that the first seed chose, if it ran."""
    seed, method, name = run
    first = run_of(found, (1, method, name))
    if seed > 1 and first is not None:
        return [first["rate"]] if "rate" in first else []
    rate = evidence_decoder.RATES[method] if name == "e2e" else evidence_methods.learning_rate(method)
    return [rate * step for step in STEPS]


def work(run: Run, chosen: list[float], options: argparse.Namespace) -> None:
    """Run in this process, and keep the result."""
    seed, method, name = run
    torch.set_num_threads(1)
    module = evidence_decoder if name == "e2e" else evidence_encoder
    result = module.run(method, name, seed, chosen, vars(options))
    keep(run, result, options)


def import_all() -> None:
    """Import what a run imports when it needs it, so that no run has the seconds and the memory of that."""
    model, batch = harness.bert(small=True)
    lp.inject(model, lp.LoRA(targets=["all-linear"]))
    with torch.no_grad():
        model(**batch)
    torch.optim.AdamW(harness.trained(model))
    pl.Trainer(accelerator="cpu", **evidence_fit.QUIET)


def start(run: Run, options: argparse.Namespace) -> bool:
    """Run in a process of its own; return whether it ended well."""
    found, begin = stored(options), time.perf_counter()
    if run[0] > 1 and run_of(found, (1, *run[1:])) is None:
        return False  # the first seed chooses the rate
    chosen = [] if run[1] in (*BRACKETS, "base") else rates(run, found)
    process = multiprocessing.get_context("fork").Process(target=work, args=(run, chosen, options))
    process.start()
    process.join()
    result = run_of(stored(options), run) if process.exitcode == 0 else None
    print(*run, result or f"FAILED: {process.exitcode}", f"{time.perf_counter() - begin:.0f} s", flush=True)
    return result is not None


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "shared" / "data", help="folder of the sets")
    parser.add_argument("--models", type=Path, default=ROOT / "shared" / "models", help="folder with tinystories-656k")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "evidence.json")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="folder for the decoder's base")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--methods", nargs="+", help="of them alone")
    parser.add_argument("--missing", action="store_true", help="list what has not run, and end")
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads would not live on in forked processes
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if not options.missing:
        import_all()
        for run in missing(options, stored(options)):
            start(run, options)
    left = missing(options, stored(options))
    print(f"{len(left)} of {len(list(wanted(options)))} runs are missing:", *("/".join(map(str, run)) for run in left))


if __name__ == "__main__":
    main()
