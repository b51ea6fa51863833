"""The compiler and recomputation where users turn them on: before injection, in a Trainer, in several processes."""

import functools

import pytest
import torch
from cases import CASES, Case
from compiled_graphs import GraphRecorder
from models import MODELS
from parallel_laws import Rows, Task, difference, fit, gradients, gradients_alone
from processes import together
from sampling import Laws
from torch import nn

import lightning_peft as lp
from lightning_peft.checkpoints.adapter_state import strip_wrapper_names

FEW = [
    Case("bert", (lp.LoRA(rank=4), lp.LLaMAAdapter(length=3), lp.PromptTuning(length=2), lp.OutputLayers())),
    Case("llama", (lp.PrefixTuning(length=2, hidden_size=8), lp.ParallelAdapter(size=6))),
]


@Laws()(every=3)
def test_a_compiled_model_is_adapted_in_the_same_places(case):
    names = []
    for wrap in (lambda net: net, torch.compile):  # which compiles nothing until it is called
        model = nn.ModuleDict({"net": wrap(MODELS[case.model]())})
        lp.inject(model, list(case.methods))
        names.append([strip_wrapper_names(name) for name, p in model.named_parameters() if p.requires_grad])
    assert names[0] == names[1]


class Compiled(Task):
    """Is compiled and called, with as many rows as in training, before injection; any graph break is an error."""

    def __init__(self, model):
        super().__init__(model)
        self.net = torch.compile(self.net, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            self.training_step(torch.utils.data.default_collate([Rows(model)[0], Rows(model)[1]]))


class InPlace(Task):
    def __init__(self, model):
        super().__init__(model)
        self.net.compile(backend="aot_eager", fullgraph=True)


class Recomputed(Task):
    """Recomputes its blocks, in the way that gives no gradients below frozen embeddings."""

    def __init__(self, model):
        super().__init__(model)
        self.enable()

    def enable(self):
        self.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


class Counted(Recomputed):
    """Counts the calls of the last norm in its first block."""

    calls = 0

    def enable(self):
        super().enable()
        blocks = next(part for part in self.net.modules() if isinstance(part, nn.ModuleList) and len(part) == 3)
        inside = [part for part in blocks[0].modules() if type(part).__name__.endswith("Norm")]
        inside[-1].register_forward_pre_hook(self.count)

    def count(self, *args):
        self.calls += 1


class Dropping(Counted):
    """Its blocks drop activations themselves, without modules for that."""

    def enable(self):
        super().enable()
        for block in [*self.net.model.encoder.layers, *self.net.model.decoder.layers]:
            block.dropout = 0.1


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("model", ["llama", "bert", "gpt2", "t5", "bart", "vit", "distilbert"])
def test_frozen_blocks_recompute(model):
    assert fit(Case(model, (lp.LoRA(rank=2),)), "auto", make=Counted, max_steps=1).calls == 2


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_blocks_that_drop_by_themselves_evaluate_and_say_that_they_do_not_recompute():
    with pytest.warns(UserWarning, match="coderLayer would drop activations itself in training"):
        module = fit(Case("bart", (lp.LoRA(rank=2),)), "auto", make=Dropping, max_steps=1)
    assert module.calls == 1


class RecomputedLate(Recomputed):
    """Turns it on in the last hook before the first step."""

    def enable(self):
        pass

    def on_train_start(self):
        super().enable()


def whole_module(recorder, model):
    return torch.compile(Task(model), backend=recorder)


def network(recorder, model):
    module = Task(model)
    module.net = torch.compile(module.net, backend=recorder, fullgraph=True)
    return module


def network_in_place(recorder, model):
    module = Task(model)
    module.net.compile(backend=recorder, fullgraph=True)
    return module


IN_TRAINER = [
    Case("plain", (lp.AdaLoRA(initial_rank=4, target_rank=2, warmup_steps=1, final_steps=1, interval=1),)),
    Case("llama", (lp.PrefixTuning(length=2), lp.IA3())),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler imports warns
@pytest.mark.parametrize("make", [whole_module, network, network_in_place])
@pytest.mark.parametrize("case", IN_TRAINER, ids=str)
def test_a_trainer_compiles_once_for_all_steps_and_trains_as_without(case, make):
    torch._dynamo.reset()
    recorder, settings = GraphRecorder(), {"precision": "64-true", "max_epochs": 3}
    found = trained_values(fit(case, "auto", make=functools.partial(make, recorder), **settings))
    expected = trained_values(fit(case, "auto", **settings))
    assert recorder.count == 1
    assert len(recorder.calls) == 6
    assert recorder.written == []
    (parameters,) = {tuple(id(value) for value in call if isinstance(value, nn.Parameter)) for call in recorder.calls}
    assert parameters  # the same in all steps
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def trained_values(module):
    return {strip_wrapper_names(name): p.detach() for name, p in module.named_parameters() if p.requires_grad}


class RecomputedAndCompiled(Recomputed):
    """In parts: transformers' hook on its inputs is no graph, nor are function modes inside of what is recomputed."""

    def enable(self):
        super().enable()
        self.net.compile(backend="aot_eager")


def largest(kinds, cases):
    """Return by how much the gradients of two processes over DDP differ from those of one without anything."""
    torch.distributed.init_process_group("gloo")
    found = {}
    for case in cases:
        expected = gradients_alone(case)
        for make in kinds:
            torch._dynamo.reset()
            own = {
                strip_wrapper_names(name): g
                for name, g in gradients(case, "ddp", make=make, precision="64-true").items()
            }
            found[make.__name__, str(case)] = difference(own, expected)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Compiled, InPlace, RecomputedAndCompiled])
def test_compiled_models_give_the_same_gradients_in_two_processes(kind):
    for rank in together(largest, [kind], FEW):
        assert max(rank.values()) < 1e-10, rank
        print(rank)


@pytest.mark.slow
def test_recomputed_models_give_the_same_gradients_in_two_processes():
    cases = [case for case in CASES if case.model == "llama"][::4]
    for rank in together(largest, [Recomputed, RecomputedLate], FEW + cases):
        assert max(rank.values()) < 1e-11, max(rank, key=rank.get)
        print(max(rank.values()))
