"""AdaLoRA against its paper's formulas, against installed peft step by step, and through a Trainer's life."""

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from models import MODELS, logits, tokens
from safetensors.torch import load_file, save_file
from single_layers import LAYERS, Net, fill, needs_peft, only
from torch import nn
from trainer_models import Module, Resumable, data, module, trainer

import lightning_peft as lp
from lightning_peft.core.injection_record import adapters_of
from lightning_peft.methods.families.svd_triplets import SVDTriplets, allocate, group_by_shape, observe, score

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
PLAIN = ["q_proj", "v_proj", "fc1", "fc2"]


def ada(**settings):
    return lp.AdaLoRA(**{"initial_rank": 4, "target_rank": 2, **settings})


def adapted(base="llama", **settings):
    return lp.inject(MODELS[base](), ada(**settings))


def found(model):
    return [adapter for *_, adapter in lp.adapters(model)]


def train(model, method, steps, rate=0.5):
    """Train with plain SGD and no Trainer, on data that differs from step to step; returns the model."""
    inside = list(adapters_of(model, method).values())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        optimizer.zero_grad()
        out = logits(model(torch.randint(3, 64, (4, 7)))).flatten(0, -2)
        F.cross_entropy(out, torch.arange(len(out)) % 3).backward()
        optimizer.step()
        method.after_step(inside, step, steps)
    return model


# The layer


@pytest.mark.parametrize("name", LAYERS)
def test_value_and_gradient_are_those_of_the_updated_weight(name):
    make, shape = LAYERS[name]
    base = make().double()
    x = torch.tensor([[0, 3, 9], [4, 4, 1]]) if shape is None else torch.randn(shape, dtype=torch.float64)
    model = fill(lp.inject(Net(base), ada(initial_rank=2, alpha=5, targets=["layer"])))
    host, adapter = only(model)
    y = model(x)
    factors = [adapter.a, adapter.b, adapter.e]
    assert {factor.dtype for factor in factors} == {torch.float64}
    gradients = list(torch.autograd.grad(y.square().sum(), factors))

    q, p, e = (t.detach().clone().requires_grad_() for t in factors)
    delta = 5 / (2 + 1e-5) * torch.einsum("or,r,ri->oi", p, e, q.flatten(1)).view(adapter.shape)
    torch.testing.assert_close(adapter.delta(), delta)
    stored = host.weight + (delta.T if shape is None or name.startswith("transformers") else delta)
    state = {"weight": stored} | ({"bias": host.bias} if getattr(host, "bias", None) is not None else {})
    expected = torch.func.functional_call(make().double(), state, (x,))
    torch.testing.assert_close(y, expected)
    if shape is None:  # torch's layer gives its padding row no gradient, and P and E read that row too
        expected = torch.func.functional_call(nn.Embedding(10, 6).double(), state, (x,))
        keep = (x != 0).unsqueeze(-1)
        gradients = list(torch.autograd.grad((model(x) * keep).square().sum(), factors))
        torch.testing.assert_close(gradients, list(torch.autograd.grad((expected * keep).square().sum(), [q, p, e])))
        return
    torch.testing.assert_close(gradients, list(torch.autograd.grad(expected.square().sum(), [q, p, e])))


def test_starts_as_the_authors_code_does():
    torch.manual_seed(0)
    for adapter in found(adapted("bert")):
        assert not adapter.e.any()
        assert adapter.kept.all()
        for factor in (adapter.a, adapter.b):
            assert factor.std().item() == pytest.approx(0.02, rel=0.3)
        assert not any(buffer.any() for name, buffer in adapter.named_buffers() if name != "kept")


def test_a_model_without_values_is_counted_and_shown():
    with torch.device("meta"):
        model = lp.inject(MODELS["llama"].make(), ada())
    summary = lp.summary(model)
    assert summary.trainable == 3 * 4 * (2 * (32 + 32 + 1) + 2 * (32 + 16 + 1) + 3 * (32 + 48 + 1))
    assert summary.saved_bytes == 4 * summary.trainable
    assert "rank=4 of 4" in repr(model)


# The budget


def test_the_budget_in_figures():
    method = ada(initial_rank=6, target_rank=4, warmup_steps=2, final_steps=6)
    steps = {0: 18, 1: 18, 2: 18, 3: 16, 5: 14, 8: 12, 11: 12, 13: 12, 14: 12, 17: 12, 20: 12}  # 12 + 6 (1-(t-2)/12)^3
    assert {step: method.budget(step, 20, 3) for step in steps} == steps
    assert ada(warmup_steps=0, final_steps=0).budget(1, 1, 7) == 14
    defaults = ada(initial_rank=6, target_rank=4)  # a tenth, three tenths
    assert [defaults.budget(step, 100, 3) for step in (10, 11, 40, 70, 71)] == [18, 17, 12, 12, 12]


