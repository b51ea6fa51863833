"""python docs/write_results.py [--check]: fills the tables of results in pages, from benchmarks/results/*.json.

A table stands between <!-- measured: NAME --> and <!-- /measured -->, each on a line of its own. NAME is the stem of a
method's page, or one of the names in `TABLES`. With --check nothing is written, and a page that differs is an error.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import evidence_claims  # noqa: E402
from evidence_summary import DECODER, FILE, SETS, Runs, average, each, load, spread, title  # noqa: E402

MARKED = re.compile(r"(<!-- measured: ([\w-]+) -->\n).*?(<!-- /measured -->)", re.DOTALL)
NAMES: dict[str, dict[str, str]] = yaml.safe_load((ROOT / "docs" / "methods.yaml").read_text())
FRAMES = ("features", "full_fine_tuning")
# Pages with other methods than that of their stem; benchmarks of costs with other names than methods.
OF_A_PAGE = {"krona_block": ["krona_block", "krona_block_residual"], "feature_based": ["features", "features_mean"]}
OF_A_PAGE |= {"llama_adapter": ["llama_adapter", "llama_adapter_2"]}
COST_NAMES = {"prefix_tuning": "prefix_mlp", "krona_block_residual": ""}
KINDS = {"bert": "a BERT-like classifier", "llama": "a Llama-like decoder"}


def pages() -> list[Path]:
    """Return the pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, runs: Runs) -> str:
    """Return a page with its tables."""
    return MARKED.sub(lambda found: found[1] + table(found[2], runs).strip() + "\n" + found[3], text)


def table(name: str, runs: Runs) -> str:
    """Return the table of a name."""
    return TABLES[name](runs) if name in TABLES else of_method(name, runs)


def rows(lines: list[list[str]]) -> str:
    """Return a table in Markdown, of which the first line is the head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, unit: float = 1, digits: int = 0) -> str:
    """Return a number in a unit, or nothing."""
    return "" if value is None else f"{value / unit:,.{digits}f}"


def of_method(stem: str, runs: Runs) -> str:
    """Accuracies and costs of a page's methods, between feature-based and full fine-tuning."""
    methods = list(dict.fromkeys([*OF_A_PAGE.get(stem, [stem]), *FRAMES]))
    parts = [costs(stem)]
    if any(each(runs, name, method) for name in SETS for method in methods[: -len(FRAMES) or None]):
        parts.insert(0, accuracies(methods, runs))
    if any(each(runs, DECODER, method) for method in methods if method not in FRAMES):
        parts.insert(1, decoder([*methods[: -len(FRAMES)], "full_fine_tuning"], runs))
    if len(parts) > 1:
        parts.append("[How it was measured](../evidence.md): mean ± standard deviation of the seeds.")
    return "\n\n".join(part for part in parts if part) or "No results yet."


def accuracies(methods: list[str], runs: Runs) -> str:
    """Return the table of the classification sets."""
    head = ["test accuracy, %", *SETS.values(), "trained", "CPU s", "memory, MB", "adapter, MB", "checkpoint, MB"]
    return rows([head, *([title(method), *values(method, runs)] for method in methods)])


def values(method: str, runs: Runs) -> list[str]:
    """Accuracy on each set and the mean costs of a method, as text."""
    keys = {"trained": (1, 0), "cpu_seconds": (1, 0), "memory": (1e6, 0), "adapter_bytes": (1e6, 2)}
    keys |= {"checkpoint_bytes": (1e6, 1)}
    costs = [number(average(runs, method, key), unit, digits) for key, (unit, digits) in keys.items()]
    return [*(spread(each(runs, name, method)) for name in SETS), *costs]


def decoder(methods: list[str], runs: Runs) -> str:
    """Return the table of the decoder."""
    head = ["E2E, small decoder", "test loss", "validation loss", "trained", "CPU s", "memory, MB", "adapter, MB"]
    lines = []
    for method in dict.fromkeys(methods):
        keys = {"trained": (1, 0), "cpu_seconds": (1, 0), "memory": (1e6, 0), "adapter_bytes": (1e6, 3)}
        costs = [number(average(runs, method, key, [DECODER]), *unit) for key, unit in keys.items()]
        validation = {seed: -value for seed, value in each(runs, DECODER, method, "validation").items()}
        losses = [spread(values, 1, 3) for values in (each(runs, DECODER, method, "test_loss"), validation)]
        lines.append([title(method), *losses, *costs])
    return rows([head, *lines])


