"""``write_report`` writes the ``report.json`` of a run of ``lightning-peft fit``; others read metrics from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..core.adapter_folder import CONFIG, WEIGHTS, read_files
from ..core.console import echo
from ..core.injection_record import get_record
from ..summary import size, summary
from .test_rows import TestRows

REPORT = "report.json"
_PACKAGE = __name__.partition(".")[0]
_SIZES = ("trainable_parameters", "total_parameters", "checkpoint_bytes", "adapter_bytes")


def write_report(
    model: nn.Module, logs: Path, best: str, results: dict[str, float], adapter: Path | str | None, rows: TestRows
) -> None:
    """Write and print the results of a fit.

    Args:
        model: The trained module.
        logs: Folder of the run.
        best: Path of the best checkpoint, or nothing.
        results: Of the validation, and of the test, if there was one.
        adapter: Path or address of the adapter's folder, if it has one.
        rows: What the test saw.
    """
    counts = summary(model)
    report: dict[str, Any] = dict(results)
    report |= {"trainable_parameters": counts.trainable, "total_parameters": counts.total}
    lines = [
        (name.replace("_", " "), rows.accuracy(value) if name == "test_accuracy" else f"{value:.4f}")
        for name, value in results.items()
    ]
    lines += [("trainable parameters", f"{counts.trainable:,} of {counts.total:,}")]
    if best:
        report |= {"checkpoint": best, "checkpoint_bytes": _bytes_of(Path(best))}
        said = f"{best} ({size(report['checkpoint_bytes'])}, the full model has {size(counts.base_bytes)})"
        lines += [("checkpoint", said)]
    if adapter is not None:
        report |= {
            "adapter": str(adapter),
            "adapter_bytes": sum(map(len, read_files(adapter, (WEIGHTS, CONFIG)).values())),
        }
        lines += [("adapter", f"{adapter} ({size(report['adapter_bytes'])})")]
    logs.mkdir(parents=True, exist_ok=True)
    (logs / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    echo("\n".join(f"{name:<22}{value}" for name, value in lines))


def show_next(model: nn.Module, data: Any, logs: Path, adapter: Path | str | None, rows: TestRows) -> None:
    """Print what the model says of the first test rows, and how its adapter is used.

    Args:
        model: The trained module.
        data: Its data, if there is some.
        logs: Folder of the run.
        adapter: Path or address of the adapter's folder, if it has one.
        rows: What the test saw.
    """
    if examples := rows.examples(data):
        echo("\n".join(["\nThe first test rows, and what is predicted:", *(f"  {line}" for line in examples)]))
    if adapter is None:
        return
    config = logs / "config.yaml"
    if config.is_file() and hasattr(data, "predict_dataloader") and hasattr(data, "splits"):
        echo("\nPredict rows of your own, and load the adapter in Python:")
        echo(f"  lightning-peft predict --config {config} --ckpt_path {adapter} \\")
        ending = "jsonl" if hasattr(model, "generate") else "csv"  # conversations are no cells of a table
        echo(f"      --data.predict FILE.{ending} --predictions predictions.{ending}")
    else:
        echo("\nLoad the adapter in Python:")
    for module in _modules_of_own_methods(model):
        echo(f"  import {module}  # defines the method")
    echo(f"  lightning_peft.load_adapter(model, {str(adapter)!r})")


def _modules_of_own_methods(model: nn.Module) -> list[str]:
    """Return the modules that a program has to import before it can load the adapter."""
    record = get_record(model)
    names = [type(method).__module__ for method in record.methods] if record is not None else []
    own = [name for name in dict.fromkeys(names) if name.partition(".")[0] not in (_PACKAGE, "__main__")]
    return sorted(own)


def read_metrics_file(path: Path) -> dict[str, float]:
    """Return the results in a file: numbers by name, those of sizes left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no JSON object, or has no result.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; expected numbers by name in JSON, such as the {REPORT} of a run.")
    if not (found := _numbers(_read(path))):
        raise ValueError(f"{path} has no results; expected numbers by name in JSON.")
    return found


def metrics_of(adapter: Path) -> dict[str, float]:
    """Return the results of the run that wrote an adapter folder or a checkpoint; none where it left no report of it.

    A report is of the run's best checkpoint; of another checkpoint it says nothing.

    Raises:
        ValueError: The report is damaged.
    """
    path = (adapter.parent if adapter.is_dir() else adapter.parent.parent) / REPORT
    if not path.is_file():
        return {}
    report = _read(path)
    written = {Path(str(report.get(key))).name for key in ("adapter", "checkpoint")}
    return _numbers(report) if adapter.name in written else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}).") from error
    if not isinstance(report, dict):
        raise ValueError(f"{path} is no JSON object, expected numbers by name.")
    return report


def _numbers(report: dict[str, Any]) -> dict[str, float]:
    sizes = {key: value for key, value in report.items() if key not in _SIZES}
    return {key: value for key, value in sizes.items() if type(value) in (int, float)}


def _bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
