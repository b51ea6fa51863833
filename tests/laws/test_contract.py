"""The laws that every method obeys on every model."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, adapted, call, disturb, run
from models import MODELS
from sampling import Laws, method_of
from torch import nn

import lightning_peft as lp

law = Laws()
GENERATING = {"llama", "gpt2", "t5", "bart"}
RECOMPUTING = {"bert", "llama", "gpt2", "distilbert", "t5", "bart", "vit"}


@law()
def test_base_keys_stay_and_a_base_state_loads_after_injection(case):
    base, model = MODELS[case.model](), adapted(case)
    assert base.state_dict().keys() <= model.state_dict().keys()
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(".peft." in f".{key}" for key in result.missing_keys)
    assert all(isinstance(new, type(old)) for old, new in zip(base.modules(), _base_modules(model), strict=True))


def _base_modules(model):
    return [m for name, m in model.named_modules() if ".peft" not in f".{name}"]


@law()
@pytest.mark.usefixtures("ordinary_path")
def test_step_0_is_the_base_bit_for_bit(case):
    same = torch.equal(run(adapted(case), case), run(MODELS[case.model]().requires_grad_(False), case))
    assert same == case.starts_at_base


@law()
def test_trained_values_matter_and_both_modes_agree(case):
    model = disturb(adapted(case))
    y = run(model, case)
    assert (y - run(MODELS[case.model](), case)).abs().max() > 1e-3
    torch.testing.assert_close(run(model.train(), case), y, atol=1e-5, rtol=1e-5)


@law()
def test_detach_restores_the_base(case):
    base, model = MODELS[case.model](), adapted(case)
    required = [p.requires_grad for p in base.parameters()]
    lp.detach(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert [p.requires_grad for p in model.parameters()] == required
    assert torch.equal(run(model, case), run(base, case))


@law(lambda case: not case.mergeable)
def test_a_refused_merge_leaves_the_model_untouched(case):
    model = disturb(adapted(case))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="cannot be merged"):
        lp.merge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@law(lambda case: case.mergeable)
def test_merge_equals_live(case):
    model = disturb(adapted(case))
    y = run(model, case)
    lp.merge(model)
    torch.testing.assert_close(run(model, case), y, atol=1e-5, rtol=1e-5)
    assert [type(m) for m in model.modules()] == [type(m) for m in MODELS[case.model]().modules()]
    assert not any(".peft." in key for key in model.state_dict())


@law(lambda case: case.updates_weights)
def test_update_is_the_map_of_delta(case):
    model = disturb(adapted(case)).double()
    for _, host, _, adapter in lp.adapters(model):
        if isinstance(adapter, lp.WeightUpdate):
            x = torch.randn(3, adapter.shape[1], dtype=torch.float64)
            weight = adapter.rows.take(adapter.layer.read(host))
            torch.testing.assert_close(adapter.update(host, x), F.linear(x, adapter.updated(weight) - weight))
            if not adapter.exclusive:
                torch.testing.assert_close(adapter.updated(weight), weight + adapter.delta())


@law()
def test_three_steps_train_what_is_declared_and_nothing_else(case):
    model = adapted(case).train()
    declared = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"{n}.peft.{k}.{p}".lstrip(".") for n, _, k, a in lp.adapters(model) for p, _ in a.named_parameters()}
    expected |= {name for method in case.methods for name in method.parameters(MODELS[case.model]())}
    assert declared == expected
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        out = call(model, case)
        F.cross_entropy(out.flatten(0, -2), torch.arange(out.flatten(0, -2).shape[0]) % 3).backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == declared
        optimizer.step()
    still = {name for name in declared if torch.equal(model.get_parameter(name), before[name])}
    assert not {name for name in still if not _without_influence(name)}
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved <= declared


def _without_influence(name):
    """A key's bias moves all scores of a query alike; rows of a table that no token reads get no gradient."""
    return name.endswith(("key.bias", "k_proj.bias")) or "embeddings" in name or ".k_proj.peft" in name


@law()
def test_copies_are_equal_and_independent(case):
    model = disturb(adapted(case))
    y = run(model, case)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, case), y)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_() if parameter.requires_grad else None
        assert torch.equal(run(model, case), y)
        assert not torch.equal(run(twin, case), y)


