"""Tables of benchmarks that measure time, memory and counts."""

from collections.abc import Callable

from docs.benchmark_tables import NAMES, Results, Table, names_in


def beside_peft(results: Results) -> Table:
    """Ratios of time and saved bytes to the floor and to peft."""
    head = ("method", "train / floor", "train / peft", "eval / floor", "eval / peft", "saved bytes / peft")
    pick = [("train", "ours/floor"), ("train", "ours/peft"), ("eval", "ours/floor"), ("eval", "ours/peft")]
    rows = [
        (f"{NAMES[name]}, {model}", *(
            results[part][kind].get(name, {}).get("values", {}).get(key)
            for part, key in [*pick, ("bytes", "ours/peft")]
        ))
        for kind, model in (("bert", "BERT"), ("llama", "Llama"))
        for name in names_in(results["train"][kind])
    ]  # fmt: skip
    return Table(head, rows, bars=(2, 4), line=1.0)


def decoding(results: Results) -> Table:
    sides = ("base", "ours", "peft", "hand", "merged")
    rows = [
        (NAMES[name], *(found["tokens_a_second"].get(side) for side in sides))
        for name, found in (
            (name, results["one row"]["6 x 64"][name]) for name in names_in(results["one row"]["6 x 64"])
        )
    ]
    return Table(("tokens a second", *sides), rows, ".0f", (2, 3))


def experts(results: Results) -> Table:
    rows = [
        (f"{side.replace('_', ' ')}, {form}", *(cells[key] for key in ("milliseconds", "peak MB", "ratio to frozen")))
        for form, sides in results.items()
        for side, cells in sides.items()
    ]
    return Table(("LoRA on 64 experts", "milliseconds", "peak MB", "time / frozen"), rows, ".1f", (3,), 1.0)


def frozen_trunk(results: Results) -> Table:
    rows = [
        (name.replace("_1", ", 1 block").replace("_", " "), cells["processor_epoch_2_of_epoch_1"],
         cells["processor_epoch_2_of_epoch_2_without"])
        for name, cells in results["max_length"].items()
    ]  # fmt: skip
    return Table(("what trains", "epoch 2 / epoch 1", "epoch 2 / epoch 2 without the cache"), rows, ".3f", (1, 2), 1.0)


def growth(results: Results) -> Table:
    rows = [
        (f"{more}, {NAMES[name]}", *(cells["small"][name]["values"].get(key) for key in
         ("ours microseconds", "peft microseconds", "ours bytes", "peft bytes")))
        for more, cells in results.items()
        for name in ("lora", "dora", "ia3", "prefix_tuning") if name in cells["small"]
    ]  # fmt: skip
    return Table(("more of", "time, ours", "time, peft", "bytes, ours", "bytes, peft"), rows)


def next_token(results: Results) -> Table:
    rows = [
        (f"{side}, {words}", cells["cpu_s"], cells["peak_mb"], cells["ratio"])
        for words, found in results.items()
        for side, cells in found["frozen"].items()
    ]
    return Table(("a step", "CPU seconds", "peak MB", "time / all logits"), rows, bars=(3,), line=1.0)


def padding(results: Results) -> Table:
    columns = ("shuffled", "grouped", "tokens, grouped/shuffled")
    rows = [
        (f"{size} rows", *(results["padding"][size][column] for column in columns))
        for size in sorted(results["padding"], key=int)
    ]
    return Table(("batch of", "padding, shuffled", "padding, grouped", "tokens computed"), rows, ".3f", (1, 2))


def row_adapters(results: Results) -> Table:
    rows = [
        (f"{NAMES[name]}, {model}, {size}", *(cells["values"].get(key) for key in ("mixed/one", "mixed/peft")))
        for size, models in results.items()
        for model, found in models.items()
        for name, cells in ((name, found[name]) for name in names_in(found))
    ]
    return Table(("8 adapters in a batch", "time / one adapter", "time / peft"), rows, bars=(1, 2), line=1.0)


def small_sizes(results: Results) -> Table:
    sizes = ("64 wide, 1 tokens", "512 wide, 128 tokens")
    found = results["layer train"]
    rows = [
        (NAMES[name], found[sizes[0]][name]["operators"]["ours"], found[sizes[0]][name]["operators"].get("peft"),
         *(found[size][name]["values"].get(key) for size in sizes for key in ("ours/peft", "ours/hand")))
        for name in names_in(found[sizes[0]])
    ]  # fmt: skip
    ratios = tuple(f"{size.replace('1 tokens', '1 token')}: / {side}" for size in sizes for side in ("peft", "by hand"))
    return Table(("one layer, a step", "operators", "of peft", *ratios), rows, bars=(3, 4), line=1.0)


def whole_runs(results: Results) -> Table:
    text, chat = results["classification"]["MiniLM"]["LoRA"], results["instructions"]["Llama"]["LoRA"]
    runs = (("480 sentences, HF Trainer", text, "hf"), ("160 instructions, TRL", chat, "trl"),
            ("160 instructions, TRL with packing", chat, "packing"))  # fmt: skip
    rows = [
        (name, *(cells["values"][f"{key} ours/{side}"] for key in ("cpu", "peak MB", "setup")))
        for name, cells, side in runs
    ]
    return Table(("ours / theirs", "processor time", "peak memory", "setup"), rows, bars=(1, 2), line=1.0)


COSTS: dict[str, Callable[[Results], Table]] = {
    "decoding": decoding,
    "experts": experts,
    "frozen_trunk": frozen_trunk,
    "growth": growth,
    "next_token": next_token,
    "padding": padding,
    "row_adapters": row_adapters,
    "small_sizes": small_sizes,
    "whole_runs": whole_runs,
    "weight_space": beside_peft,
    "activation_space": beside_peft,
}
