"""Benchmarks run, compare like with like, and find that no training step keeps more for backward than the peer's."""

import functools
import gc
import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES, KINDS = ["activation_space", "weight_space"], ["bert", "llama"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed"),
]


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(NAMES, KINDS)))
def test_a_benchmark_runs_and_writes_nothing_when_small(name, kind):
    results = FOLDER / "results" / f"{name}.json"
    before = results.exists() and results.read_bytes()
    chosen = dict(itertools.islice(cases(name).items(), KINDS.index(kind), None, 2))  # the others, on the other kind
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--small", "--rounds", "3", "--budget", "1"]
    command += ["--models", kind, "--methods", ",".join(chosen)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (results.exists() and results.read_bytes()) == before
    rows = [row.split() for row in done.stdout.splitlines() if not row.startswith("|")]
    wanted = {(part, kind, case) for case, each in chosen.items() for part in each.parts}
    assert wanted - {tuple(row[:3]) for row in rows} == set()


@pytest.mark.filterwarnings("ignore")
def test_experts_are_measured_on_each_side(monkeypatch, capsys):
    import experts

    assert experts.risen_memory("lightning_peft", "eager", small=True) > 0  # in a process of its own, which takes long
    monkeypatch.setattr(experts, "risen_memory", lambda *settings: 10**6)
    monkeypatch.setattr(sys, "argv", ["experts.py", "--small", "--rounds", "2"])
    experts.main()
    rows = [row.split()[:2] for row in capsys.readouterr().out.splitlines()]
    assert rows == [[way, side] for way in ("grouped_mm", "eager") for side in ("frozen", "lightning_peft", "peft")]


def cases(name):
    return importlib.import_module(name).CASES


# Bytes by which ours may be above: a pooler's output over the virtual tokens beside that over the tokens, which alone
# goes to the head (2 rows of 96).
ABOVE = {("bert", "prompt_tuning"): 4 * 2 * 96}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # of peft and of its ways with transformers
def test_no_step_keeps_more_for_backward_than_the_peers(name):
    import sides

    found = {}
    for kind, (case, settings) in itertools.product(KINDS, cases(name).items()):
        for _, row in sides.compare(kind, settings, Namespace(only=["bytes"], small=True)):
            print(kind, case, row["bytes"])
            found[kind, case] = row["bytes"]["ours"] - row["bytes"].get("peft", row["bytes"]["ours"])
    assert {case: bytes_ for case, bytes_ in found.items() if bytes_ > ABOVE.get(case, 0)} == {}


# Where both sides train the same tensors, in the same order those of one size. Not with prompts on a classifier, where
# peft pools a virtual token.
ALIKE = [
    ("bert", "ia3"),
    *(("llama", case) for case in ("ia3", "prompt_tuning", "p_tuning", "multitask_prompt_tuning")),
]


@pytest.mark.parametrize(("kind", "case"), ALIKE)
@pytest.mark.filterwarnings("ignore")
def test_both_sides_compute_the_same_loss_with_the_same_values(kind, case):
    import harness
    import sides

    settings = cases("activation_space")[case]
    _, models, _ = sides.both(kind, settings, small=True)
    batch, losses = harness.MODELS[kind](small=True)[1], {}
    if kind == "llama":
        # With prompts, peft lets the last virtual token predict the first token; ours gives the tokens' logits alone.
        batch["labels"] = batch["labels"].index_fill(1, torch.tensor(0), -100)
    for who, model in models.items():
        torch.manual_seed(0)
        for parameter in sorted(harness.trained(model), key=torch.numel):
            parameter.data.flatten().copy_(torch.randn(parameter.numel()))
        losses[who] = settings.calls.get(who, settings.loss)(sides.called(model.eval()), batch).item()
    print(kind, case, losses, abs(losses["ours"] - losses["peft"]))
    assert losses["ours"] == pytest.approx(losses["peft"], abs=2e-6)


def filled(model):
    """Give tensors of one size, in their order, the same values on each side."""
    import harness

    torch.manual_seed(0)
    for parameter in sorted(harness.trained(model), key=torch.numel):
        parameter.data.copy_(0.1 * torch.randn(parameter.numel()).view(parameter.shape))
    return model.eval()


@pytest.mark.filterwarnings("ignore")
def test_a_method_written_by_hand_computes_the_same():
    import layer_sides
    import llama_sides

    build, ids = functools.partial(llama_sides.small_llama, 2), torch.randint(0, 256, (2, 5))
    x, found = torch.randn(2, 5, 64), {}
    for name, case in layer_sides.ON_LAYER.items():
        found["layer", name] = [filled(module)(x) for module in layer_sides.sides_of(case, 64).values()]
    for name in set(llama_sides.CASES) - {"prefix_tuning"}:  # in a cache it moves the positions of tokens
        sides = llama_sides.model_sides(name, build)
        found["model", name] = [filled(side)(input_ids=ids).logits[:, -5:] for side in sides.values()]
    off = {name: (outputs[0] - outputs[-1]).abs().max().item() for name, outputs in found.items()}
    assert len(off) == 23
    assert {name: error for name, error in off.items() if error > 2e-6} == {}


def table_of(name, options, monkeypatch):
    """Run a benchmark of small sizes in this process, which must not write; return the lines of its table."""
    import rows

    tables = []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--small", "--rounds", "2", "--budget", "0.1", *options])
    monkeypatch.setattr(rows.harness, "write", None)
    monkeypatch.setattr(rows.harness, "table", lambda lines, columns: tables.append(lines))
    try:
        importlib.import_module(name).main()
    finally:
        gc.unfreeze()
    (lines,) = tables
    return lines


@pytest.mark.filterwarnings("ignore")
def test_costs_at_small_sizes_are_measured_on_each_side(monkeypatch):
    sides = {"lora": 3, "ia3_input": 3, "bottleneck": 2, "prefix_tuning": 3}
    lines = table_of("small_sizes", ["--methods", ",".join(sides)], monkeypatch)
    parts = {(line["part"], line["method"]) for line in lines}
    layers = {(f"layer {mode}", name) for mode in ("train", "eval") for name in ("lora", "ia3_input", "bottleneck")}
    models = {(f"model {mode}", name) for mode in ("train", "eval") for name in ("lora", "bottleneck", "prefix_tuning")}
    assert parts == layers | models
    for line in lines:
        for cost in ("operators", "kernels", "frames", "microseconds", *["bytes"] * ("train" in line["part"])):
            values = [float(value) for value in line[cost].split(" / ")]
            assert len(values) == sides[line["method"]]
            assert min(values) > 0


@pytest.mark.filterwarnings("ignore")
def test_decoding_is_measured_live_and_merged_and_with_an_adapter_for_each_row(monkeypatch):
    lines = table_of("decoding", ["--methods", "lora,prefix_tuning"], monkeypatch)
    base, both = {"base", "ours", "peft", "hand"}, {"base", "ours", "peft"}
    sides = [{side for side in line if side in base | {"merged", "peft_merged"}} for line in lines]
    assert sides == [base | {"merged", "peft_merged"}, base, both, both]


@pytest.mark.filterwarnings("ignore")
def test_growth_is_an_exponent_of_each_cost(monkeypatch):
    import growth

    lines = table_of("growth", ["--methods", "lora", "--only", "rows,adapters in a batch"], monkeypatch)
    assert [line["with"] for line in lines] == ["rows", "adapters in a batch"]
    # A row saves as much as the row before it, beside what does not depend on rows: 1 in all but the third place.
    assert [float(value) for value in lines[0]["ours bytes"].split(", ")] == pytest.approx([1, 1], abs=0.03)
    assert set(lines[1]) >= {"ours microseconds", "peft microseconds"}
    assert growth.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tokens", [1, 128])
def test_no_step_of_a_small_layer_dispatches_more_operators_than_the_peers(tokens):
    import counting
    import layer_sides
    import overhead

    x, above = torch.randn(1, tokens, 64, requires_grad=True), {}
    for name, case in layer_sides.ON_LAYER.items():
        sides = layer_sides.sides_of(case, 64)
        counts = {who: counting.operators(overhead.train_call(side, x)) for who, side in sides.items()}
        print(name, counts)
        above[name] = [
            ours - theirs for ours, theirs in zip(counts["ours"], counts.get("peft", counts["hand"]), strict=True)
        ]
    assert len(above) == 10
    assert {name: more for name, more in above.items() if max(more) > 0} == {}
