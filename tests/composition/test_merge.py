"""Merging for a while: back to the very bits, with nothing kept that was not overwritten, and nothing wrong silent."""

import copy
import io

import lightning.pytorch as pl
import pytest
import torch
from adapter_edits import stir
from cases import CASES, Case
from models import MODELS, logits, tokens
from normed import normed
from sampling import Laws
from torch import nn
from torch.utils.data import DataLoader
from trainer_models import Module, trainer

import lightning_peft as lp
from lightning_peft.core.fingerprint import fingerprint
from lightning_peft.core.weight_backup import changed_hosts

BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}
PAIRS = [Case(model, (lp.LoRA(rank=2), lp.KronA(), lp.IA3())) for model in ("bert", "gpt2", "llama", "fused_vit")]
PAIRS += [Case("llama", (lp.BitFit(add_missing=True), lp.LoRA(rank=2)))]
MERGEABLE = [case for case in CASES if case.mergeable] + PAIRS


def stirred(case, dtype=torch.float32):
    """An adapted model with values that matter, and zeros of both signs in the base."""
    model = MODELS[case.model]().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[0], p.view(-1)[-1] = 0.0, -0.0
    torch.manual_seed(1)
    stir(lp.inject(model, list(case.methods)), 2)
    return model


def bits(state):
    return {k: v.detach().clone().view(BITS.get(v.dtype, v.dtype)) for k, v in state.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def now(model):
    """The bits of what is in memory, whatever state dicts show."""
    return bits(dict(model.named_parameters()) | dict(model.named_buffers()))


# In the narrowest type most sums are rounded, so that bits that could not come back would be seen in any.
DTYPES = [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float64))]


@torch.no_grad()
def run(model, case):
    dtype = next(model.parameters()).dtype
    inputs = MODELS[case.model].inputs().items()
    return logits(model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs}))


@pytest.mark.usefixtures("ordinary_path")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@Laws()(cases=MERGEABLE)
def test_unmerging_gives_back_the_very_bits(case, dtype):
    model = stirred(case, dtype)
    before, state, y = now(model), bits(model.state_dict()), run(model, case)
    for_good = lp.merge(copy.deepcopy(model)).requires_grad_(False)  # frozen weights may take other kernels
    assert lp.merge(model, keep=True) is model
    torch.testing.assert_close(run(model, case), run(for_good, case), rtol=0, atol=1e-12)
    weights = now(model)
    assert all(torch.equal(v, weights[k]) for k, v in bits(for_good.state_dict()).items() if k in weights)
    assert same(bits(model.state_dict()), state)
    assert lp.unmerge(model) is model
    assert same(now(model), before)
    assert same(bits(model.state_dict()), state)
    assert torch.equal(run(model, case), y)
    assert not changed_hosts(model)
    assert not any(module._state_dict_hooks or module._load_state_dict_pre_hooks for module in model.modules())


def kept(model):
    return {
        f"{name}.{key}".removeprefix("blocks."): (slices.dimension, slices.indices.tolist())
        for name, _, what in changed_hosts(model)
        for key, slices in what.slices.items()
    }


def test_only_what_is_overwritten_is_kept():
    width = list(range(32))
    fused = lp.merge(stirred(Case("fused_vit", (lp.LoRA(rank=2),))), keep=True)
    rows = width + [64 + i for i in width]  # query and value, not key
    assert kept(fused) == {f"{i}.attn.qkv.weight": (0, rows) for i in range(3)}
    columns = kept(lp.merge(stirred(Case("gpt2", (lp.LoRA(rank=2),))), keep=True))
    assert columns == {f"transformer.h.{i}.attn.c_attn.weight": (1, rows) for i in range(3)}
    scaled = kept(lp.merge(stirred(Case("fused_vit", (lp.IA3(feedforward_targets=[]),))), keep=True))
    rows = [32 + i for i in range(64)]  # key and value; what is zero stays zero
    assert scaled == {f"{i}.attn.qkv.{key}": (0, rows if key == "weight" else rows[:-1]) for i in range(3)
                      for key in ("weight", "bias")}  # fmt: skip
    untrained = lp.inject(MODELS["bert"](), lp.LoRA(rank=2))
    assert kept(lp.merge(untrained, keep=True)) == {}
    plain = nn.Sequential(nn.Linear(4, 6))
    lp.inject(plain, lp.LoRA(rank=1, targets=["0"]))
    nn.init.ones_(plain[0].peft["lora"].a)
    plain[0].peft["lora"].b.data[2] = 1.0
    weight = plain[0].weight.detach().clone()
    lp.merge(plain, keep=True)
    ((_, _, what),) = changed_hosts(plain)
    assert what.slices["weight"].indices.tolist() == [2]
    assert torch.equal(what.slices["weight"].values, weight[2:3])
    torch.testing.assert_close(plain[0].weight[2], weight[2] + 16, rtol=0, atol=0)


