"""Reads the folders of runs: names, logged metrics (``metrics.csv``) and results (``report.json``)."""

from __future__ import annotations

import csv
import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .adapter_values import shorten_names
from .label_placement import Point

METRICS, REPORT = "metrics.csv", "report.json"
Folder = str | os.PathLike[str]


def find_runs(folders: Iterable[Folder], file: str) -> dict[str, Path]:
    """Return the files of runs by the shortest names that tell their folders apart.

    Args:
        folders: Folders with such a file, or above folders ``version_0, version_1, ...`` of which the last one counts;
            or such files.
        file: Its name.

    Raises:
        ValueError: No folder is given.
        FileNotFoundError: A folder holds no such file.
    """
    paths = list(dict.fromkeys(_find(Path(folder), file).resolve() for folder in folders))
    if not paths:
        raise ValueError(f"No run is given; name folders that hold {file}.")
    parents = [path.parent for path in paths]
    without_version = [parent.parent if parent.name.startswith("version_") else parent for parent in parents]
    if len(set(without_version)) == len(without_version):
        parents = without_version
    names = [parents[0].name] if len(parents) == 1 else shorten_names([parent.as_posix() for parent in parents], "/")
    return dict(zip(names, paths, strict=True))


def _find(folder: Path, file: str) -> Path:
    if folder.name == file and folder.is_file():
        return folder
    if (folder / file).is_file():
        return folder / file
    versions = [path for path in folder.glob(f"version_*/{file}") if path.parent.name[8:].isdecimal()]
    if not versions:
        raise FileNotFoundError(
            f"{folder} holds no {file}. Expected the folder of a run, or the one above its folders version_0, "
            f"version_1, ...: CSVLogger writes metrics.csv, `lightning-peft fit` writes report.json."
        )
    return max(versions, key=lambda path: int(path.parent.name[8:]))


def read_metrics_csv(path: Path) -> dict[str, list[Point]]:
    """Return (step, value) pairs by metric, as CSVLogger wrote them."""
    curves: dict[str, list[Point]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("epoch", "step"):
                    curves.setdefault(name, []).append((float(row["step"]), float(value)))
    if not curves:
        raise ValueError(f"{path} holds no values; the run logged nothing yet.")
    return curves


def read_points(folders: Iterable[Folder], metric: str | None = None) -> tuple[str, dict[str, Point]]:
    """Return a metric, and (trained parameters, metric) of runs by name, as ``lightning-peft fit`` reported them.

    Without a name it is the accuracy of the test, or that of the validation where a run was not tested.
    """
    reports = dict[str, dict[str, Any]]()
    paths = find_runs(folders, REPORT)
    for name, path in paths.items():
        report = json.loads(path.read_text(encoding="utf-8"))
        reports[name] = {key: value for key, value in report.items() if isinstance(value, int | float)}
    tested = not all("val_accuracy" in report for report in reports.values()) or all(
        "test_accuracy" in report for report in reports.values()
    )
    chosen = metric or ("test_accuracy" if tested else "val_accuracy")
    return chosen, {
        name: (report["trainable_parameters"], metric_value(report, chosen, str(paths[name])))
        for name, report in reports.items()
    }


def metric_value(values: Mapping[str, Any], metric: str, source: str) -> Any:
    """Return the value of a metric.

    Raises:
        ValueError: There is none; names those that are like it.
    """
    if metric not in values:
        names: Sequence[str] = sorted(values)
        close = difflib.get_close_matches(metric, names, n=5)
        has = f"Close names: {', '.join(close)}." if close else f"It has: {', '.join(names[:20])}."
        raise ValueError(f"{source} has no metric {metric!r}. {has}")
    return values[metric]
