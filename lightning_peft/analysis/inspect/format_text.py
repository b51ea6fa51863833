"""``report_text`` and ``difference_text`` format the reports of this package for a terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...structure.base_model import name_pattern
from ...summary import size
from .norms import value_range


def report_text(report: Mapping[str, Any]) -> str:
    """Return the report of ``inspect_adapter`` as text."""
    lines = [_method(data) for data in report["methods"]]
    lines += [
        f"also trained: {', '.join(report['also_train']) or 'nothing'}",
        f"base fingerprint: {report['base']}",
        "",
    ]
    for row in report["table"]:
        count = f"{row['places']} x " if row["places"] > 1 else ""
        lines.append(f"{count}{row['kind']}  {row['parameters']:,}" + (f"  {row['name']}" if row["name"] else ""))
        for name, tensor in row["tensors"].items():
            key = name or "values"
            shape = f"({', '.join(map(str, tensor['shape']))})"
            lines.append(f"    {key:<28} {shape:<16} {tensor['dtype']:<9} norm {_range_text(tensor['norm'])}")
    lines += _updates(report["places"])
    for name, ranks in report["ranks"].items():
        histogram = ", ".join(f"{count} of rank {rank}" for rank, count in ranks["histogram"].items())
        lines.append(f"ranks of {name}: {ranks['min']} to {ranks['max']} ({histogram})")
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    kinds = ", ".join(f"{count:,} {kind.removeprefix('torch.')}" for kind, count in report["dtypes"].items())
    return "\n".join([*lines, f"{report['parameters']:,} parameters ({kinds}), {size(report['bytes'])}"])


def _updates(places: Sequence[Mapping[str, Any]]) -> list[str]:
    norms, gates = defaultdict[str, list[Any]](list), defaultdict[str, list[Any]](list)
    for row in places:
        if "norm" in row:
            norms[f"{name_pattern(row['place'])}  {row['name']}"].append(row["norm"])
        if "gates" in row:
            gates[f"{name_pattern(row['place'])}  {row['name']}"] += row["gates"]
    lines = [f"    {kind:<60} {_range_text(value_range(values))}" for kind, values in norms.items()]
    head = ["", "norms of updates s B A:"] if lines else []
    gate_lines = [f"tanh(gate) at {kind}: {_range_text(value_range(values))}" for kind, values in gates.items()]
    return [*head, *lines, "", *gate_lines]


def difference_text(report: Mapping[str, Any]) -> str:
    """Return the report of ``compare_adapters`` as text."""
    base = report["base"]
    lines = [f"one:   {report['one']}", f"other: {report['other']}"]
    lines.append(f"base fingerprint: {base['one']}")
    if base["one"] != base["other"]:
        lines[-1] += f" and {base['other']}: another base, or others of its parameters train"
    lines += [
        f"{row['name']} {row['field']}: {row['one']!r} and {row['other']!r}".lstrip() for row in report["settings"]
    ]
    for side in ("one", "other"):
        lines += [f"only in {side}: {count}{kind}" for kind, count in _counted(report[f"only_in_{side}"])]
    lines += [f"{row['key']}: shape {row['one']} and {row['other']}" for row in report["shapes"]]
    if report["equal"]:
        return "\n".join([*lines, "all tensors are equal, to the bit"])
    for title, rows, name in (("tensors", report["tensors"], "key"), ("updates s B A", report["updates"], "place")):
        if rows:
            total = report["all" if name == "key" else "all_updates"]
            lines += ["", f"{title:<60} {'norm':>9} {'other':>9} {'apart':>9} {'relative':>9} {'cosine':>9}"]
            lines += [_row(row[name], row) for row in rows] + [_row("all", total)]
    return "\n".join(lines)


def _row(name: str, row: Mapping[str, float | None]) -> str:
    figures = (row[key] for key in ("one", "other", "difference", "relative", "cosine"))
    return f"{name:<60} " + " ".join(f"{'-' if value is None else f'{value:.4g}':>9}" for value in figures)


def _counted(keys: Iterable[str]) -> list[tuple[str, str]]:
    counts = defaultdict[str, list[str]](list)
    for name in keys:
        counts[name_pattern(name)].append(name)
    return [(names[0], "") if len(names) == 1 else (kind, f"{len(names)} x ") for kind, names in counts.items()]


def _method(data: Mapping[str, Any]) -> str:
    return f"{data['method']}({', '.join(f'{k}={v!r}' for k, v in data.items() if k != 'method')})"


def _range_text(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.4g}" for value in values)) or "not a number"
