"""What each method dispatches beyond its base: operators of a training step's forward and backward, and in evaluation.

Fewer is faster where tensors are small, on a GPU above all; a number that rises is a regression. After a change of the
forms that methods are computed in, print the tables anew, and read the difference:

    PYTHONPATH=.:benchmarks:tests python tests/ops/test_operator_counts.py
"""

import functools

import pytest
import torch
from counting import OperatorCount
from models import MODELS, VOCABULARY, cache_argument, cache_of
from torch import nn

import lightning_peft as lp

ON_LAYER = {
    "lora": lp.LoRA(targets=["0"], rank=8),
    "lora_dropout": lp.LoRA(targets=["0"], rank=8, dropout=0.1),
    "dora": lp.LoRA(targets=["0"], rank=8, decompose=True),
    "adalora": lp.AdaLoRA(targets=["0"], initial_rank=8, target_rank=4),
    "fedpara": lp.FedPara(targets=["0"], rank=8),
    "krona": lp.KronA(targets=["0"]),
    "ia3": lp.IA3(targets=["0"], feedforward_targets=[]),
    "ia3_input": lp.IA3(targets=[], feedforward_targets=["0"]),
    "bitfit": lp.BitFit(targets=["0.*"]),
    "bottleneck": lp.Bottleneck(targets=["0"], size=8, train_norms=False, train_head=False),
}
IN_MODEL = {
    "lora": lp.LoRA(rank=8),
    "lora_dropout": lp.LoRA(rank=8, dropout=0.1),
    "lora_linears": lp.LoRA(rank=8, targets=["all-linear"]),
    "dora": lp.LoRA(rank=8, decompose=True),
    "adalora": lp.AdaLoRA(initial_rank=8, target_rank=4),
    "fedpara": lp.FedPara(rank=8),
    "krona": lp.KronA(),
    "ia3": lp.IA3(),
    "bitfit": lp.BitFit(add_missing=True),
    "bottleneck": lp.Bottleneck(size=8, train_norms=False, train_head=False),
    "parallel_adapter": lp.ParallelAdapter(size=8),
    "prefix_tuning": lp.PrefixTuning(length=4, reparameterize=False),
    "prompt_tuning": lp.PromptTuning(length=4),
    "p_tuning": lp.PTuning(length=4, encoder="mlp"),
    "llama_adapter": lp.LLaMAAdapter(length=4, layers=3),
}
SIZES = [(64, 1), (64, 128), (256, 16), (64, 2048), (512, 128), (512, 1024), (2048, 1)]  # width and tokens of a layer
QUICK = 3  # sizes of the quick tests
TOKENS = [1, 24]  # of a Llama of three blocks
# For each of SIZES: forward, backward, evaluation.
LAYER_COUNTS = {
    "lora": [(10, 20, 10), (1, 16, 4), (10, 20, 10), (1, 16, 4), (10, 20, 10), (1, 16, 4), (10, 20, 10)],
    "lora_dropout": [(23, 29, 10), (23, 29, 4), (23, 29, 10), (23, 29, 4), (23, 29, 10), (23, 29, 4), (23, 29, 10)],
    "dora": [(8, 53, 5), (8, 53, 5), (8, 53, 5), (8, 130, 5), (8, 53, 5), (8, 86, 5), (8, 53, 5)],
    "adalora": [(14, 25, 12), (3, 21, 5), (14, 25, 12), (3, 21, 5), (14, 25, 12), (3, 21, 5), (14, 25, 12)],
    "fedpara": [(5, 25, 6), (5, 25, 6), (5, 25, 6), (5, 25, 6), (27, 35, 18), (10, 32, 6), (27, 35, 18)],
    "krona": [(16, 23, 16), (8, 32, 4), (17, 24, 17), (8, 32, 4), (17, 24, 17), (8, 32, 4), (16, 23, 16)],
    "ia3": [(7, 22, 2), (8, 20, 7), (7, 22, 2), (8, 69, 7), (7, 22, 2), (8, 41, 7), (7, 22, 2)],
    "ia3_input": [(2, 6, 2), (1, 13, 1), (2, 6, 2), (1, 62, 1), (2, 6, 2), (1, 34, 1), (2, 6, 2)],
    "bitfit": [(0, 3, 0), (0, 3, 0), (0, 3, 0), (0, 3, 0), (0, 3, 0), (0, 3, 0), (0, 3, 0)],
    "bottleneck": [(10, 26, 10), (10, 26, 10), (10, 26, 10), (10, 26, 10), (10, 26, 10), (10, 26, 10), (10, 26, 10)],
}
# For each of TOKENS: the same, and one more token after them by the cache of keys and values.
MODEL_COUNTS = {
    "lora": [(60, 120, 60, 60), (6, 96, 24, 60)],
    "lora_dropout": [(138, 174, 60, 60), (138, 174, 24, 60)],
    "lora_linears": [(210, 420, 210, 210), (21, 336, 84, 210)],
    "dora": [(48, 288, 30, 30), (48, 288, 30, 30)],
    "adalora": [(294, 525, 252, 252), (63, 441, 105, 252)],
    "fedpara": [(105, 525, 126, 126), (105, 525, 126, 126)],
    "krona": [(96, 138, 96, 96), (48, 192, 24, 96)],
    "ia3": [(63, 198, 18, 18), (63, 186, 42, 18)],
    "bitfit": [(21, 63, 21, 21), (21, 63, 21, 21)],
    "bottleneck": [(60, 156, 60, 60), (60, 156, 60, 60)],
    "parallel_adapter": [(33, 66, 30, 30), (33, 66, 30, 30)],
    "prefix_tuning": [(27, 48, 27, 27), (33, 54, 33, 27)],
    "prompt_tuning": [(6, 12, 6, 0), (6, 6, 6, 0)],
    "p_tuning": [(12, 34, 11, 5), (12, 28, 11, 5)],
    "llama_adapter": [(132, 150, 126, 126), (132, 150, 126, 126)],
}