def test_copies_and_pickles_are_unmerged_apart():
    case = MERGEABLE[0]
    model = stirred(case)
    before, y = now(model), run(model, case)
    merged = run(lp.merge(model, keep=True), case)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(run(twin, case), merged)
        assert same(bits(twin.state_dict()), bits(model.state_dict()))
        with pytest.raises(RuntimeError, match="call unmerge"):
            twin.load_state_dict(model.state_dict())
        lp.unmerge(twin)
        assert same(now(twin), before)
        assert torch.equal(run(twin, case), y)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(run(model, case), merged)
    assert same(now(lp.unmerge(model)), before)


def test_what_is_saved_while_merged_belongs_to_the_base(tmp_path):
    net = lp.inject(MODELS["bert"](), lp.LoRA(rank=2), also_train=["classifier"])
    stir(net, 0)
    nn.init.normal_(net.classifier.weight)
    expected, base, state = logits(net(tokens())), fingerprint(net), bits(net.state_dict())
    lp.merge(net, keep=True)
    assert fingerprint(net) != base
    assert same(bits(net.state_dict()), state)
    lp.save_adapter(net, tmp_path / "all")
    fresh = lp.load_adapter(MODELS["bert"](), tmp_path / "all")
    assert torch.equal(logits(fresh(tokens())), expected)
    again = lp.inject(MODELS["bert"](), lp.LoRA(rank=2), also_train=["classifier"])
    again.load_state_dict(net.state_dict())
    assert torch.equal(logits(again(tokens())), expected)
    for load in (lambda: lp.load_adapter(net, tmp_path / "all"), lambda: net.load_state_dict(net.state_dict()),
                 lambda: net.bert.load_state_dict(net.bert.state_dict())):  # fmt: skip
        with pytest.raises(RuntimeError, match="merged into this model's weights"):
            load()
    assert same(bits(lp.unmerge(net).state_dict()), state)


def test_a_bias_that_merging_adds_goes_again():
    net = lp.inject(MODELS["llama"](), lp.BitFit(add_missing=True))
    stir(net, 0)
    layer, names = net.model.layers[0].self_attn.q_proj, set(net.state_dict())
    lp.merge(net, keep=True)
    assert layer.bias is not None
    assert not layer.bias.requires_grad
    assert set(net.state_dict()) == names
    assert lp.unmerge(net).model.layers[0].self_attn.q_proj.bias is None


@pytest.fixture
def net():
    net = lp.inject(MODELS["llama"](), lp.LoRA(rank=2))
    stir(net, 0)
    return lp.merge(net, keep=True)


def test_adapters_cannot_change_while_merged(net, tmp_path):
    before = now(net)
    for act in (lambda: lp.merge(net), lambda: lp.merge(net, keep=True), lambda: lp.activate(net, "lora"),
                lambda: lp.inject(net, lp.IA3()), lambda: lp.add_adapter(net, lp.IA3()), lambda: lp.detach(net),
                lambda: lp.remove_adapter(net, "lora"), lambda: lp.disabled(net).__enter__(),
                lambda: lp.disabled(net.model).__enter__(), lambda: lp.merged(net).__enter__(),
                lambda: lp.row_adapters(net, ["lora"]).__enter__()):  # fmt: skip
        with pytest.raises(RuntimeError, match="call unmerge"):
            act()
    assert same(now(net), before)
    assert lp.active(net) == ("lora",)
    with pytest.raises(RuntimeError, match="does not require grad"):
        logits(net(tokens())).sum().backward()


