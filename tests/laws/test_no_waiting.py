"""A training step makes no device wait and mixes no devices; what waits is in a table, with its reason.

There is no GPU here. On the meta device reading a value raises, as does an operator between devices. Where values have
to exist, a step runs on the CPU as it would on a device: package code is told that reading is not free.
"""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, adapted, disturb
from device_waits import DeviceWaits
from models import BEFORE_5, MODELS, logits

import lightning_peft as lp
from lightning_peft.core.injection_record import adapters_of
from lightning_peft.ops import value_checks

# Others differ from these in names alone. GPT-2 and BART read values themselves, so nothing runs on the meta device.
ON_META, PADDED = ("bert", "llama", "plain", "encoder", "vit"), ("bert", "llama", "plain", "gpt2", "bart")
QUICK = ("bert", "llama", "plain")
READING = (lp.AdaLoRA, lp.LLaMAAdapter, lp.PromptTuning, lp.PTuning, lp.TrainableTokens)  # look at masks, ids or values


def _over_cases(models, quick_kinds=lp.Method):
    """Return a mark for the cases of models; all but one of each kind of method are slow, and the models take turns."""
    cases = [case for case in CASES if case.model in models]
    kinds = dict.fromkeys(tuple(map(type, case.methods)) for case in cases if isinstance(case.methods[0], quick_kinds))
    chosen = []
    for number, kind in enumerate(kinds):
        alike = [case for case in cases if tuple(map(type, case.methods)) == kind]
        turn = QUICK[number % 3 :] + QUICK[: number % 3]
        chosen.append(next(case for model in turn for case in alike if case.model == model))
    marked = [pytest.param(case, id=str(case), marks=() if case in chosen else pytest.mark.slow) for case in cases]
    return pytest.mark.parametrize("case", marked)


@pytest.fixture
def reading_costs(monkeypatch):
    """Lets the package treat the CPU as a device that a host has to wait for."""
    monkeypatch.setattr(value_checks, "_FREE", ())
    monkeypatch.setattr(value_checks, "_ASSERTING", ("cpu", "cuda", "meta"))


def step(model, methods, inputs, device, **settings):
    """Return the waits of a training step: forward, backward, clipping, optimizer, and what methods do after it."""
    model.train().to(device)
    inputs = {name: x.to(device) for name, x in inputs.items()}
    labels = torch.arange(64, device=device) % 3
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, **settings)
    adapters = [(method, list(adapters_of(model, method).values())) for method in methods]
    with DeviceWaits(device) as waits:
        out = logits(model(**inputs)).flatten(0, -2)
        F.cross_entropy(out, labels[: len(out)]).backward()
        for method, found in adapters:
            if (penalty := method.penalty(found)) is not None:
                penalty.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        for method, found in adapters:
            method.after_step(found, 20, 100)  # in which AdaLoRA observes and allocates
    return waits


reads_itself = pytest.mark.skipif(BEFORE_5, reason="transformers before 5 reads ids and masks in each call")


def without_masks(inputs):
    """Without a mask, transformers itself reads no value."""
    return {name: x for name, x in inputs.items() if name != "attention_mask"}


@_over_cases(ON_META)
def test_a_step_on_a_device_reads_no_value_and_copies_nothing(case):
    if BEFORE_5 and case.model in ("bert", "llama"):
        pytest.skip("transformers before 5 reads ids and masks in each call")
    waits = step(adapted(case), case.methods, without_masks(MODELS[case.model].inputs()), "meta")
    assert (waits.found, waits.without_wait) == (Counter(), Counter())


@pytest.mark.usefixtures("reading_costs")
@_over_cases(PADDED, READING)
def test_a_padded_step_reads_what_its_base_reads_and_no_more(case):
    model = MODELS[case.model]
    inputs = model.inputs("right" if model.reads != "images" else None)
    waits = step(adapted(case), case.methods, inputs, "cpu", fused=True)
    assert waits.found == step(model(), (), inputs, "cpu", fused=True).found


@reads_itself
def test_positions_and_placeholders_are_checked_by_the_device():
    model = lp.inject(MODELS["llama"](), lp.PromptTuning(length=2))
    inputs = without_masks(MODELS["llama"].inputs("left"))
    assert "position_ids" in inputs
    assert step(model, (), inputs, "meta").found == Counter()


@reads_itself
@pytest.mark.parametrize(("device", "copies"), [("meta", 0), ("cpu", 1)])
def test_ids_of_tasks_are_checked_where_they_are_and_copied_once(device, copies):
    methods = [lp.PromptTuning(length=2, tasks=3), lp.MultitaskPromptTuning(name="other", length=2, tasks=3)]
    model = lp.inject(MODELS["llama"](), methods).to("meta")
    with DeviceWaits("meta") as waits, lp.row_tasks(model, torch.tensor([2, 0]).to(device)):
        logits(model(MODELS["llama"].inputs()["input_ids"].to("meta"))).sum().backward()
    to_device = {("copy from cpu to meta", "lightning_peft/methods/prompting/row_tasks.py:row_tasks"): copies}
    assert (waits.outside_of("tests"), +waits.without_wait) == (Counter(), +Counter(to_device))


@pytest.mark.usefixtures("reading_costs")
def test_a_device_raises_for_ids_of_no_task():
    model = lp.inject(MODELS["llama"](), lp.PromptTuning(length=2, tasks=3))
    with pytest.raises(RuntimeError, match=r"ids must be at least one of 0 to 2, the tasks of the model"):
        lp.row_tasks(model, torch.tensor([3, 0])).__enter__()


@reads_itself
def test_rows_with_adapters_of_their_own_are_assigned_once_for_a_context():
    """Two assignments, of rows to three adapters and, for the one with another scale, of scales to rows."""
    methods = [lp.LoRA(name=name, rank=rank, alpha=rank * 2.0) for name, rank in (("a", 2), ("b", 4), ("c", 2))]
    methods[2] = lp.LoRA(name="c", rank=2, alpha=7.0)
    model = lp.inject(MODELS["llama"](), methods).to("meta")
    x = torch.ones(3, 5, dtype=torch.long, device="meta")
    with DeviceWaits("meta") as waits, lp.row_adapters(model, ["a", "c", "b"]):
        for _ in range(2):
            logits(model(x)).sum().backward()
    copies = {("copy from cpu to meta", "lightning_peft/composition/row_dispatch.py:_on_device"): 2}
    assert (waits.found, waits.without_wait) == (Counter(), Counter(copies))


@pytest.mark.parametrize("last", [1.0, float("nan"), float("inf")])
def test_sensitivities_on_a_device_are_those_on_the_cpu(monkeypatch, last):
    averages = []
    for free in (("cpu",), ()):
        monkeypatch.setattr(value_checks, "_FREE", free)
        torch.manual_seed(0)
        model = disturb(lp.inject(MODELS["plain"](), method := lp.AdaLoRA(initial_rank=3, target_rank=2)))
        found = list(adapters_of(model, method).values())
        for number, factor in enumerate((1.0, 2.0, last)):
            (model(torch.ones(2, 3, dtype=torch.long)).square().sum() * factor).backward()
            method.after_step(found, number, 100)
        averages.append([x for adapter in found for x in (adapter.mean, adapter.spread)])
    assert all(x.isfinite().all() for x in averages[0])
    assert sum(x.abs().sum() for x in averages[0]) > 0
    torch.testing.assert_close(*averages, atol=0, rtol=0)
