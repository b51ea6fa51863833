"""Each method under ``torch.compile`` on a Llama-like and a BERT-like model: one graph, for all sizes, as eager code.

A graph that is replayed without Python (``mode="reduce-overhead"``, CUDA graphs) must be given the same tensors in each
call, must write to none of them, and must neither read a value nor bring one from the host.
"""

import dataclasses
import functools

import pytest
import torch
from cases import disturb, methods_for
from compiled_graphs import GraphRecorder, attributes, changed
from models import MODELS, VOCABULARY, logits
from torch import nn

import lightning_peft as lp

SHAPES = ((4, 12), (5, 12), (3, 20))  # rows and tokens
NEVER = 1e-6  # of dropout: what runs is what drops, and it drops nothing here


def cases_of(model):
    """Return the cases of the table by name, and those that drop or have a quantized base."""
    cases = {str(case): case.methods for case in methods_for(model)}
    lora = lp.LoRA(rank=4, targets=["all-linear"], dropout=NEVER)
    return cases | {
        f"{model}-LLaMAAdapter": (lp.LLaMAAdapter(length=3),),
        f"{model}-LastLayers": (lp.LastLayers(),),
        f"{model}-LoRA-dropout": (lora,),
        f"{model}-DoRA-dropout": (dataclasses.replace(lora, decompose=True),),
        f"{model}-AdaLoRA-dropout": (lp.AdaLoRA(initial_rank=4, target_rank=2, dropout=NEVER),),
        f"{model}-PTuningV2-dropout": (lp.PTuningV2(length=4, dropout=NEVER),),
        f"{model}-PTuning-dropout": (lp.PTuning(length=3, dropout=NEVER),),
        f"{model}-ParallelAdapter-dropout": (lp.ParallelAdapter(size=6, dropout=NEVER),),
        f"{model}-int8-LoRA": (lp.LoRA(rank=4, targets=["all-linear"]),),
        f"{model}-nf4-LoRA": (lp.LoRA(rank=4, targets=["all-linear"]),),
        f"{model}-int8-IA3": (lp.IA3(),),
    }


METHODS = {name: methods for model in ("llama", "bert") for name, methods in cases_of(model).items()}


def one_block(name):
    """Return a model of one block, as compiling takes time for each."""
    model = MODELS[name]()
    for part in [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == 3]:
        del part[1:]
    return model


def adapted(name):
    torch.manual_seed(1)
    kind, *rest = name.split("-")
    model = one_block(kind).double()
    if rest and rest[0] in ("int8", "nf4"):
        lp.quantize(model.float() if rest[0] == "nf4" else model, rest[0])
    return disturb(lp.inject(model, list(METHODS[name]))) if rest else model


def batch(rows, length):
    """Return inputs whose sizes may change without another compilation."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for tensor in inputs.values():
        for dim in (0, 1):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return inputs


def results(call, model, inputs):
    """Return the output and, in training, the gradients of what trains."""
    torch.manual_seed(3)
    with torch.set_grad_enabled(model.training):
        y = logits(call(**inputs))
    trained = [p for p in model.parameters() if p.requires_grad] if model.training else []
    return [y, *torch.autograd.grad(y.square().sum(), trained)] if trained else [y]


def compiled(name, training):
    """Return the model, its inputs and the record of its graphs, after comparing results with those of eager code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, recorder, batches = adapted(name).train(training), GraphRecorder(), [batch(*shape) for shape in SHAPES]
    expected = [results(model, model, inputs) for inputs in batches]
    tolerance = 1e-4 if "nf4" in name else 1e-10
    call = torch.compile(model, backend=recorder, fullgraph=True)
    before = {}
    for inputs, values in zip(batches, expected, strict=True):
        torch.testing.assert_close(results(call, model, inputs), values, atol=tolerance, rtol=tolerance)
        before = before or attributes(model)  # the first call compiles
    assert changed(before, attributes(model)) == []
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(recorder.calls) == len(SHAPES)
    return model, batches, recorder


@functools.cache
def base_graph(kind, training):
    return compiled(kind, training)[2]


def runs():
    """Yield the name of each case, and whether it is trained.

    Compiling takes seconds, so that each method is trained on one of the models and evaluated on the other, in turn.
    One that drops, or has a quantized base, is trained on one of them and no more.
    """
    for kind in ("llama", "bert"):
        for number, name in enumerate(name for name in METHODS if name.startswith(kind)):
            is_variant, turn = name.endswith("dropout") or "-int8-" in name or "-nf4-" in name, number % 2
            if not is_variant or turn == (kind == "bert"):
                yield name, turn == (kind == "bert")


RUNS = list(runs())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler imports warns
@pytest.mark.parametrize(
    ("name", "training"), RUNS, ids=[f"{name}-{'train' if mode else 'eval'}" for name, mode in RUNS]
)
def test_each_method_is_one_graph_for_all_sizes_that_equals_eager_code(name, training):
    base = base_graph(name.split("-")[0], training)
    model, batches, recorder = compiled(name, training)
    assert recorder.count == base.count == 1
    assert recorder.given_beside(model, *batches) == []
    assert recorder.written == []
    assert len(recorder.constants) <= len(base.constants)
    assert recorder.forbidden_operators() <= base.forbidden_operators()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [
    "bert-LoRA-dropout", "llama-DoRA-dropout", "bert-KronABlock", "bert-PromptTuning", "llama-PTuning-lstm",
    "bert-MultitaskPromptTuning", "llama-LLaMAAdapter", "bert-PTuningV2-dropout",
])  # fmt: skip
def test_all_tensors_of_a_graph_are_on_the_device_of_the_model(name):
    """A tensor of the host would be copied in each call, and keeps a graph from being replayed on a GPU."""
    torch._dynamo.reset()
    model, recorder = adapted(name).train().to("meta"), GraphRecorder()
    model.config.use_cache = False  # the cache of transformers begins with tensors that no graph takes
    inputs = {key: value.to("meta") for key, value in batch(*SHAPES[0]).items()}
    y = logits(torch.compile(model, backend=recorder, fullgraph=True)(**inputs))
    y.square().sum().backward()
    assert recorder.devices == {"meta"}