@pytest.mark.filterwarnings("ignore:Fresh adapters are evaluated")
def test_no_fit_starts_while_merged():
    module = lp.inject(Module(), lp.LoRA(rank=2))
    stir(module, 0)
    rows = DataLoader(tokens(4), batch_size=2)
    expected = trainer(lp.PEFTStrategy(lp.LoRA(rank=2))).validate(module, rows, verbose=False)[0]["val_loss"]
    lp.merge(module, keep=True)
    with pytest.raises(RuntimeError, match="call unmerge"):
        trainer(lp.PEFTStrategy(lp.LoRA(rank=2)), max_steps=1).fit(module, rows)
    runs = trainer(lp.PEFTStrategy(lp.LoRA(rank=2)))
    found = runs.validate(module, rows, verbose=False)[0]["val_loss"]
    assert found == pytest.approx(expected, rel=1e-5)
    inside = Module()
    lp.merge(lp.inject(inside.net, lp.LoRA(rank=2)), keep=True)
    stir(inside, 0)
    lp.unmerge(inside.net)
    stir(inside, 0)
    lp.merge(inside.net, keep=True)
    with pytest.raises(RuntimeError, match="call unmerge"):
        trainer(lp.PEFTStrategy(lp.LoRA(rank=2))).validate(inside, rows, verbose=False)


@pytest.mark.filterwarnings("ignore:Fresh adapters are evaluated")
def test_a_checkpoint_written_while_merged_holds_the_base(tmp_path):
    module = Module()
    lp.inject(module, lp.LoRA(rank=2))
    stir(module, 0)
    state, rows = bits(module.state_dict()), DataLoader(tokens(4), batch_size=2)
    for full in (True, False):
        path = tmp_path / f"{full}.ckpt"
        runs = trainer(lp.PEFTStrategy(lp.LoRA(rank=2), full_checkpoint=full))
        with lp.merged(module):
            runs.validate(module, rows, verbose=False)
            runs.save_checkpoint(path)
        saved = bits(torch.load(path, weights_only=True)["state_dict"])
        assert saved.keys() == ({k for k in state if ".peft." in k} if not full else state.keys())
        assert all(torch.equal(v, state[k]) for k, v in saved.items())


def test_what_cannot_come_back_says_why(net):
    fresh = lp.inject(MODELS["llama"](), lp.LoRA(rank=2))
    for model in (fresh, MODELS["llama"](), lp.merge(fresh)):
        with pytest.raises(ValueError, match="nothing to unmerge in this LlamaForCausalLM: only merge.model, keep=Tr"):
            lp.unmerge(model)
    with pytest.raises(RuntimeError, match="q_proj.weight was torch.float32 when it was merged and is torch.bfloat16"):
        lp.unmerge(net.bfloat16())
    other = lp.merge(lp.inject(MODELS["llama"](), lp.LoRA(rank=2)), keep=True)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    before = now(other)
    with pytest.raises(RuntimeError, match="were written to since"):
        lp.unmerge(other)
    assert same(now(other), before)
    with torch.no_grad():
        other.model.norm.weight[0] -= 1
    lp.unmerge(other)


def test_refusals_leave_the_model_as_it_was():
    class Half(lp.WeightUpdate):
        def reset_parameters(self):
            pass

        def delta(self):
            raise ArithmeticError("half way")

        update = forward = None

    class Breaks(lp.Method):
        name = "breaks"

        def adapters(self, model):
            yield "model.layers.2.self_attn.v_proj", Half(model.model.layers[2].self_attn.v_proj)

    cases = [
        (lp.inject(MODELS["llama"](), [lp.LoRA(rank=2), Breaks(name="breaks")]), ArithmeticError, "half way"),
        (lp.inject(MODELS["bert"](), [lp.LoRA(rank=2), lp.FullFineTuning()]), ValueError, "trains in the base itself"),
        (
            lp.inject(MODELS["bert"](), [lp.IA3(), lp.BitFit()]),
            ValueError,
            "1.attention.self.key.bias trains in the base",
        ),
        (lp.inject(MODELS["llama"](), lp.PromptTuning(length=2)), TypeError, "cannot be merged"),
        (MODELS["llama"](), ValueError, "Nothing was injected into this"),
    ]
    nn.init.ones_(cases[2][0].bert.encoder.layer[1].attention.self.key.bias)
    for model, error, said in cases:
        stir(model, 0)
        before, orders = now(model), [getattr(m, "peft_order", None) for m in model.modules()]
        for act in (lambda model: lp.merge(model, keep=True), lambda model: lp.merged(model).__enter__()):
            with pytest.raises(error, match=said):
                act(model)
        assert same(now(model), before)
        assert [getattr(m, "peft_order", None) for m in model.modules()] == orders
        assert not any(m._state_dict_hooks or m._load_state_dict_pre_hooks for m in model.modules())
        if any(lp.adapters(model)):
            model.load_state_dict(model.state_dict())
    with lp.without_values():
        empty = lp.inject(MODELS["llama"].make(), lp.LoRA(rank=2))
    with pytest.raises(ValueError, match="no values yet"):
        lp.merge(empty, keep=True)
    stopped = cases[0][0]
    lp.remove_adapter(stopped, "breaks")
    with lp.disabled(stopped), pytest.raises(RuntimeError, match="leave disabled"):
        lp.merge(stopped, keep=True)