@pytest.mark.parametrize(
    ("initial", "target", "layers", "total", "warmup", "final"),
    [(12, 8, 36, 1000, 100, 300), (6, 4, 36, 60, 0, 0), (3, 1, 7, 33, 5, 11), (4, 4, 9, 50, 3, 9), (5, 1, 1, 7, 3, 3)],
)
def test_the_budget_is_the_papers_with_the_numerator_of_its_code(initial, target, layers, total, warmup, final):
    method = ada(initial_rank=initial, target_rank=target, warmup_steps=warmup, final_steps=final)
    before = layers * initial
    for t in range(total + 1):
        b0, b1 = layers * initial, layers * target
        if t < warmup:
            expected = b0
        elif t > total - final:
            expected = b1
        else:
            expected = int(b1 + (b0 - b1) * (1 - (t - warmup) / (total - warmup - final)) ** 3)
        budget = method.budget(t, total, layers)
        assert budget == expected
        assert b1 <= budget <= before
        before = budget
    assert before == layers * target


# Scores


class Slow:
    """One adapter's averages in plain numbers: I = |w g|; J <- b1 J + (1-b1) I; U <- b2 U + (1-b2) |I - J|; s = J U."""

    def __init__(self, one):
        self.one = one
        self.averages = {n: ([0.0] * p.numel(), [0.0] * p.numel()) for n, p in one.named_parameters()}

    def observe(self, beta1, beta2):
        for name, parameter in self.one.named_parameters():
            means, spreads = self.averages[name]
            values, gradients = parameter.flatten().tolist(), parameter.grad.flatten().tolist()
            for i in range(len(values)):
                sensitivity = abs(values[i] * gradients[i])
                means[i] = beta1 * means[i] + (1 - beta1) * sensitivity
                spreads[i] = beta2 * spreads[i] + (1 - beta2) * abs(sensitivity - means[i])

    def scores(self):
        entry = {n: [m * u for m, u in zip(*averages, strict=True)] for n, averages in self.averages.items()}
        rank, ins, outs = len(self.one.e), self.one.a[0].numel(), len(self.one.b)
        for i in range(rank):
            of_p = sum(entry["b"][o * rank + i] for o in range(outs)) / outs
            of_q = sum(entry["a"][i * ins + j] for j in range(ins)) / ins
            yield entry["e"][i] + of_p + of_q