def costs(stem: str) -> str:
    """What a step costs beside that of a frozen base through which a gradient flows, and beside HF PEFT."""
    lines = []
    for file in ("weight_space", "activation_space"):
        found = json.loads((FILE.parent / f"{file}.json").read_text())["results"]
        for kind, text in KINDS.items():
            case = COST_NAMES.get(stem, stem)
            time, bytes_ = (found[part][kind].get(case) for part in ("train", "bytes"))
            if time and bytes_:
                lines.append([text, *factors(time["seconds"]), *factors(bytes_["bytes"])])
    head = ["beside a frozen base", "step", "HF PEFT's step", "bytes for backward", "HF PEFT's bytes"]
    return rows([head, *lines]) if lines else ""


def factors(sides: dict[str, float]) -> list[str]:
    """Return both sides' costs as factors of the floor's."""
    return [f"{sides[side] / sides['floor']:.2f}" if side in sides else "" for side in ("ours", "peft")]


def methods_table(runs: Runs) -> str:
    """One row for each method."""
    lines = [["method", "what trains", "config", "parameters", "adapter, MB", *SETS.values()]]
    for stem, said in NAMES.items():
        measured = values(stem, runs)
        count, size = measured[len(SETS)], measured[-2]
        link = f"[{stem}.yaml](configs/{stem}.yaml)"
        lines.append([said["label"], said["trains"], link, count, size, *measured[: len(SETS)]])
    return rows(lines)


def evidence(runs: Runs) -> str:
    """All methods on the classification sets, in the order of their mean accuracy."""
    methods = {method for name in SETS for method in runs.get(name, {})}
    order = sorted(methods, key=lambda method: -(average(runs, method, "test") or 0))
    return accuracies(order, runs)


def evidence_decoder(runs: Runs) -> str:
    """All methods of the decoder, the best first."""
    methods = sorted(runs.get(DECODER, {}), key=lambda method: average(runs, method, "test_loss", [DECODER]) or 0)
    return decoder(methods, runs) if methods else "No results yet."


def t_few(runs: Runs) -> str:
    """Accuracy with each loss switched off, from benchmarks/t_few.py."""
    found = json.loads((FILE.parent / "t_few.json").read_text())["results"]["tasks"]
    lines = [["task", "losses", "test accuracy, %", "to all three losses, points"]]
    for task, by_loss in found.items():
        for name, row in by_loss.items():
            change = f"{100 * row['to all']:+.1f} ± {100 * row['standard error']:.1f}" if "to all" in row else ""
            lines.append([SETS[task], name, f"{100 * row['accuracy']:.1f}", change])
    return rows(lines)


def below(runs: Runs) -> str:
    """Accuracy of methods below the bracket, when they learn longer or faster."""
    path = FILE.parent / "evidence_below.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text())["results"] if path.exists() else {}
    cases = list(dict.fromkeys(case for by_case in found.values() for case in by_case))
    lines = [[title(m), *(number(by_case.get(case), 0.01, 1) for case in cases)] for m, by_case in found.items()]
    return rows([["test accuracy on TREC, %", *cases], *lines])


def claims(runs: Runs) -> str:
    """Claims of papers, with what was measured."""
    return rows(evidence_claims.lines(runs))


TABLES: dict[str, Callable[[Runs], str]] = {
    "methods": methods_table,
    "evidence": evidence,
    "evidence_decoder": evidence_decoder,
    "evidence_below": below,
    "claims": claims,
    "t_few": t_few,
}


def main(arguments: list[str]) -> Any:
    """Write, or check; return what is wrong."""
    runs, stale = load(), []
    for page in pages():
        text = page.read_text()
        new = filled(text, runs)
        if new != text:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in arguments:
                page.write_text(new)
    if "--check" in arguments and stale:
        return f"Not as benchmarks/results/ has it: {', '.join(stale)}. Run python docs/write_results.py."
    print("Written:", ", ".join(stale) or "nothing, as all tables are up to date")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