def test_quantized_layers_are_merged_for_good_or_not_at_all():
    net = lp.quantize(MODELS["llama"](), "int8")
    lp.inject(net, lp.LoRA(rank=2))
    for arguments in ({}, {"dequantize": True}):
        with pytest.raises(TypeError, match="unmerge had nothing to go back to"):
            lp.merge(net, keep=True, **arguments)


def test_a_module_around_the_merged_one_loads_nothing_either():
    module = pl.LightningModule()
    module.net = MODELS["bert"]()
    stir(lp.inject(module.net, lp.LoRA(rank=2)), 0)
    before = now(module)
    lp.merge(module.net, keep=True)
    merged = now(module)
    with pytest.raises(RuntimeError, match="call unmerge"):
        module.load_state_dict(module.state_dict())
    assert same(now(module), merged)
    lp.unmerge(module.net)
    assert same(now(module), before)


def test_a_narrow_bias_is_rounded_once():
    host = nn.Linear(3, 64).bfloat16()
    net = lp.inject(nn.Sequential(host), lp.IA3(targets=["0"], feedforward_targets=[]))
    scales, bias = host.peft["ia3"].scales, host.bias.detach().clone()
    nn.init.normal_(scales, mean=1.0)
    expected = (bias.double() * scales.detach().double()).float().bfloat16()
    assert not torch.equal(expected, bias * scales.detach().bfloat16())
    assert torch.equal(lp.merge(net)[0].bias, expected)


def test_statistics_and_heads_of_an_adapter_are_taken_out_again():
    net, x = normed(), torch.randn(5, 4)
    before, state, y = now(net), bits(net.state_dict()), net(x)
    lp.merge(net, keep=True)
    assert net.norm.running_mean.tolist() == [1.0] * 6
    assert net.norm.num_batches_tracked == 7
    assert {name: set(what.slices) for name, _, what in changed_hosts(net)} == {
        "first": {"weight"}, "head": {"weight"},
        "norm": {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"},
    }  # fmt: skip
    torch.testing.assert_close(net(x), y)
    assert same(bits(net.state_dict()), state)
    twin = copy.deepcopy(net)
    for one in (net, twin):
        assert same(now(lp.unmerge(one)), before)
        assert torch.equal(one(x), y)


def test_adapters_take_part_in_their_order_again():
    net = MODELS["bert"]()
    lp.add_adapter(net, lp.LoRA(rank=2), "task", also_train=["query"])
    lp.activate(net, "task")
    orders = [getattr(m, "peft_order", None) for m in net.modules()]
    assert ("task", "task_own") in orders
    lp.unmerge(lp.merge(net, keep=True))
    assert [getattr(m, "peft_order", None) for m in net.modules()] == orders


def test_a_write_into_what_copies_have_overwritten_is_noticed():
    net = lp.inject(nn.Sequential(nn.Linear(4, 4)), lp.OwnParameters(targets=["0"]))
    stir(net, 0)
    lp.merge(net, keep=True)
    before = net[0]._parameters["bias"].clone()
    net[0]._parameters["bias"].data.add_(1)
    with pytest.raises(RuntimeError, match="weights were written to since"):
        lp.unmerge(net)
    net[0]._parameters["bias"].data.copy_(before)
    assert lp.unmerge(net) is net


def test_the_weight_that_attention_reads_can_train_beside_adapters_on_it():
    net = lp.inject(nn.Sequential(nn.MultiheadAttention(4, 2)), lp.LoRA(targets=["0"], rank=1))
    lp.inject(net, lp.IA3(targets=["0"], feedforward_targets=[]), also_train=["0.in_proj_weight"])
    assert net[0]._parameters["in_proj_weight"].requires_grad
    assert [key for _, _, key, _ in lp.adapters(net)] == ["lora", "ia3"]