@law()
def test_an_adapter_file_brings_it_back(case, tmp_path):
    model = disturb(adapted(case))
    lp.save_adapter(model, tmp_path)
    fresh = lp.load_adapter(MODELS[case.model](), tmp_path)
    assert torch.equal(run(fresh, case), run(model, case))
    trained = {n for n, p in lp.finalize(model).named_parameters() if p.requires_grad}
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == trained


@law()
def test_a_narrow_base_keeps_wide_adapters(case):
    cast_after, cast_before = adapted(case).bfloat16(), MODELS[case.model]().bfloat16()
    torch.manual_seed(1)
    lp.inject(cast_before, list(case.methods))
    for model in (cast_after, cast_before):
        types = {p.dtype for *_, a in lp.adapters(model) for p in a.parameters()}
        assert types <= {torch.float32}
        assert run(model, case).dtype == torch.bfloat16
        assert run(model, case).isfinite().all()


def two_blocks(model):
    """Take the last of three blocks away, wherever a model lists some: compiling takes time for each."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential)}
    for name, part in lists.items():
        if len(part) == 3 and not any(name.startswith(f"{other}.") for other in lists):
            del part[2]
    return model


# To compile takes seconds: each method is traced through autograd on one model and, unless it computes what another
# does, compiled without that on a second; test_compiled.py compiles all methods on the models that are left out here.
compiling, others = Laws(), [case for case in CASES if case.model not in ("llama", "bert")]
ALIKE = {"LoRA", "LoRA-pissa", "LoRA-orthogonal+LoRA-olora", "FedPara-personalized", "KronA-factor-all"}
ALIKE |= {"FullFineTuning", "OutputLayers", "LastLayers", "BitFit", "KronABlock", "ParallelAdapter", "PTuning-mlp"}
TRACED = compiling.sample(others)
OTHERS = [case for case in compiling.sample(others) if method_of(case) not in ALIKE]
COMPILED = {str(case): case for case in TRACED + OTHERS}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED.values(), ids=str)
def test_compiles_whole_with_gradients(case):
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = disturb(lp.inject(two_blocks(MODELS[case.model]()), list(case.methods)))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    y = call(model, case)
    expected = torch.autograd.grad(y.square().sum(), [model.get_parameter(n) for n in names])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if case in TRACED else "eager")
    z = call(compiled, case)
    torch.testing.assert_close(z, y, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(z.square().sum(), [model.get_parameter(n) for n in names])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@law(lambda case: case.model in RECOMPUTING)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(case):
    results = []
    for reentrant in (None, False, True):
        model = disturb(adapted(case)).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        if reentrant:
            model.enable_input_require_grads()  # without it that kind gives no gradients at all, as everywhere
        call(model, case).square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(results[2], results[0], atol=1e-5, rtol=1e-4)


@law()
def test_autocast_to_bfloat16_changes_values_by_rounding_alone(case):
    model = disturb(adapted(case)).train()
    y = run(model, case)
    with torch.autocast("cpu", torch.bfloat16):
        z = call(model, case)
        z.float().square().mean().backward()
    assert (z - y).norm() < 0.1 * y.norm()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.isfinite().all() for p in trained)


@law(lambda case: case.model in GENERATING)
def test_generation_agrees_with_and_without_cache_beams_and_padding(case):
    model = disturb(adapted(case))
    inputs = MODELS[case.model].inputs()
    x, mask = inputs["input_ids"], inputs["attention_mask"].clone()
    kept = slice(0, 5) if case.model == "bart" else slice(2, 7)  # the other columns of the first row are padding
    mask[0] = 0
    mask[0, kept] = 1
    ids, scores = generate(model, x, mask)
    again, others = generate(model, x, mask, use_cache=False)
    assert torch.equal(again, ids)
    torch.testing.assert_close(others, scores, atol=1e-4, rtol=1e-4)  # ids alone may repeat one token
    alone, others = generate(model, x[:1, kept], mask[:1, kept])
    assert torch.equal(ids[:1, -4:], alone[:, -4:])
    torch.testing.assert_close(others, scores[:, :1], atol=1e-4, rtol=1e-4)
    beams, scores = generate(model, x, mask, num_beams=3)
    again, others = generate(model, x, mask, num_beams=3, use_cache=False)
    assert torch.equal(again, beams)
    torch.testing.assert_close(others, scores, atol=1e-4, rtol=1e-4)


def generate(model, x, mask, **settings):
    """Return ids and the scores of each step."""
    settings |= {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    output = model.generate(x, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **settings)
    return output.sequences, torch.stack(output.scores)


@law(lambda case: MODELS[case.model].reads != "images" and MODELS[case.model].positions != "absolute")
def test_padding_on_the_left_does_not_matter(case):
    require_that_padding_does_not_matter(case, "left")


@law(lambda case: MODELS[case.model].reads != "images")
def test_padding_on_the_right_does_not_matter(case):
    require_that_padding_does_not_matter(case, "right")


def require_that_padding_does_not_matter(case, side):
    model = disturb(adapted(case))
    y, z = run(model, case, side), run(model, case)
    if y.dim() == 3 and y.shape[1] == 10:
        y = y[:, 3:] if side == "left" else y[:, :7]
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)


def test_a_module_of_torch_in_eval_mode_is_adapted_too():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        base = encoder(x)
        disturb(lp.inject(encoder, lp.LoRA(targets=["linear1", "linear2"])))
        y = encoder(x)
        assert (y - base).abs().max() > 1e-2
        torch.testing.assert_close(encoder.train()(x), y, atol=1e-5, rtol=1e-5)
        assert torch.equal(lp.detach(encoder.eval())(x), base)
    assert not any(module._forward_pre_hooks for module in encoder.modules())


READ = {
    "by role": (["attention.query", "attention.value", "attention.output"], 3),
    "by name": (["self_attn", "out_proj"], 2),
    "by part": (["attention.key"], 1),
}


@pytest.mark.parametrize("decompose", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", READ)
def test_weights_that_torchs_attention_reads_are_adapted(name, decompose):
    """The reference is the same encoder with the updated weights written into it."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2)
    base, x = copy.deepcopy(encoder), torch.randn(2, 5, 32)
    targets, count = READ[name]
    method = lp.LoRA(targets=targets, rank=2, decompose=decompose)
    lp.inject(encoder, method)
    start = encoder(x)
    torch.testing.assert_close(start, base(x), atol=1e-6 if decompose else 0, rtol=0)
    disturb(encoder)
    assert len(list(lp.adapters(encoder))) == 2 * count
    expected = copy.deepcopy(base)
    for host_name, _, _, adapter in lp.adapters(encoder):
        layer = expected.get_submodule(host_name)
        weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
        rows = slice(*adapter.rows.ends)
        v = weight.detach()[rows] + 8 * adapter.b.detach() @ adapter.a.detach()
        v = v * (adapter.magnitude.detach() / v.norm(dim=1))[:, None] if decompose else v
        weight.data[rows] = v
    torch.testing.assert_close(encoder(x), expected(x))
    assert (encoder(x) - base(x)).abs().max() > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), expected.eval()(x), atol=1e-5, rtol=1e-5)
    encoder.train()(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for *_, a in lp.adapters(encoder) for p in a.parameters())
    twin = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(twin(x), encoder(x))
    merged = lp.merge(twin)
    torch.testing.assert_close(merged(x), expected(x))
    assert torch.equal(lp.detach(encoder)(x), base(x))
    assert torch.equal(encoder.layers[0].self_attn.in_proj_weight, base.layers[0].self_attn.in_proj_weight)


NESTED = [lp.LoRA(rank=2), lp.LoRA(rank=2, decompose=True), lp.AdaLoRA(initial_rank=2, target_rank=1)]
NESTED += [lp.FedPara(rank=2), lp.FedPara(rank=2, tanh=True), lp.KronA(scale=2)]


@pytest.mark.parametrize("rows", [1, 40], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("method", NESTED, ids=lambda m: type(m).__name__)
def test_rows_that_torch_packs_are_adapted_too(method, rows):
    """With a padding mask, torch's encoder packs rows into a nested tensor in eval mode, unless it is adapted."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2)
    method = dataclasses.replace(method, targets=["linear1", "linear2"])
    disturb(lp.inject(encoder, method))
    x, padding = torch.randn(rows, 5, 32), torch.zeros(rows, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        y = encoder.train()(x, src_key_padding_mask=padding)
        z = encoder.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(z[0, :3], y[0, :3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(z[1:], y[1:], atol=1e-4, rtol=1e-4)
