"""What prefixes and prompts keep in evaluation changes no bit, whatever is changed between calls, and no file."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from counting import OperatorCount
from models import BEFORE_5, MODELS, cache_argument, tokens
from torch import nn

import lightning_peft as lp
from lightning_peft.ops.kept_result import KeptResult
from lightning_peft.ops.kept_rows import KeptRows

METHODS = {
    "prefix": lp.PrefixTuning(length=3, reparameterize=False),
    "prefix of a perceptron": lp.PrefixTuning(length=3, hidden_size=8),
    "p_tuning_v2": lp.PTuningV2(length=3, train_head=False),
    "llama_adapter": lp.LLaMAAdapter(length=3, layers=2),
    "prompt_tuning": lp.PromptTuning(length=3),
    "p_tuning, LSTM": lp.PTuning(length=3),
    "p_tuning, MLP": lp.PTuning(length=3, encoder="mlp"),
}
KEEPS = [name for name in METHODS if name != "prompt_tuning"]


def slow_but(*quick, among=METHODS):
    """Return the methods, of which the quick tests take some."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in among]


def build(method, base="llama"):
    model = lp.inject(MODELS[base](), METHODS[method]).eval()
    torch.manual_seed(3)
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def out(model, x=None):
    return model(input_ids=tokens() if x is None else x).logits


def check(model, x=None):
    """The output is that of a copy, which has nothing kept."""
    twin = copy.deepcopy(model)
    assert not any(kept(twin))
    output = out(model, x)
    assert torch.equal(output, out(twin, x))
    return output


def kept(model):
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, KeptResult):
                yield value.value is not None
            if isinstance(value, KeptRows):
                yield value._kept is not None


def every(model):
    return [p for *_, adapter in lp.adapters(model) for p in adapter.parameters()]


def step(model):
    optimizer = torch.optim.SGD(every(model), 0.5)
    model(input_ids=tokens()).logits.square().mean().backward()
    optimizer.step()


@torch.no_grad()
def halve_in_place(model):
    for p in every(model):
        p.mul_(0.5)


def halve_data(model):
    for p in every(model):
        p.data.mul_(0.5)


def halve_by_numpy(model):
    for p in every(model):
        p.detach().numpy()[...] *= 0.5


def load(model, assign):
    halved = {key: value * 0.5 if ".peft." in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(halved, assign=assign)


CHANGES = {
    "optimizer step": step,
    "in place": halve_in_place,
    "through .data": halve_data,
    "through numpy": halve_by_numpy,
    "load_state_dict": lambda model: load(model, False),
    "assigned state": lambda model: load(model, True),
    "double": lambda model: model.double(),
    "other base": lambda model: [p.data.mul_(1.1) for p in model.model.layers.parameters() if p.dim() == 2],
    "finalize": lambda model: lp.finalize(halve_data(model) or model),
}


@pytest.mark.parametrize("method", slow_but("prefix", "p_tuning, MLP"))
def test_each_change_is_noticed(method):
    model = build(method)
    before = check(model)
    assert any(kept(model)) is (method in KEEPS)
    for change, make in CHANGES.items():
        assert torch.equal(out(model), before)
        make(model)
        after = check(model)
        assert not torch.equal(after, before), change
        before = after
    check(model, tokens(4, 5))


def test_adapters_on_projections_are_noticed_and_left_again():
    model = build("llama_adapter")
    before = check(model)
    lp.add_adapter(model, lp.LoRA(rank=2, targets=["k_proj", "v_proj"]), "lora")
    for *_, adapter in lp.adapters(model):
        for name, parameter in adapter.named_parameters():
            if name in ("a", "b"):
                nn.init.normal_(parameter)
    lp.activate(model, "llama_adapter", "lora")
    assert not torch.equal(check(model), before)
    lp.activate(model, "llama_adapter")
    assert torch.equal(check(model), before)
    hooks = [layer.register_forward_hook(lambda m, x, y: 2 * y) for n, layer in model.named_modules() if "v_proj" in n]
    assert not torch.equal(check(model), before)
    for hook in hooks:
        hook.remove()
    assert torch.equal(check(model), before)


@pytest.mark.parametrize("method", KEEPS)
def test_files_and_states_hold_nothing_that_is_kept(method):
    used, fresh = build(method), build(method)
    out(used)
    assert list(used.state_dict()) == list(fresh.state_dict())
    assert not any(kept(pickle.loads(pickle.dumps(used))))
    sizes = []
    for model in (used, fresh):
        torch.save(model, file := io.BytesIO())
        sizes.append(file.tell())
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("method", KEEPS)
def test_training_uses_nothing_that_is_kept(method):
    model, grads = build(method), []
    for used in (False, True):
        if used:
            out(model)
            halve_data(model)
            halve_data(model)
            out(model)
            [p.data.mul_(4) for p in every(model)]
        grads.append(torch.autograd.grad(model(input_ids=tokens()).logits.square().mean(), every(model)))
    assert all(g.abs().sum() > 0 for g in grads[0])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("method", slow_but("llama_adapter", among=KEEPS))
def test_threads_that_share_an_adapter_get_the_same_bits(method):
    model, base = build(method), MODELS["llama"]().eval()
    inputs = [tokens(rows, length) for rows, length in ((1, 3), (2, 7), (4, 5), (2, 1))]
    expected = [(out(copy.deepcopy(model), x), out(base, x)) for x in inputs]

    def request(number):
        x, (adapted, plain) = inputs[number % 4], expected[number % 4]
        return torch.equal(out(model, x), adapted) and torch.equal(out(base, x), plain)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(request, range(60)))


def operators(model, x, train=False, cache=None):
    def run():
        call = {"input_ids": x, "attention_mask": torch.ones(len(x), x.shape[1] + (cache or 0), dtype=torch.long)}
        if cache is not None:
            ones = call["attention_mask"][:, :cache]
            call[cache_argument(model)] = model(input_ids=ones, attention_mask=ones, use_cache=True).past_key_values
        with OperatorCount() as count:
            y = model(**call, use_cache=cache is not None).logits
            if train:
                y.sum().backward()
        return count.operators.total()

    with torch.set_grad_enabled(train):
        run()
        return run()


def more(method, size, **settings):
    """Operators beside those of the base, which trains its input embeddings."""
    base, model = MODELS["llama"]().requires_grad_(False), build(method)
    base.get_input_embeddings().requires_grad_(True)
    for net in (base, model):
        net.train(settings.get("train", False))
    return operators(model, tokens(*size), **settings) - operators(base, tokens(*size), **settings)


@pytest.mark.skipif(BEFORE_5, reason="attention modules ask no interface before transformers 5")
@pytest.mark.parametrize(
    ("method", "evaluation", "decoding"),
    [
        ("prefix", 3 * 2, 3 * 2),  # in each of 3 layers, keys and values are joined, and nothing else is done
        ("p_tuning_v2", 3 * 2, 3 * 2),
        ("prefix of a perceptron", 3 + 3 * (2 + 3), 3 + 3 * (2 + 3)),  # and inputs compared
        ("llama_adapter", 2 * 13, 2 * 13),  # in each of 2 layers
        ("prompt_tuning", None, 5),  # the mask is looked at, and gets the virtual tokens
        ("p_tuning, LSTM", None, 5),
        ("p_tuning, MLP", None, 5),
    ],
)
def test_evaluation_and_decoding_run_few_operators_more_than_the_base(method, evaluation, decoding):
    assert more(method, (2, 1), cache=5) == decoding
    assert evaluation is None or more(method, (2, 7)) == evaluation