def test_averages_scores_and_choices_are_the_papers_entry_by_entry():
    beta1, beta2, generator = 0.7, 0.9, torch.Generator().manual_seed(0)
    hosts = [nn.Linear(3, 5).double(), nn.Linear(4, 2).double(), nn.Conv2d(2, 3, 2).double()]
    triplets = [SVDTriplets(host, rank, 1.0) for host, rank in zip(hosts, (2, 2, 3), strict=True)]
    slow = [Slow(one) for one in triplets]
    for budget in (7, 6, 5, 3, 4, 0, 2, 7):
        for parameter in (p for one in triplets for p in one.parameters()):
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        observe(triplets, beta1, beta2)
        for one in slow:
            one.observe(beta1, beta2)
            for name, (means, spreads) in one.averages.items():
                found_means, found_spreads = (
                    one.one.split_factors(row)["abe".index(name)] for row in (one.one.mean, one.one.spread)
                )
                assert found_means.flatten().tolist() == pytest.approx(means, abs=1e-13)
                assert found_spreads.flatten().tolist() == pytest.approx(spreads, abs=1e-13)
        scores = [score for one in slow for score in one.scores()]
        assert score(group_by_shape(triplets)).tolist() == pytest.approx(scores)
        best = sorted(range(7), key=lambda i, scores=scores: scores[i], reverse=True)[:budget]
        before = torch.cat([one.e.detach() for one in triplets]).tolist()
        with torch.no_grad():
            allocate(triplets, budget)
        assert torch.cat([one.kept for one in triplets]).tolist() == [i in best for i in range(7)]
        assert torch.cat([one.e for one in triplets]).tolist() == [before[i] if i in best else 0 for i in range(7)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_averages_alone(value):
    model = train(adapted(), ada(), 3)
    inside = found(model)
    before = [{n: b.clone() for n, b in one.named_buffers()} for one in inside]
    inside[5].a.grad[1, 2] = value
    observe(inside, 0.85, 0.85)
    assert all(torch.equal(b, old[n]) for one, old in zip(inside, before, strict=True) for n, b in one.named_buffers())
    inside[5].a.grad[1, 2] = 0
    inside[6].e.grad = None  # nor does a tensor without gradient stop the others
    observe(inside, 0.85, 0.85)
    for where, part, moves in ((6, 2, False), (5, 0, True)):
        old, new = (inside[where].split_factors(row)[part] for row in (before[where]["mean"], inside[where].mean))
        assert torch.allclose(0.85 * old, new, rtol=1e-5, atol=0) != moves  # without a gradient, an average fades


@pytest.mark.parametrize(("step", "moves"), [(1, True), (6, True), (7, False), (8, False), (10, False)])
def test_scores_stand_from_the_last_allocation_on(step, moves):
    model = train(adapted(), ada(), 3)  # leaves gradients
    inside = found(model)
    before = torch.cat([one.mean for one in inside]).clone()
    ada(warmup_steps=1, final_steps=3).after_step(inside, step, 10)
    assert torch.equal(torch.cat([one.mean for one in inside]).clone(), before) != moves


# peft


def pair(base, **settings):
    """The same model on both sides with the same values, as (ours, method, peft's)."""
    import peft

    method = ada(alpha=6, targets=PLAIN if base == "plain" else ["query", "value"], beta1=0.85, beta2=0.8, **settings)
    ours = fill(lp.inject(MODELS[base](), method))
    schedule = {"tinit": method.warmup_steps or 0, "tfinal": method.final_steps or 0, "deltaT": method.interval}
    targets = {"target_modules": list(method.targets), "lora_alpha": 6, "init_r": 4, "target_r": 2, "total_step": 40}
    betas = {"beta1": 0.85, "beta2": 0.8, "orth_reg_weight": method.orthogonal_weight}
    theirs = peft.get_peft_model(MODELS[base](), peft.AdaLoraConfig(**targets, **schedule, **betas)).eval()
    with torch.no_grad():
        for name, _, _, one in lp.adapters(ours):
            layer = theirs.base_model.model.get_submodule(name)
            layer.lora_A["default"].copy_(one.a)
            layer.lora_B["default"].copy_(one.b)
            layer.lora_E["default"].copy_(one.e[:, None])
    return ours, method, theirs


@needs_peft
@pytest.mark.parametrize("base", ["plain", "bert"])
def test_outputs_equal_pefts(base):
    ours, _, theirs = pair(base)
    with torch.no_grad():
        difference = (logits(ours(tokens())) - logits(theirs(tokens()))).abs().max().item()
    print(f"{base}: max difference {difference:.1e}")
    assert difference <= 2e-6


@needs_peft
def test_the_penalty_and_its_gradient_equal_pefts():
    ours, method, theirs = pair("bert", orthogonal_weight=0.5)
    penalty = method.penalty(found(ours))
    labels = torch.tensor([0, 2])
    with_it = theirs.base_model(tokens(), labels=labels).loss  # a PeftModel without a task type passes this forward by
    expected = with_it - F.cross_entropy(theirs(tokens()).logits, labels)
    print(f"penalty {penalty.item():.6f}, difference {(penalty - expected).abs().item():.1e}")
    torch.testing.assert_close(penalty, expected, atol=2e-6, rtol=0)
    expected.backward()
    penalty.backward()
    for name, _, _, one in lp.adapters(ours):
        layer = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(one.a.grad, layer.lora_A["default"].grad, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(one.b.grad, layer.lora_B["default"].grad, atol=2e-6, rtol=1e-5)


@needs_peft
@pytest.mark.parametrize("interval", [1, 3])
def test_in_lockstep_with_peft(interval):
    """40 steps: 4 of warm-up, then 28 of allocation; from step 32 on both keep the choice and train what is left.

    In the final steps peft masks by its stored pattern and does not resize (that is commented out in its source), and
    the averages that it resets then are read no more: the two agree to the end. Budgets of all triplets never occur
    here: at those peft asks kthvalue for the 0th smallest score and fails.
    """
    ours, method, theirs = pair("plain", warmup_steps=4, final_steps=8, interval=interval, orthogonal_weight=0.0)
    config, inside = theirs.peft_config["default"], adapters_of(ours, method)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (ours, theirs)]
    largest, totals, x = 0.0, [], torch.randint(3, 64, (40, 4, 7), generator=torch.Generator().manual_seed(2))
    for step in range(1, 41):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            out = model(x[step - 1]).flatten(0, -2)
            F.cross_entropy(out, x[step - 1].flatten() % 3).backward()
            optimizer.step()
        config.rank_pattern = None if step < 32 else config.rank_pattern
        method.after_step(list(inside.values()), step, 40)
        theirs.base_model.update_and_allocate(step)
        if pattern := config.rank_pattern:
            kept = {name.removeprefix("model.").split(".lora_E")[0]: flags for name, flags in pattern.items()}
            assert {name: one.kept.bool().tolist() for name, one in inside.items()} == kept
            totals.append(sum(sum(flags) for flags in kept.values()))
        for name, one in inside.items():
            their_e = theirs.base_model.model.get_submodule(name).lora_E["default"][:, 0]
            largest = max(largest, (one.e - their_e).abs().max().item())
        assert largest <= 1e-5
    print(f"interval {interval}: max difference of E {largest:.1e}, totals {totals}")
    assert totals[0] < 48
    assert totals[-1] == 24
    assert sorted(totals, reverse=True) == totals
    assert len(totals) == (27 if interval == 1 else 9) + 9
    changed = [one.kept.sum().item() for one in inside.values()]
    assert len(set(changed)) > 1  # it did move ranks between layers


# In a Trainer


class Watch(pl.Callback):
    """Sees E and what is kept after each optimizer step, and the gradients before."""

    def __init__(self):
        self.e, self.kept, self.totals, self.gradients = {}, {}, {}, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.named_parameters()
        self.gradients[trainer.global_step + 1] = {n: p.grad.clone() for n, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        inside, step = found(pl_module), trainer.global_step
        self.e[step] = torch.cat([one.e.detach().clone() for one in inside])
        self.kept[step] = torch.cat([one.kept.clone() for one in inside])
        self.totals[step] = trainer.callback_metrics["adalora/total_rank"].item() if step else None


def test_a_run_ends_at_the_target_and_what_was_dropped_stays_zero():
    watch, net = Watch(), module()
    method = ada(warmup_steps=2, final_steps=4, interval=2)
    tuner = trainer(lp.PEFTStrategy(method), watch, epochs=3)  # 12 steps
    tuner.fit(net, data(shuffle=True))
    assert tuner.global_step == 12
    totals = {step: int(kept.sum()) for step, kept in watch.kept.items() if step}
    expected = {1: 84, 2: 84, 3: 84, 4: 54, 5: 54, 6: 43, **dict.fromkeys(range(8, 13), 42)} | {7: 43}
    assert totals == expected  # 42 + 42 (1 - (t - 2) / 6)^3 at even steps
    for step in range(8, 13):
        assert torch.equal(watch.kept[step], watch.kept[8])
        assert not watch.e[step][watch.kept[8] == 0].any()
        assert watch.e[step][watch.kept[8] == 1].all()
    assert watch.e[5][watch.kept[5] == 0].any()  # before that, a dropped triplet may come back
    assert sum(one.kept.sum() for one in found(net)) == 2 * len(found(net))
    assert tuner.callback_metrics["adalora/total_rank"] == 42
    ranks = [v.item() for key, v in tuner.callback_metrics.items() if key.startswith("adalora/rank/net.model.layers.")]
    assert len(ranks) == 21
    assert sum(ranks) == 42


def test_nothing_is_dropped_where_both_ranks_are_the_same():
    net = module()
    trainer(lp.PEFTStrategy(ada(initial_rank=3, target_rank=3, interval=1)), epochs=2).fit(net, data())
    assert all(one.kept.all() and one.e.all() for one in found(net))


def test_the_logged_loss_is_the_tasks_and_gradients_hold_the_penalty():
    net, method = module(), ada(orthogonal_weight=3.0, alpha=6)
    one_step = {"limit_train_batches": 1, "accumulate_grad_batches": 1}
    tuner = trainer(lp.PEFTStrategy(method), **one_step)
    tuner.fit(net, data(), data())

    def task_loss(batch):
        out = logits(net.net(batch)).flatten(0, -2)
        return F.cross_entropy(out, batch.flatten() % 3)

    with torch.no_grad():
        by_hand = torch.stack([task_loss(batch) for batch in data()]).mean()
    torch.testing.assert_close(tuner.callback_metrics["val_loss"], by_hand)
    assert method.penalty(found(net)) > 3

    values = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    watch = Watch()
    trainer(lp.PEFTStrategy(method), watch, **one_step).fit(net, data())  # one more step, from these values
    net.load_state_dict(values, strict=False)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    batch = next(iter(data()))
    norms = []
    for one in found(net):
        q, p = one.a, one.b
        norms += [(p.T @ p - torch.eye(4)).square().sum().sqrt(), (q @ q.T - torch.eye(4)).square().sum().sqrt()]
    objective = task_loss(batch) + 3.0 * sum(norms) / len(norms)
    expected = torch.autograd.grad(objective, list(named.values()))
    for (name, _), gradient in zip(named.items(), expected, strict=True):
        torch.testing.assert_close(watch.gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


class Stop(Exception):
    pass


class StopAfter(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Stop


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 5, 6, 7))])
def test_a_run_that_is_resumed_in_the_middle_of_an_epoch_ends_bit_identical(step, tmp_path):
    """Of 8 steps in two epochs; the choice stands from step 6 on."""

    def run(*callbacks, path=None):
        pl.seed_everything(7, verbose=False)
        net = module()
        method = ada(dropout=0.2, warmup_steps=1, final_steps=2, interval=1)
        loader = Resumable(data().dataset, 2, shuffle=True, generator=torch.Generator().manual_seed(3))
        trainer(lp.PEFTStrategy(method), *callbacks, epochs=2).fit(net, loader, ckpt_path=path)
        return net

    whole = run()
    with pytest.raises(Stop):
        run(StopAfter(step), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True))
    pl.seed_everything(99, verbose=False)
    resumed = run(path=tmp_path / "last.ckpt")
    with lp.full_state_dict(whole), lp.full_state_dict(resumed):
        expected, state = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == state.keys()
    assert sum(key.endswith(".kept") for key in expected) == 21
    assert not [key for key in expected if not torch.equal(expected[key], state[key])]