def counted(call):
    """Return the number of operators of a call and what it returned."""
    with OperatorCount() as count:
        result = call()
    return count.operators.total(), result


def costs(module, x, output, evaluate):
    """Return the operators of forward, backward and evaluation, of second calls: the first may fill what is reused."""
    module.train()
    for _ in range(2):
        forward, y = counted(functools.partial(module, x))
        y = output(y)
        backward, _ = counted(functools.partial(y.backward, torch.ones_like(y)))
        module.zero_grad()
        x.grad = None
    module.eval()
    with torch.no_grad():
        evaluate(module, x)
        return forward, backward, *(count for count, _ in evaluate(module, x))


def beyond(adapted, base):
    return tuple(a - b for a, b in zip(adapted, base, strict=True))


def layer_costs(width, tokens, method=None):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(width, width)).requires_grad_(False)
    x = torch.randn(1, tokens, width, requires_grad=True)
    module = module if method is None else lp.inject(module, method)
    return costs(module, x, lambda y: y, lambda module, x: [counted(lambda: module(x))])


def model_costs(tokens, method=None):
    """Count with a gradient to the embeddings, so that the base has a backward as well."""
    torch.manual_seed(0)
    model = MODELS["llama"]().requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    model = model if method is None else lp.inject(model, method)
    return costs(model, torch.arange(tokens)[None] % VOCABULARY, lambda y: y.logits, decoded)


def decoded(model, ids):
    first, output = counted(functools.partial(model, ids, use_cache=True))
    cache = {cache_argument(model): cache_of(output)}
    return [(first, output), counted(functools.partial(model, ids[:, :1], use_cache=True, **cache))]


bare_layer_costs, bare_model_costs = functools.cache(layer_costs), functools.cache(model_costs)


def on_layer(name, width, tokens):
    return beyond(layer_costs(width, tokens, ON_LAYER[name]), bare_layer_costs(width, tokens))


def in_model(name, tokens):
    return beyond(model_costs(tokens, IN_MODEL[name]), bare_model_costs(tokens))


@pytest.mark.parametrize("name", ON_LAYER)
def test_a_small_layer_dispatches_as_many_operators_as_written_down(name):
    assert [on_layer(name, *size) for size in SIZES[:QUICK]] == LAYER_COUNTS[name][:QUICK]


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_LAYER)
def test_a_large_layer_dispatches_as_many_operators_as_written_down(name):
    assert [on_layer(name, *size) for size in SIZES[QUICK:]] == LAYER_COUNTS[name][QUICK:]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_MODEL)
def test_a_model_dispatches_as_many_operators_as_written_down(name):
    assert [in_model(name, tokens) for tokens in TOKENS] == MODEL_COUNTS[name]


def print_table(name, rows):
    print(f"{name} = {{")
    for method, counts in rows.items():
        print(f'    "{method}": {counts},')
    print("}")


if __name__ == "__main__":
    print_table("LAYER_COUNTS", {name: [on_layer(name, *size) for size in SIZES] for name in ON_LAYER})
    print_table("MODEL_COUNTS", {name: [in_model(name, tokens) for tokens in TOKENS] for name in IN_MODEL})
