"""Tables of benchmarks that measure how well something is learned."""

from collections.abc import Callable

from docs.benchmark_tables import Results, Table, with_counts


def adalora(results: Results) -> Table:
    steps = results["total_rank_by_step"]
    rows = [(f"after step {step}", total) for step, total in steps.items()]
    return Table(("", "triplets in all layers"), rows, "d", (1,), results["equal_ranks"]["total_ranks"][0])


def federated(results: Results) -> Table:
    found = results["seed 0"]
    rows = [
        (name, cells["accuracy"], cells["bytes up per client and round"] / 1000) for name, cells in found.items()
        if isinstance(cells, dict)
    ]  # fmt: skip
    return Table(
        ("variant", "accuracy of clients", "KB a client sends"), rows, ".3f", (1,), found["most frequent label"]
    )


def images(results: Results) -> Table:
    rows = [
        (name, cells["accuracy"], cells.get("deviation"), cells.get("trained"))
        for name, cells in results["cifar10"].items()
    ]
    return with_counts(Table(("CIFAR-10", "accuracy", "deviation", "trained parameters"), rows, ".3f", (1,)))


def knowledge_probe(results: Results) -> Table:
    columns = ("hand-written", "P-tuned", "P-tuned, untaught", "most frequent answer")
    rows = [(name, *(cells[column] for column in columns)) for name, cells in results["P@1"].items()]
    return Table(("relation", *columns), rows, ".3f", (1, 2))


def ladder(results: Results) -> Table:
    rows = [
        (
            name,
            results["sst2"][name]["test"],
            results["trec"][name]["test"],
            results["sst2"][name]["trained parameters"],
        )
        for name in results["sst2"]
    ]
    return with_counts(Table(("test accuracy", "SST-2", "TREC", "trained parameters"), rows, ".3f", (1, 2)))


def listed_choices(results: Results) -> Table:
    cells = results["trec"]
    return Table(
        ("TREC", "accuracy", "of a guess"), [("a list of 3 to 5 kinds", cells["accuracy"], cells["of a guess"])], ".3f"
    )


def mpt(results: Results) -> Table:
    found = results["target's P@1"]
    steps = ("after 5 steps", "after 10 steps", "after 40 steps")
    rows = [(name, *(found[step][name]["mean"] for step in steps)) for name in found[steps[0]]]
    return Table(("P@1 of the target", *steps), rows, ".3f", (1, 3))


def seq2seq(results: Results) -> Table:
    columns = ("loss", "rouge1", "rouge2", "rougeL", "bleu")
    rows = [
        (name, *(cells[column] for column in columns), cells.get("trained")) for name, cells in results["e2e"].items()
    ]
    head = ("E2E", "loss", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU", "trained parameters")
    return with_counts(Table(head, rows, ".3f", (5,)))


def t_few(results: Results) -> Table:
    tasks = results["tasks"]
    rows = [
        (
            name,
            *(
                value
                for task in ("trec", "ag_news")
                for value in (tasks[task][name]["accuracy"], tasks[task][name].get("to all"))
            ),
        )
        for name in tasks["trec"]
    ]
    return Table(("losses", "TREC", "to all losses", "AG News", "to all losses"), rows, ".3f", (1, 3))


def tasks(results: Results) -> Table:
    rows = [
        (f"{data}: {metric.replace('_', ' ')}", cells["floor"].get(metric), cells["lora_r8"][metric])
        for data, cells in results.items()
        for metric in ("pearson", "mse", "micro_f1", "exact_match", "f1", "accuracy") if metric in cells["lora_r8"]
    ]  # fmt: skip
    return Table(("metric", "without a model", "LoRA, rank 8"), rows, ".3f")


SCORES: dict[str, Callable[[Results], Table]] = {
    "adalora": adalora,
    "federated": federated,
    "images": images,
    "knowledge_probe": knowledge_probe,
    "ladder": ladder,
    "listed_choices": listed_choices,
    "mpt": mpt,
    "seq2seq": seq2seq,
    "t_few": t_few,
    "tasks": tasks,
}
