"""Adapted layers in one graph: ``torch.compile`` without gradients, ``torch.jit.trace``, ``torch.export``."""

import dataclasses

import pytest
import torch
from cases import CASES, adapted, disturb, run
from models import MODELS, WIDTH
from test_weight_updates import METHODS
from torch import nn
from torch._dynamo.testing import CompileCounter

import lightning_peft as lp
from lightning_peft.ops.torch_api import element_count

WEIGHT_METHODS = METHODS | {"ia3": lp.IA3(targets=["layer"], feedforward_targets=[])}
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
NAMES = (
    "plain-LoRA-decompose-all",
    "plain-AdaLoRA-all",
    "plain-KronABlock",
    "plain-Bottleneck",
    "plain-PrefixTuning",
    "plain-PTuning-lstm",
    "plain-LLaMAAdapter-bias_and_scale",
    "bert-PromptTuning",
    "plain-TrainableTokens",
)
TRACED = [case for case in CASES if str(case) in NAMES]


def layers(name, dropout=0.0):
    """Return two layers of different width, adapted, and an input."""
    changes = {"targets": ["0", "2"]} | ({"dropout": dropout} if dropout else {})
    net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 48))
    net = lp.inject(net, dataclasses.replace(WEIGHT_METHODS[name], **changes)).eval()
    with torch.no_grad():
        for *_, adapter in lp.adapters(net):
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return net


def compiled(net, **settings):
    torch._dynamo.reset()
    return torch.compile(net, backend="aot_eager", **settings)


def check_compiled(name, mode, whole, dynamic):
    net = layers(name)
    with MODES[mode]():
        fast = compiled(net, fullgraph=whole, dynamic=dynamic)
        for rows in (64, 3, 65):
            x = torch.randn(rows, 32)
            torch.testing.assert_close(fast(x), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # what the compiler imports warns
@pytest.mark.parametrize("name", ["lora"])
def test_compiles_whole_without_gradients(name):
    check_compiled(name, "no_grad", True, None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WEIGHT_METHODS)
def test_every_update_compiles_without_gradients(name):
    check_compiled(name, "inference_mode", whole=True, dynamic=True)


@pytest.mark.filterwarnings("ignore")
def test_a_form_that_is_chosen_by_size_serves_all_sizes():
    """A comparison with the size itself would be a condition of the graph, which is compiled again where it fails."""
    torch._dynamo.reset()
    count = CompileCounter()

    def choose(x):
        return x + 1 if element_count(x) >= 32 else x + 2

    call = torch.compile(choose, backend=count, fullgraph=True, dynamic=True)
    assert [call(torch.zeros(rows, 8)).max().item() for rows in (2, 50)] == [2, 2]  # the form of the first call
    assert [choose(torch.zeros(rows, 8)).max().item() for rows in (2, 50)] == [2, 1]
    assert count.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_one_exported_program_serves_all_sizes(name):
    net = layers(name)
    for rows in (3, 65):  # on both sides of the sizes from which another form is cheaper
        dimension = {0: torch.export.Dim("rows", min=2)}
        program = torch.export.export(net, (torch.randn(rows, 32),), dynamic_shapes=(dimension,)).module()
        for x in (torch.randn(2, 32), torch.randn(70, 32)):
            torch.testing.assert_close(program(x), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
def test_an_update_compiles_in_parts_without_gradients(mode):
    check_compiled("lora", mode, whole=False, dynamic=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_a_model_that_trains_nothing_compiles_whole_with_gradients(name):
    net, x = layers(name), torch.randn(64, 32, requires_grad=True)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    (found,) = torch.autograd.grad(compiled(net, fullgraph=True)(x).square().sum(), x)
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_dropout_compiles_whole_in_training(backend):
    torch._dynamo.reset()
    net = lp.inject(
        nn.Sequential(nn.Linear(64, 64, bias=False)), lp.LoRA(targets=["0"], rank=64, alpha=64, dropout=0.25)
    )
    with torch.no_grad():
        net[0].weight.zero_()
        for *_, adapter in lp.adapters(net):
            adapter.a.copy_(torch.eye(64))
            adapter.b.copy_(torch.eye(64))
    x = torch.ones(500, 64, requires_grad=True)
    y = torch.compile(net.train(), fullgraph=True, dynamic=True, backend=backend)(x)
    dropped = y == 0
    assert abs(dropped.float().mean().item() - 0.25) < 0.01
    torch.testing.assert_close(y[~dropped], torch.full_like(y[~dropped], 4 / 3))
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())  # the same inputs are dropped on the way back


class Named(nn.Module):
    """A model whose inputs go by position, as graphs take them."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs):
        output = self.model(**dict(zip(self.names, inputs, strict=True)))
        return output if isinstance(output, torch.Tensor) else output.logits


def check_traced(case, modes):
    model = disturb(adapted(case))
    inputs, y = MODELS[case.model].inputs(), run(model, case)
    net = Named(model, list(inputs))
    for training, gradients in modes:
        with torch.set_grad_enabled(gradients):
            traced = torch.jit.trace(net.train(training), tuple(inputs.values()))  # which traces twice and compares
            torch.testing.assert_close(traced(*inputs.values()), y, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        program = torch.export.export(net.eval(), tuple(inputs.values()))
        torch.testing.assert_close(program.module()(*inputs.values()), y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run(model, case), y)


@pytest.mark.filterwarnings("ignore")  # shapes that are read while tracing
@pytest.mark.parametrize("name", ["lora", "dora", "krona", "ia3", "fedpara, tanh"])
def test_two_traces_are_equal_with_gradients_and_without(name):
    net, x = layers(name), torch.randn(40, 32)
    traced = torch.jit.trace(net, (x,))
    torch.testing.assert_close(traced(x), net(x), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        net(x)  # keeps updated weights, which a trace must not take for constants
        frozen = torch.jit.trace(net, (x,))
        for *_, adapter in lp.adapters(net):
            next(adapter.parameters()).mul_(2)
        torch.testing.assert_close(frozen(x), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_has_the_gradients_of_the_adapter():
    net, x = layers("lora"), torch.randn(40, 32)
    trained = [p for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad(torch.jit.trace(net, (x,))(x).square().sum(), trained)
    expected = torch.autograd.grad(net(x).square().sum(), trained)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TRACED, ids=str)
def test_every_method_is_traced_and_exported(case):
    check_traced(case, [(False, True), (True, True)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_logger_draws_the_graph(tmp_path):
    pytest.importorskip("tensorboard")
    import lightning as L
    from lightning.pytorch.loggers import TensorBoardLogger

    class Task(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.example_input_array = nn.Sequential(nn.Linear(WIDTH, WIDTH)), torch.randn(40, WIDTH)

        def forward(self, x):
            return self.net(x)

        def training_step(self, x):
            return self(x).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = L.Trainer(
        max_steps=1, logger=TensorBoardLogger(tmp_path, log_graph=True), enable_progress_bar=False, accelerator="cpu",
        callbacks=[lp.PEFTStrategy(lp.LoRA(targets=["0"]))], enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Task(), torch.utils.data.DataLoader(torch.randn(40, WIDTH), 40))
    (events,) = tmp_path.rglob("events*")
    assert b"aten::addmm" in events.read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_are_traced():
    net, x = lp.quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "int8", ["0", "1"]), torch.randn(80, 64)
    lp.inject(net, lp.LoRA(targets=["0", "1"]))
    torch.testing.assert_close(torch.jit.trace(net, (x,))(x), net(x), atol=1e-5, rtol=1e-5)
