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
    "lora": [(4, 17, 4), (4, 17, 4), (4, 17, 4), (1, 16, 4), (4, 17, 4), (1, 16, 4), (4, 17, 4)],
    "lora_dropout": [(8, 18, 4), (8, 18, 4), (8, 18, 4), (23, 26, 4), (8, 18, 4), (23, 26, 4), (8, 18, 4)],
    "dora": [(6, 20, 5), (6, 20, 5), (11, 25, 5), (6, 20, 5), (15, 25, 5), (8, 79, 5), (105, 25, 5)],
    "adalora": [(6, 22, 6), (6, 22, 5), (6, 22, 6), (3, 21, 5), (6, 22, 6), (3, 21, 5), (6, 22, 6)],
    "fedpara": [(5, 20, 6), (5, 20, 6), (13, 31, 6), (5, 20, 6), (13, 31, 13), (19, 32, 15), (13, 31, 13)],
    "krona": [(6, 18, 6), (8, 21, 4), (8, 21, 8), (8, 21, 4), (8, 21, 8), (8, 32, 4), (6, 18, 6)],
    "ia3": [(1, 5, 1), (1, 5, 1), (1, 5, 1), (1, 5, 1), (1, 5, 1), (8, 34, 7), (1, 5, 1)],
    "ia3_input": [(1, 5, 1), (1, 5, 1), (1, 5, 1), (1, 5, 1), (1, 5, 1), (1, 27, 1), (1, 5, 1)],
    "bitfit": [(0, 3, 0), (0, 3, 0), (0, 3, 0), (0, 3, 0), (0, 3, 0), (0, 3, 0), (0, 3, 0)],
    "bottleneck": [(10, 26, 10), (10, 26, 10), (10, 26, 10), (10, 26, 10), (10, 26, 10), (10, 26, 10), (10, 26, 10)],
}
# For each of TOKENS: the same, and one more token after them by the cache of keys and values.
MODEL_COUNTS = {
    "lora": [(24, 102, 24, 24), (24, 102, 24, 24)],
    "lora_dropout": [(48, 108, 24, 24), (48, 108, 24, 24)],
    "lora_linears": [(84, 357, 84, 84), (84, 357, 84, 84)],
    "dora": [(36, 108, 30, 30), (36, 108, 30, 30)],
    "adalora": [(126, 462, 126, 126), (126, 462, 126, 126)],
    "fedpara": [(105, 420, 126, 126), (105, 420, 126, 126)],
    "krona": [(36, 108, 36, 36), (48, 126, 24, 36)],
    "ia3": [(9, 45, 9, 9), (9, 45, 9, 9)],
    "bitfit": [(0, 63, 0, 0), (0, 63, 0, 0)],
    "bottleneck": [(60, 156, 60, 60), (60, 156, 60, 60)],
    "parallel_adapter": [(33, 66, 30, 30), (33, 66, 30, 30)],
    "prefix_tuning": [(18, 27, 6, 6), (18, 27, 6, 6)],
    "prompt_tuning": [(6, 12, 6, 0), (6, 6, 6, 0)],
    "p_tuning": [(12, 34, 11, 0), (12, 28, 11, 0)],
    "llama_adapter": [(93, 126, 39, 39), (93, 126, 39, 39)],
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