@pytest.mark.parametrize(
    ("settings", "limits", "said"),
    [
        ({}, {"epochs": -1, "max_steps": -1}, "give the Trainer max_epochs or max_steps"),
        ({"warmup_steps": 3, "final_steps": 1}, {}, r"warmup_steps \+ final_steps must be below 4 steps, got 4"),
        ({"warmup_steps": 0, "final_steps": 9}, {}, "must be below 4 steps, got 9"),
        ({"warmup_steps": 2}, {"epochs": None, "max_steps": 2}, "must be below 2 steps, got 2"),
    ],
)
def test_a_run_that_cannot_reach_its_target_is_refused_before_the_first_step(settings, limits, said):
    net = module()
    tuner = trainer(lp.PEFTStrategy(ada(**settings)), **limits)
    with pytest.raises(ValueError, match=said):
        tuner.fit(net, data())
    assert tuner.global_step == 0
    assert not any(one.e.any() for one in found(net))


class Manual(Module):
    """Steps twice in each batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()


def test_several_steps_in_a_batch_do_not_pass_over_the_last_allocation():
    net, settings = Manual(), {"epochs": None, "max_steps": 16, "accumulate_grad_batches": 1}
    trainer(lp.PEFTStrategy(ada(final_steps=5, interval=4)), **settings).fit(net, data())
    assert sum(one.kept.sum() for one in found(net)) == 2 * 21  # allocated at step 11, which ends no batch


# Files


@pytest.fixture
def trained():
    return train(adapted(interval=1), ada(interval=1), 10)


def test_a_file_holds_the_kept_triplets_alone_and_brings_the_outputs_back(trained, tmp_path):
    folder = lp.save_adapter(trained, tmp_path)
    state = load_file(folder / "adapter_model.safetensors")
    numbers = 0
    for name, _, _, one in lp.adapters(trained):
        rank, (out, ins) = int(one.kept.sum()), one.shape
        shapes = {key: tuple(state[f"{name}.peft.adalora.{key}"].shape) for key in ("a", "b", "e")}
        assert shapes == {"a": (rank, ins), "b": (out, rank), "e": (rank,)}
        numbers += rank * (ins + out + 1)
    assert len(state) == 3 * 21
    assert sum(value.numel() for value in state.values()) == numbers
    header = int.from_bytes((folder / "adapter_model.safetensors").read_bytes()[:8], "little")
    assert (folder / "adapter_model.safetensors").stat().st_size == 8 + header + 4 * numbers
    assert lp.summary(trained).saved_bytes == 4 * numbers

    fresh = lp.load_adapter(MODELS["llama"](), folder)
    torch.testing.assert_close(logits(fresh(tokens())), logits(trained(tokens())), atol=1e-6, rtol=1e-5)
    assert sum(one.kept.sum() for one in found(fresh)) == 2 * 21
    again = lp.save_adapter(fresh, tmp_path / "again")
    assert (again / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()

    before = logits(fresh(tokens()))
    train(fresh, ada(interval=1), 10)
    assert (logits(fresh(tokens())) - before).abs().max() > 1e-3
    assert sum(one.kept.sum() for one in found(fresh)) == 2 * 21


def test_a_file_replaces_all_that_a_trained_model_had(trained, tmp_path):
    folder = lp.save_adapter(trained, tmp_path)
    other = adapted(interval=1)
    torch.manual_seed(8)
    for one in found(other):
        for tensor in (*one.parameters(), *one.buffers()):
            nn.init.normal_(tensor)
    lp.load_adapter(other, folder)
    torch.testing.assert_close(logits(other(tokens())), logits(trained(tokens())), atol=1e-6, rtol=1e-5)
    for one, source in zip(found(other), found(trained), strict=True):
        assert one.kept.sum() == source.kept.sum()
        assert not one.e[one.kept == 0].any()
        assert not any(buffer.any() for name, buffer in one.named_buffers() if name != "kept")


KEY = "model.layers.1.self_attn.v_proj.peft.adalora"
DAMAGE = {
    "lacks a factor": (lambda s: s.pop(f"{KEY}.b"), rf"it lacks {KEY}.b \(1 in all\)"),
    "a factor of width one": (
        lambda s: s.update({f"{KEY}.a": s[f"{KEY}.a"][:, :1].contiguous()}),
        rf"has another shape of {KEY}.a",
    ),
    "unequal counts": (
        lambda s: s.update({f"{KEY}.b": torch.ones(16, 3), f"{KEY}.e": torch.ones(2)}),
        rf"has another shape of .*{KEY}.b \(16, 3\)",
    ),
    "too many": (
        lambda s: s.update({f"{KEY}.{k}": torch.ones(v) for k, v in (("a", (5, 32)), ("b", (16, 5)), ("e", (5,)))}),
        rf"another shape of {KEY}.a \(5, 32\) instead of \(4, 32\)",
    ),
    "a number for E": (lambda s: s.update({f"{KEY}.e": torch.tensor(1.0)}), rf"another shape of .*{KEY}.e \(\)"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_file_that_does_not_fit_is_refused_by_name(case, trained, tmp_path):
    import hashlib
    import json

    change, said = DAMAGE[case]
    folder = lp.save_adapter(trained, tmp_path)
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    state = load_file(path)
    change(state)
    save_file(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    config.write_text(json.dumps({**json.loads(config.read_text()), "sha256": digest}))
    model = MODELS["llama"]()
    with pytest.raises(ValueError, match=said):
        lp.load_adapter(model, folder)
    assert not list(lp.adapters(model))


def test_merging_equals_the_live_model(trained):
    y = logits(trained(tokens()))
    lp.merge(trained)
    torch.testing.assert_close(logits(trained(tokens())), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("all_layers", [False, True])
def test_a_layer_may_lose_all_its_triplets(all_layers, trained, tmp_path):
    base = MODELS["llama"]()
    gone = {name: one for name, _, _, one in lp.adapters(trained) if all_layers or name.endswith("2.mlp.up_proj")}
    with torch.no_grad():
        for one in gone.values():
            one.kept.zero_()
            one.e.zero_()
            assert not one.delta().any()
    y = logits(trained(tokens()))
    assert torch.equal(y, logits(base(tokens()))) == all_layers
    state = load_file(lp.save_adapter(trained, tmp_path) / "adapter_model.safetensors")
    for name, one in gone.items():
        assert state[f"{name}.peft.adalora.a"].shape == (0, one.shape[1])
        assert state[f"{name}.peft.adalora.b"].shape == (one.shape[0], 0)
    fresh = lp.load_adapter(base, tmp_path)
    torch.testing.assert_close(logits(fresh(tokens())), y, atol=1e-6, rtol=1e-5)
    train(fresh, ada(interval=1), 5)
    assert sum(one.kept.sum() for one in found(fresh)) == 2 * 21
    lp.merge(trained)
    torch.testing.assert_close(logits(trained(tokens())), y, atol=1e-5, rtol=1e-5)
