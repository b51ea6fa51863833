"""Precision plugins of the Trainer, and types of weights: what trains stays wide, and computes right beside 16 bits."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from cases import CASES, Case, adapted, call, disturb
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, MixedPrecision, TransformerEnginePrecision
from parallel_laws import Task, fit
from sampling import Laws
from torch.utils._pytree import tree_leaves, tree_map
from trainer_models import data, module, trainer

import lightning_peft as lp
from lightning_peft.core.adapted_module import AdaptedModule

FAMILIES = [case for case in CASES if case.model in ("bert", "llama", "fused_vit")]
law = Laws()


class Types(pl.Callback):
    """Notes the types of what trains, of its gradients and of the optimizer's state after the last step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {n: p.grad.dtype for n, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_end(self, trainer, pl_module):
        trained = {n: p for n, p in pl_module.named_parameters() if p.requires_grad}
        optimizer = trainer.optimizers[0]
        self.values = {n: p.dtype for n, p in trained.items()}
        self.moments = {n: optimizer.state[p]["exp_avg"].dtype for n, p in trained.items()}
        frozen = [p for n, p in pl_module.named_parameters() if ".peft." not in n and not p.requires_grad]
        self.base = {p.dtype for p in frozen if p.dim() > 1}
        # Adam's 1e-8 is zero in float16, so that a parameter of the base without a gradient becomes 0 / 0 there.
        self.finite = all(p.isfinite().all() for p in trained.values() if p.dtype != torch.float16)


class Narrow(Task):
    """Loads its base in 16 bits."""

    def __init__(self, model):
        super().__init__(model)
        self.net.bfloat16()


class Half(Task):
    """The same for 16-mixed."""

    def __init__(self, model):
        super().__init__(model)
        self.net.half()


def scaled():
    """Return what 16-mixed is on a GPU."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]}


TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
RUNS = {
    "bf16-true": ({"precision": "bf16-true"}, Task),
    "16-true": ({"precision": "16-true"}, Task),
    "bf16-mixed": ({"precision": "bf16-mixed"}, Task),
    "bf16-mixed, narrow base": ({"precision": "bf16-mixed"}, Narrow),
    "16-mixed": (scaled, Task),
    "16-mixed, narrow base": (scaled, Half),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* base parameters train in", "ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("name", RUNS)
def test_adapters_and_their_optimizer_state_are_float32(name):
    settings, make = RUNS[name]
    for case in FAMILIES[list(RUNS).index(name) % 2 :: 2]:  # each in one true type at least, and in one mixed one
        if settings is scaled and "lstm" in str(case):
            continue  # torch has no LSTM in float16 on the CPU
        types = Types()
        fit(case, "auto", types, make=make, max_steps=2, **(settings() if callable(settings) else settings))
        for found in (types.values, types.gradients, types.moments):
            wide = {n for n, dtype in found.items() if dtype == torch.float32}
            assert wide >= {n for n in found if ".peft." in n}, case
            assert wide == found.keys() or name in TRUE, case
        assert types.finite, case
        expected = TRUE.get(name, {Narrow: torch.bfloat16, Half: torch.float16}.get(make, torch.float32))
        assert types.base <= {expected}, case


def test_what_trains_narrow_of_the_base_is_told():
    case = Case("bert", (lp.LoRA(rank=2),))
    with pytest.warns(UserWarning, match=r"2 base parameters train in torch.bfloat16 \(net.classifier.weight") as found:
        fit(case, "auto", also_train=["classifier"], precision="bf16-true", max_steps=1)
    assert "precision='bf16-mixed'" in str(found[0].message)
    fit(case, "auto", precision="bf16-true", max_steps=1)  # nothing of the base trains: no warning


def test_small_steps_of_a_head_beside_a_narrow_base_are_kept():
    class Slow(Narrow):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    net = fit(Case("bert", (lp.LoRA(rank=2),)), "auto", make=Slow, also_train=["classifier"], precision="bf16-mixed")
    weight = net.net.classifier.weight
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("plugin", [BitsandbytesPrecision, TransformerEnginePrecision])
def test_plugins_that_replace_layers_are_refused(plugin):
    tuner = trainer(lp.PEFTStrategy(lp.LoRA(rank=2)))
    tuner.strategy._precision_plugin = plugin.__new__(plugin)  # neither can be made without its library and a GPU
    tuner.strategy._precision_plugin.replace_layers = None
    with pytest.raises(TypeError, match=f"{plugin.__name__} would replace adapted layers"):
        tuner.fit(module(), data())


@law(lambda case: case.has_adapters and case.model not in ("t5", "bart"), every=2)  # whose attention takes a cache
def test_wide_adapters_on_a_narrow_base_compute_what_float64_does(case):
    """Each host alone, with the inputs that it sees in the model and a random gradient of its output."""
    model = disturb(adapted(case)).bfloat16().train()
    if hasattr(model, "config"):
        model.config.use_cache = False
    exact = copy.deepcopy(model).double()
    for name, (args, kwargs) in seen_by_hosts(model, case).items():
        host, twin = model.get_submodule(name), exact.get_submodule(name)
        y, z = tensor_in(host(*args, **kwargs)), tensor_in(twin(*doubled(args), **doubled(kwargs)))
        assert y.dtype == torch.bfloat16
        assert (y - z).norm() < 0.03 * z.norm(), name
        if any(isinstance(part, AdaptedModule) for part in host.modules() if part is not host):
            continue  # what a ReLU inside lets through by rounding is not this adapter's
        gradient = torch.randn_like(y)
        found, expected = (gradients(m, out, gradient) for m, out in ((host, y), (twin, z)))
        assert (found - expected).norm() <= 0.1 * expected.norm(), name


def seen_by_hosts(model, case):
    seen = {}
    hosts = {name: host for name, host, *_ in lp.adapters(model)}
    for name, host in hosts.items():
        host.register_forward_pre_hook(
            lambda module, *inputs, name=name: seen.setdefault(name, inputs) and None, with_kwargs=True
        )
    with torch.no_grad():
        call(model, case)
    for host in hosts.values():
        host._forward_pre_hooks.clear()
    return seen


def gradients(host, output, gradient):
    trained = [p for p in host.peft.parameters() if p.requires_grad]
    found = torch.autograd.grad(output, trained, gradient.to(output.dtype), materialize_grads=True) if trained else []
    return torch.cat([torch.zeros(1, dtype=torch.float64), *(g.flatten().double() for g in found)])


def tensor_in(output):
    leaves = tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())


def doubled(inputs):
    return tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs)


@law(lambda case: case.model == "bert")
def test_adapters_that_were_made_narrow_train(case):
    model = disturb(adapted(case)).bfloat16().train()
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            parameter.data = parameter.data.bfloat16()
    call(model, case).float().square().mean().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)


def test_a_base_in_float16_warns_where_no_gradient_is_scaled():
    strategy = lp.PEFTStrategy(lp.LoRA(rank=2), show_summary=False)
    narrow = module()
    narrow.net.half()
    with pytest.warns(UserWarning, match="gradients below 6e-8 vanish. Train with precision='16-mixed'"):
        trainer(strategy, max_steps=1).fit(narrow, data())
    wide = module()
    wide.net.bfloat16()
    trainer(strategy, max_steps=1).fit(wide, data())  # warnings are errors here
    assert {p.dtype for p in wide.net.parameters() if p.requires_grad} == {torch.float32}
