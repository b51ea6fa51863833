"""Each thread and asyncio task has the adapters that it activated itself, over one model that all share."""

import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adapter_edits import stir
from documents import blocks, execute
from models import MODELS, logits
from torch import nn

import lightning_peft as lp

TASKS = [f"task{number}" for number in range(8)]
X = torch.linspace(-1, 1, 24).view(4, 6)


@torch.no_grad()
def out(net):
    return net(X)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def served(net=None):
    """Return a model with eight adapters that have heads, norms and statistics of their own, and all outputs."""
    net = net or build()
    for name in TASKS:
        lp.add_adapter(net, lp.LoRA(rank=2, targets=["0"]), name, also_train=["1", "2"])
    stir(net, 1)
    for number, (*_, adapter) in enumerate(lp.adapters(net)):
        for buffer in adapter.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1 * (number % 5))
    net.eval()
    expected = {None: out(net)}
    for name in TASKS:
        expected[name] = in_thread(lambda name=name: out(lp.activate(net, name)))
    assert len({output.sum().item() for output in expected.values()}) == 9
    return net, expected


def test_the_page_on_serving_runs():
    (text,) = blocks("docs/serving.md", "python")
    page = execute(text, "serving")
    for (task, x), answer in zip(page.requests, page.answers, strict=True):
        assert torch.equal(in_thread(lambda task=task, x=x: page.answer((task, x))), answer)


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_pool_of_threads_gives_each_request_its_own_adapter():
    net, expected = served()
    before = {key: value.clone() for key, value in net.state_dict().items()}

    def request(number):
        kind, name = number % 4, TASKS[number * 5 % 8]
        if kind == 0:
            with lp.disabled(net):
                return torch.equal(out(net), expected[None])
        if kind == 1:
            names = [name, None, TASKS[number % 8], name]
            with lp.row_adapters(net, names):
                rows = out(net)
            wanted = torch.stack([expected[name][row] for row, name in enumerate(names)])
            return torch.allclose(rows, wanted, atol=1e-6)
        lp.activate(net, name)
        return torch.equal(out(net), expected[name]) and lp.active(net) == (name,)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(request, range(2000)))
    assert lp.active(net) == ()
    assert torch.equal(out(net), expected[None])
    assert torch.equal(in_thread(lambda: out(net)), expected[None])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(p.requires_grad for p in net.parameters())


def test_tasks_of_one_loop_have_adapters_of_their_own():
    net, expected = served()

    async def request(name):
        if name is None:
            with lp.disabled(net):
                await asyncio.sleep(0)
                return out(net)
        lp.activate(net, name)
        await asyncio.sleep(0)
        with lp.row_adapters(net, [name] * 4):
            await asyncio.sleep(0)
            rows = out(net)
        await asyncio.sleep(0)
        assert torch.allclose(rows, expected[name], atol=1e-6)
        return out(net)

    async def serve():
        return await asyncio.gather(*[request(name) for name in [*TASKS, None] * 20])

    outputs = asyncio.run(serve())
    for output, name in zip(outputs, [*TASKS, None] * 20, strict=True):
        assert torch.equal(output, expected[name])
    assert lp.active(net) == ()


def test_the_main_thread_sets_what_others_start_from():
    net, expected = served()
    in_thread(lambda: lp.activate(net, "task1"))
    assert lp.active(net) == in_thread(lambda: lp.active(net)) == ()
    lp.activate(net, "task2")
    assert torch.equal(in_thread(lambda: out(net)), expected["task2"])
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert all(".peft.task2" in name for name in trained)
    assert trained

    async def cell():
        lp.activate(net, "task3")
        return out(net)

    assert torch.equal(asyncio.run(cell()), expected["task3"])
    assert lp.active(net) == ("task2",)


def test_a_model_that_was_built_in_a_thread_starts_from_what_was_activated_there():
    def load():
        net = lp.add_adapter(build(), lp.LoRA(rank=2, targets=["0"]), "a")
        lp.add_adapter(net, lp.LoRA(rank=2, targets=["0"]), "b")
        return lp.activate(net, "b")

    net = in_thread(load)
    assert lp.active(net) == ("b",)

    async def start():
        return load()

    assert lp.active(asyncio.run(start())) == ("b",)


