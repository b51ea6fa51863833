"""LoRA on experts beside its formula: W_e + s B_e A_e for each expert e."""

import copy
import math

import pytest
import torch
from expert_models import EXPERTS, batch, expert_model, implementations
from models import BEFORE_5
from torch import nn

import lightning_peft as lp
from lightning_peft.ops.lazy_sum import LazySum

pytestmark = pytest.mark.skipif(BEFORE_5, reason="experts are modules before transformers 5")
BOTH = ["experts.up", "experts.down"]


def adapted(model, targets=BOTH, seed=0, **settings):
    """Inject LoRA with random factors."""
    lp.inject(model, lp.LoRA(targets=targets, **{"rank": 3, "alpha": 5, **settings}))
    randomize(model, seed)
    return model


def randomize(model, seed=0):
    torch.manual_seed(seed)
    for *_, adapter in lp.adapters(model):
        for factor in (adapter.a, adapter.b):
            nn.init.normal_(factor, std=0.3)


@torch.no_grad()
def by_formula(base, model, transposed, scale):
    """Write W_e + s B_e A_e into a copy of the base, expert by expert."""
    expected = copy.deepcopy(base)
    for name, _, key, adapter in lp.adapters(model):
        weight = expected.get_parameter(f"{name}.{key.removeprefix('lora_')}")
        for expert in range(len(weight)):
            change = scale * adapter.b[expert] @ adapter.a[expert]
            weight[expert] += (change.T if transposed else change).to(weight.dtype)
    return expected


