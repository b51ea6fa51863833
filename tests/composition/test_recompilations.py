"""How often a compiled model is compiled: once for each state that it is first called in, and never in going back.

States are active adapters, ``disabled``, merged weights, training or evaluation, and gradients; sizes are no states.
"""

import threading

import pytest
import torch
from torch import nn

import lightning_peft as lp

METHODS = {"lora": lp.LoRA(rank=2, targets=["0", "2"]), "ia3": lp.IA3(targets=["0"], feedforward_targets=["2"])}


class Counted:
    """A small model with two adapters, compiled; each call is compared with one that is not."""

    def __init__(self, backend=None, **settings):
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        for name, method in METHODS.items():
            lp.add_adapter(self.net, method, name)
        with torch.no_grad():
            for *_, adapter in lp.adapters(self.net):
                for parameter in adapter.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        self.count = 0
        self.compiled = torch.compile(self.net, fullgraph=True, backend=self.compile, **settings)

    def compile(self, graph, inputs):
        self.count += 1
        return graph.forward

    def compilations(self, rows=6):
        """Return how often a call compiles."""
        before, x = self.count, torch.randn(rows, 8, dtype=torch.float64)
        torch.testing.assert_close(self.compiled(x), self.net(x), atol=1e-12, rtol=1e-12)
        return self.count - before

    def activated(self, *names):
        lp.activate(self.net, *names)
        return self.compilations()


@pytest.mark.slow
def test_each_state_compiles_once_and_going_back_compiles_nothing():
    model = Counted()
    active = [["lora"], ["ia3"], ["lora"], ["ia3"], ["lora", "ia3"], ["ia3", "lora"], ["lora", "ia3"], ["lora"]]
    assert [model.activated(*names) for names in active] == [1, 1, 0, 0, 1, 1, 0, 0]


def test_without_adapters_and_merged_are_one_state_each_whichever_is_merged():
    model, found = Counted(), []
    addresses = [p.data_ptr() for p in model.net.parameters()]
    for name in ("lora", "ia3", "lora"):
        found.append(model.activated(name))
        with lp.disabled(model.net):
            found.append(model.compilations())
        with lp.merged(model.net):
            found.append(model.compilations())
        found.append(model.compilations())
    assert found == [1, 1, 1, 0, *[1, 0, 0, 0], *[0, 0, 0, 0]]
    assert [p.data_ptr() for p in model.net.parameters()] == addresses


def test_training_evaluation_and_gradients():
    model, found = Counted(), []
    for training, gradients in ((True, True), (False, True), (False, False), (True, True), (False, False)):
        model.net.train(training)
        with torch.set_grad_enabled(gradients):
            found.append(model.compilations())
    assert found == [1, 0, 1, 0, 0]


@pytest.mark.slow
def test_rows_with_adapters_of_their_own_compile_once_for_each_assignment():
    model, found = Counted(), []
    for names in (["lora", "ia3", None], ["lora", "ia3", None], ["ia3", "ia3", "lora"], ["lora", "ia3", None]):
        with lp.row_adapters(model.net, names), torch.no_grad():
            found.append(model.compilations())
    assert found == [1, 0, 1, 0]


@pytest.mark.slow
def test_what_a_thread_activates_for_itself_compiles_once():
    model, found = Counted(), []
    found.append(model.activated("lora"))

    def serve():
        found.extend(model.activated(name) for name in ("ia3", "lora", "ia3", "lora"))

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    found.append(model.compilations())
    assert found == [1, 1, 1, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("dynamic", "expected"), [(True, [1, 0, 0, 0]), (None, [1, 1, 0, 0])])
def test_sizes(dynamic, expected):
    """As without adapters: ``dynamic=None`` takes sizes for changing from the second one on.

    They are on both sides of the numbers of tokens from which another form of an update is cheaper.
    """
    model = Counted(dynamic=dynamic)
    lp.activate(model.net, "lora")
    assert [model.compilations(rows) for rows in (2, 30, 5, 50)] == expected


@pytest.mark.slow
def test_values_of_adapters_change_without_compiling():
    model, found = Counted(), []
    model.activated("lora", "ia3")
    optimizer = torch.optim.SGD([p for p in model.net.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        model.compiled(torch.randn(6, 8, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(model.compilations())
    model.net.load_state_dict({name: value + 0.1 for name, value in model.net.state_dict().items()})
    assert [*found, model.compilations()] == [0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "most"), [(lp.LoRA(rank=2, targets=["*"]), 80), (lp.IA3(targets=["*"], feedforward_targets=[]), 65)]
)
def test_conditions_that_each_call_checks_grow_by_a_bounded_number_a_layer(method, most):
    """A linear layer alone has 12."""
    found = []
    for count in (1, 2):
        torch._dynamo.reset()
        net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(count)))
        lp.inject(net, method)
        torch.compile(net, fullgraph=True, backend="eager")(torch.randn(20, 8))
        found.append(torch._dynamo.utils.get_compilation_metrics()[-1].guard_count)
    assert 0 < found[1] - found[0] <= most