def test_other_threads_go_on_while_one_is_in_a_context():
    net, expected = served()
    lp.activate(net, "task0")
    inside, done = threading.Event(), threading.Event()

    def pause():
        with lp.disabled(net):
            inside.set()
            done.wait(10)
            return out(net)

    with ThreadPoolExecutor(1) as pool:
        paused = pool.submit(pause)
        assert inside.wait(10)
        assert torch.equal(out(net), expected["task0"])
        assert torch.equal(out(lp.activate(net, "task4")), expected["task4"])
        done.set()
        assert torch.equal(paused.result(), expected[None])
    with pytest.raises(ZeroDivisionError), lp.row_adapters(net, ["task1"] * 4):
        raise ZeroDivisionError
    assert torch.equal(out(net), expected["task4"])


def test_a_context_ends_where_it_was_entered():
    net, expected = served()
    lp.activate(net, "task0")

    def stream():
        with lp.disabled(net):
            yield out(net)
            yield out(net)

    first, second = stream(), stream()
    assert torch.equal(next(first), next(second))
    first.close()
    assert torch.equal(next(second), expected[None])
    second.close()
    assert torch.equal(out(net), expected["task0"])
    third = stream()
    next(third)
    with pytest.raises(RuntimeError, match="left in another thread or asyncio task"):
        in_thread(third.close)


def test_copies_have_what_was_active_and_switch_apart():
    net, expected = served()

    def copied():
        lp.activate(net, "task5")
        twin = copy.deepcopy(net)
        assert torch.equal(out(twin), expected["task5"])
        lp.activate(twin, "task6")
        assert torch.equal(out(net), expected["task5"])
        return twin

    twin = in_thread(copied)
    assert torch.equal(out(twin), expected["task6"])  # which the thread that made it set
    again = pickle.loads(pickle.dumps(lp.activate(net, "task7")))
    assert torch.equal(out(again), expected["task7"])
    assert torch.equal(out(lp.activate(again, "task1")), expected["task1"])
    assert torch.equal(out(net), expected["task7"])
    with lp.disabled(net):
        assert torch.equal(out(copy.deepcopy(net)), expected["task7"])


def test_what_was_removed_or_merged_elsewhere_is_said():
    net, expected = served()
    barrier = threading.Barrier(2, timeout=10)

    def serve():
        lp.activate(net, "task1")
        barrier.wait()
        barrier.wait()
        with pytest.raises(RuntimeError, match="'task1' was removed while it was active in this thread"):
            out(net)
        lp.activate(net, "task3")
        barrier.wait()
        barrier.wait()
        with pytest.raises(RuntimeError, match=r"\['task0'\] were merged into the weights, which all threads share"):
            out(net)
        barrier.wait()
        barrier.wait()
        return out(net)

    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(serve)
        barrier.wait()
        lp.remove_adapter(net, "task1")
        barrier.wait()
        barrier.wait()
        lp.activate(net, "task0")
        with lp.merged(net):
            torch.testing.assert_close(out(net), expected["task0"])
            barrier.wait()
            barrier.wait()
        barrier.wait()
        assert torch.equal(thread.result(), expected["task3"])
    assert torch.equal(out(net), expected["task0"])


METHODS = {
    "bert": [
        [lp.LoRA(rank=2), lp.LoRA(rank=2, decompose=True), lp.IA3(), lp.Bottleneck(size=2)],
        [lp.ParallelAdapter(size=2), lp.KronA(), lp.BitFit(), lp.PrefixTuning(length=2)],
    ],
    "llama": [
        [lp.PromptTuning(length=2), lp.LLaMAAdapter(length=2, layers=1), lp.AdaLoRA(), lp.FedPara(rank=2)],
        [lp.PTuning(length=2), lp.KronABlock(), lp.PTuningV2(length=2), lp.OwnParameters(targets=["lm_head"])],
    ],
    "encoder": [[lp.LoRA(rank=2), lp.IA3(), lp.KronA(), lp.LoRA(rank=2, targets=["all-linear"])]],
}


@pytest.mark.parametrize(("base", "methods"), [(base, each) for base, groups in METHODS.items() for each in groups])
def test_every_method_computes_in_threads_what_it_does_alone(base, methods):
    net = MODELS[base]()
    for number, method in enumerate(methods):
        lp.add_adapter(net, method, f"m{number}")
    stir(net, 0)
    net.eval()
    inputs = MODELS[base].inputs()

    @torch.no_grad()
    def request(number):
        kind = number % (len(methods) + 1)
        if kind == len(methods):
            with lp.disabled(net):
                return logits(net(**inputs))
        return logits(lp.activate(net, f"m{kind}")(**inputs))

    expected = in_thread(lambda: [request(number) for number in range(len(methods) + 1)])
    with ThreadPoolExecutor(8) as pool:
        for number, output in enumerate(pool.map(request, range(40 if len(methods) else 0))):
            assert torch.equal(output, expected[number % len(expected)]), methods[number % len(expected)]
