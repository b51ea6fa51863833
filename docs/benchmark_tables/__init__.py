"""What the tables of docs/benchmarks.md are made of; each comes from a function of the results of one benchmark."""

import json
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
Results = dict[str, Any]
NAMES = {
    "adalora": "AdaLoRA", "bitfit": "BitFit", "bottleneck": "Bottleneck", "bottleneck_one": "Bottleneck, one a block",
    "dora": "DoRA", "fedpara": "FedPara (LoHa)", "ia3": "IA3", "ia3_input": "IA3 on inputs", "krona": "KronA (LoKr)",
    "llama_adapter": "LLaMA-Adapter", "lora": "LoRA", "lora_bf16": "LoRA, base in bfloat16",
    "lora_dropout": "LoRA with dropout", "lora_linears": "LoRA, all linear layers",
    "lora_query_value": "LoRA, query and value", "multitask_prompt_tuning": "Multitask prompt tuning",
    "p_tuning": "P-tuning", "p_tuning_v2": "P-tuning v2", "parallel_adapter": "Parallel adapter",
    "prefix": "Prefix tuning", "prefix_mlp": "Prefix tuning with its perceptron", "prefix_tuning": "Prefix tuning",
    "prompt_tuning": "Prompt tuning",
}  # fmt: skip


class Table(NamedTuple):
    """A table, and which columns of numbers a chart shows.

    Attributes:
        head: Names of the columns.
        rows: Cells; a number becomes text by ``form``, None becomes empty.
        form: Format of numbers.
        bars: Columns in the chart, from 1 on; none without a chart.
        line: Where the chart has a line to compare with.
    """

    head: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    form: str = ".2f"
    bars: tuple[int, ...] = ()
    line: float | None = None


def read(stem: str) -> Results:
    """Return the results of a benchmark."""
    found: Results = json.loads((RESULTS / f"{stem}.json").read_text())["results"]
    return found


def names_in(*groups: Results) -> list[str]:
    """Return the methods that results are about, in the order of their names."""
    found = {name for group in groups for name in group}
    return [name for name in NAMES if name in found]


def with_counts(table: Table) -> Table:
    """Write numbers of parameters, in the last column, with separators."""
    return table._replace(rows=[(*row[:-1], "" if row[-1] is None else f"{row[-1]:,}") for row in table.rows])