@pytest.mark.parametrize(("name", "implementation"), implementations())
def test_live_outputs_and_gradients_are_those_of_the_formula(name, implementation):
    base = expert_model(name, implementation)
    model = adapted(copy.deepcopy(base))
    assert len(list(lp.adapters(model))) == 4
    expected = by_formula(base, model, EXPERTS[name], 5 / 3)
    live = model(batch()).logits
    assert (live - base(batch()).logits).abs().max() > 0.1
    torch.testing.assert_close(live, expected(batch()).logits, atol=2e-5, rtol=2e-5)
    # dL/dB_e = s dL/dW_e A_e^T, dL/dA_e = s B_e^T dL/dW_e
    live.square().sum().backward()
    expected(batch()).logits.square().sum().backward()
    for host, _, key, adapter in lp.adapters(model):
        by_weight = expected.get_parameter(f"{host}.{key.removeprefix('lora_')}").grad
        by_weight = by_weight.mT if EXPERTS[name] else by_weight
        for found, wanted in ((adapter.b.grad, by_weight @ adapter.a.mT), (adapter.a.grad, adapter.b.mT @ by_weight)):
            torch.testing.assert_close(found, 5 / 3 * wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize(("name", "implementation"), implementations())
def test_no_sum_is_formed_in_a_step(name, implementation, monkeypatch):
    def refuse(self):
        raise AssertionError("the sum was formed")

    model = adapted(expert_model(name, implementation))
    monkeypatch.setattr(LazySum, "full", refuse)
    model(batch()).logits.sum().backward()
    assert all(adapter.a.grad.abs().sum() > 0 for *_, adapter in lp.adapters(model))


@pytest.mark.parametrize(("name", "implementation"), implementations())
def test_step_0_is_the_base(name, implementation):
    base = expert_model(name, implementation).requires_grad_(False)
    model = lp.inject(copy.deepcopy(base), lp.LoRA(targets=BOTH, rank=3))
    assert torch.equal(model(batch()).logits, base(batch()).logits)


@pytest.mark.parametrize("name", EXPERTS)
def test_merging_gives_the_live_model_and_unmerging_the_bits_of_the_base(name):
    base = expert_model(name, dtype=torch.float64)
    model = adapted(copy.deepcopy(base))
    live = model(batch()).logits
    with lp.merged(model):
        torch.testing.assert_close(model(batch()).logits, live, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(model(batch()).logits, live, atol=0, rtol=0)
    with lp.disabled(model):
        assert torch.equal(model(batch()).logits, base(batch()).logits)
    merged = lp.merge(copy.deepcopy(model))
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    torch.testing.assert_close(merged(batch()).logits, live, atol=1e-12, rtol=1e-10)
    assert torch.equal(lp.detach(model)(batch()).logits, base(batch()).logits)


def test_several_adapters_add_up_and_can_be_switched():
    base = expert_model("gpt_oss", "grouped_mm")
    model = adapted(copy.deepcopy(base))
    one = model(batch()).logits
    lp.add_adapter(model, lp.LoRA(name="two", targets=["experts.down"], rank=2, alpha=3))
    second = [adapter for _, _, key, adapter in lp.adapters(model) if key.startswith("two")]
    for adapter in second:
        nn.init.normal_(adapter.b, std=0.3)
    assert torch.equal(model(batch()).logits, one)
    lp.activate(model, "lora", "two")
    both = model(batch()).logits
    assert (both - one).abs().max() > 0.05
    expected = copy.deepcopy(base)
    with torch.no_grad():
        for host, _, key, adapter in lp.adapters(model):
            method, part = key.split("_", 1)
            scale = {"lora": 5 / 3, "two": 3 / 2}[method]
            expected.get_parameter(f"{host}.{part}").add_((scale * adapter.b @ adapter.a).mT)
    torch.testing.assert_close(both, expected(batch()).logits, atol=2e-5, rtol=2e-5)
    lp.activate(model, "lora")
    assert torch.equal(model(batch()).logits, one)


def test_two_methods_on_one_module_leave_each_other_alone():
    base = expert_model("mixtral")
    model = lp.inject(copy.deepcopy(base), [lp.LoRA(name="u", targets=["experts.up"], rank=2),
                                            lp.LoRA(name="d", targets=["experts.down"], rank=3)])  # fmt: skip
    assert sorted(key for _, _, key, _ in lp.adapters(model)) == ["d_down_proj"] * 2 + ["u_gate_up_proj"] * 2
    assert torch.equal(model(batch()).logits, base.requires_grad_(False)(batch()).logits)


def test_all_linear_means_experts_and_rank_patterns_reach_them():
    model = expert_model("mixtral")
    method = lp.LoRA(targets=["all-linear"], rank=4, rank_pattern={"experts.down_proj": 2}, scaling="rank_stabilized")
    lp.inject(model, method)
    on = {f"{name}.{adapter.part}".strip("."): adapter for name, _, _, adapter in lp.adapters(model)}
    assert len(on) == 2 * (4 + 2)  # attention's four projections and the experts' two; the router is no linear layer
    down, up = on["model.layers.1.mlp.experts.down_proj"], on["model.layers.1.mlp.experts.gate_up_proj"]
    assert (down.a.shape, down.b.shape, down.scale) == ((4, 2, 24), (4, 32, 2), 16 / math.sqrt(2))
    assert (up.a.shape, up.b.shape, up.scale) == ((4, 4, 32), (4, 48, 4), 16 / 2)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_each_expert_starts_as_a_layer_of_its_own(name, init):
    base = expert_model(name)
    model = lp.inject(copy.deepcopy(base), lp.LoRA(targets=BOTH, rank=3, alpha=6, init=init))
    torch.testing.assert_close(model(batch()).logits, base(batch()).logits, atol=2e-5, rtol=2e-5)
    for host, _, _, adapter in lp.adapters(model):
        weight = base.get_parameter(f"{host}.{adapter.part}").detach()
        weight = weight.mT if EXPERTS[name] else weight
        for expert in range(4):
            product = 2 * adapter.b[expert] @ adapter.a[expert]
            if init == "pissa":  # the best approximation of rank 3
                u, s, v = torch.linalg.svd(weight[expert])
                torch.testing.assert_close(product, u[:, :3] * s[:3] @ v[:3], atol=1e-4, rtol=1e-4)
            elif init == "olora":
                q, r = torch.linalg.qr(weight[expert])
                torch.testing.assert_close(product, 2 * q[:, :3] @ r[:3], atol=1e-4, rtol=1e-4)
            else:
                assert product.abs().max() < 1e-5
                assert adapter.a[expert].std() > 0.01
    randomize(model)
    live = model(batch()).logits
    torch.testing.assert_close(lp.merge(model)(batch()).logits, live, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize(("name", "implementation"), implementations())
def test_dropout_acts_on_the_inputs_of_a_in_training_alone(name, implementation):
    model = adapted(expert_model(name, implementation), dropout=0.5)
    plain = adapted(expert_model(name, implementation))
    assert torch.equal(model(batch()).logits, plain(batch()).logits)
    model.train()
    torch.manual_seed(0)
    first = model(batch()).logits
    assert (first - model(batch()).logits).abs().max() > 1e-3
    for *_, adapter in lp.adapters(model):
        adapter.dropout = 1 - 1e-7  # of all inputs
    base = expert_model(name, implementation).train()
    torch.testing.assert_close(model(batch()).logits, base(batch()).logits, atol=1e-5, rtol=1e-5)


def test_an_adapter_file_holds_the_experts_and_gives_them_back(tmp_path):
    model = adapted(expert_model("deepseek_v3"), targets=["all-linear"])
    lp.save_adapter(model, tmp_path / "adapter")
    other = lp.load_adapter(expert_model("deepseek_v3"), tmp_path / "adapter")
    assert torch.equal(other(batch()).logits, model(batch()).logits)
    keys = [key for key in dict(other.named_parameters()) if "mlp.experts.peft" in key]
    assert "model.layers.0.mlp.experts.peft.lora_gate_up_proj.a" in keys
    assert len(keys) == 2 * 2 * 2


def test_bfloat16_weights_keep_float32_factors():
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        base = expert_model("mixtral", implementation, torch.bfloat16)
        model = adapted(copy.deepcopy(base))
        assert {adapter.a.dtype for *_, adapter in lp.adapters(model)} == {torch.float32}
        live = model(batch()).logits
        assert live.dtype == torch.bfloat16
        wide = by_formula(base, model, False, 5 / 3)(batch()).logits
        torch.testing.assert_close(live, wide, atol=0.1, rtol=0.1)
        live.float().sum().backward()


def test_a_rank_above_the_sides_of_an_expert_is_refused_or_left_out():
    model = expert_model("mixtral")
    with pytest.raises(ValueError, match=r"rank at model.layers.0.mlp.experts.gate_up_proj must be at most 32"):
        lp.inject(model, lp.LoRA(targets=["experts.up"], rank=33))
    with pytest.warns(UserWarning, match=r"leaves out 2 layers with fewer.*experts.down_proj"):
        lp.inject(model, lp.LoRA(targets=["all-linear"], rank=26, exclude=["k_proj", "v_proj"]))
    assert {key for _, _, key, _ in lp.adapters(model)} == {"lora", "lora_gate_up_proj"}


def test_a_kernel_that_reads_weights_by_their_address_is_refused():
    model = adapted(expert_model("mixtral"))
    (_, host, _, adapter), *_ = lp.adapters(model)
    with pytest.raises(AttributeError, match=r"asks for 'stride'.*set_experts_implementation\('grouped_mm'\)"):
        adapter.updated(host).stride()


def test_what_is_no_product_sees_the_sum():
    model = adapted(expert_model("gpt_oss"))
    (_, host, _, adapter), *_ = lp.adapters(model)
    weight = host._parameters[adapter.part]
    expected = weight + 5 / 3 * (adapter.b @ adapter.a).mT
    torch.testing.assert_close(torch.einsum("eio->oi", adapter.updated(host)), expected.sum(0).T)


@pytest.mark.slow
def test_the_model_compiles_whole_with_batched_and_grouped_products():
    for implementation in ("batched_mm", "grouped_mm"):
        experts = adapted(expert_model("mixtral", implementation)).model.layers[0].mlp.experts
        x, index, share = torch.randn(5, 32), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
        torch._dynamo.reset()
        compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, index, share), experts(x, index, share), atol=1e-5, rtol=1e-5)


def test_calls_in_other_threads_see_the_stored_weight():
    model = adapted(expert_model("mixtral"))
    (_, host, _, adapter), *_ = lp.adapters(model)
    stored, seen = host._parameters[adapter.part], []
    host.act_fn = nn.SiLU()
    host.act_fn.register_forward_hook(lambda *_: seen.append(host.get_parameter(adapter.part) is stored))
    model(batch())
    assert seen
    assert all(seen)
