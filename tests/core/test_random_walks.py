"""Random walks over the public interface beside an oracle that recomputes outputs from formulas: nothing differs."""

import math
from collections import Counter

import pytest
import torch
from walks.threads import walk_in_threads
from walks.walk import REFUSALS, Walk, as_text, replay, shrink, walk_at_random

import lightning_peft as lp

WALKS, THREADED = 1500, 100
pytestmark = pytest.mark.filterwarnings("ignore")


def report(count):
    """Print how often each kind of call was made, and how often it was refused."""
    kinds = sorted({kind for kind, _ in count})
    print(
        f"{sum(count.values())} calls, of which {sum(n for (_, end), n in count.items() if end == 'refused')} refused"
    )
    print(", ".join(f"{kind} {count[kind, 'done']} + {count[kind, 'refused']}" for kind in kinds))


def walked(seeds, folder, count):
    """Return what failed on random walks, each as the fewest steps that fail."""
    found = [walk_at_random(seed, folder, count) for seed in seeds]
    return [as_text(net, *shrink(net, steps, folder, Counter())) for net, steps, _ in filter(None, found)]


def test_a_few_random_walks_agree_with_the_oracle(tmp_path):
    count = Counter()
    assert walked(range(10**6, 10**6 + 40), tmp_path, count) == []
    assert sum(count.values()) > 150


@pytest.mark.slow
def test_many_random_walks_agree_with_the_oracle(tmp_path):
    count = Counter()
    failed = walked(range(WALKS), tmp_path, count)
    print(f"{WALKS} walks, {len(failed)} violations")
    report(count)
    assert not failed, "\n\n".join(failed[:5])
    assert {kind for kind, end in count if end == "done"} >= {"inject", "add_adapter", "merge", "unmerge", "step"}
    assert min(count[kind, "done"] for kind, _ in count if not kind.endswith("inside") and kind not in REFUSED) >= 5


REFUSED = ("quantize", "ensemble", "edit while merged")  # of models with adapters, and without prompts, always


@pytest.mark.slow
def test_threads_see_their_own_adapters_alone(tmp_path):
    count = Counter()
    failed = [found for seed in range(THREADED) if (found := walk_in_threads(seed, tmp_path, count))]
    print(f"{THREADED} models in four threads, {len(failed)} violations")
    report(count)
    assert not failed, failed[0]
    assert count["activate", "done"] > 500


SCALES = {"name": "a", "kind": "outputs", "targets": ("up",), "rank": 1, "alpha": 1.0, "scale": 2.0}
UPDATE = {"name": "b", "kind": "lora", "targets": ("down",), "rank": 1, "alpha": 1.0, "scale": 2.0}
STEPS = [("inject", ([UPDATE], (), 1)), ("inject", ([SCALES], (), 2)), ("copy", ("pickle",)), ("merge", ())]


def test_a_planted_fault_is_found_and_shrunk_to_the_steps_that_it_needs(tmp_path, monkeypatch):
    assert replay("perceptron", STEPS, tmp_path, Counter()) is None
    monkeypatch.setattr("lightning_peft.methods.ia3.Scaling.merge", lambda self, host: host.weight.data.mul_(1.001))
    steps, failed = shrink("perceptron", STEPS, tmp_path, Counter())
    assert steps == [STEPS[1], STEPS[3]]
    assert "merged up.weight is" in failed
    assert "('merge', ())," in as_text("perceptron", steps, failed)


def test_a_refusal_that_changes_something_is_found(tmp_path):
    walk = Walk("tied", tmp_path, Counter())
    walk.take(STEPS[0])

    def change_and_refuse():
        walk.model.down.bias.requires_grad_(True)
        raise ValueError("refused")

    walk.step = ("inject", ())
    with pytest.raises(Exception, match="was refused and changed the model"):
        walk.attempt(None, change_and_refuse)


def test_outputs_of_the_oracle_do_not_come_from_the_package(tmp_path):
    """The formula of LoRA once more, by hand: the oracle notices a wrong scale."""
    walk = Walk("perceptron", tmp_path, Counter())
    walk.take(STEPS[0])
    ((_, _, _, adapter),) = lp.adapters(walk.model)
    expected = walk.state.output()
    assert (walk.model(torch.zeros(3, 2, 4, 4, dtype=torch.float64)).shape, expected.shape) == ((3, 3), (3, 3))
    adapter.scale *= 1 + 1e-6
    assert replay("perceptron", STEPS[:1], tmp_path, Counter()) is None
    assert math.isclose(adapter.scale, 1 + 1e-6)
    with pytest.raises(Exception, match="the output without gradients is"):
        walk.take(("train and eval", ()))
    assert issubclass(REFUSALS[0], Exception)
