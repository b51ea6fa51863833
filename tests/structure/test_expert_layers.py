"""Experts in 3-D parameters are known by what their module does in a call, whatever it is called and wherever it is."""

import copy
import warnings

import pytest
import torch
from expert_models import EXPERTS, expert_model
from models import BEFORE_5
from torch import nn

import lightning_peft as lp
from lightning_peft.structure.expert_layers import DOWN, UP, expert_modules, expert_weights
from lightning_peft.structure.expert_selection import select_with_experts
from lightning_peft.structure.roles import ROLES
from lightning_peft.structure.selection import select

new_transformers = pytest.mark.skipif(BEFORE_5, reason="experts are modules before transformers 5")


class Mixture(nn.Module):
    """Experts with meaningless names, square weights and products of both orders: a call alone tells them apart."""

    def __init__(self, width=6, count=3):
        super().__init__()
        self.q7 = nn.Parameter(torch.randn(count, width, width))  # (in, out), called last
        self.b1 = nn.Parameter(torch.randn(count, width, width))  # (out, in), called first
        self.z = nn.Parameter(torch.randn(count, width))

    def forward(self, x, where, share):
        y = torch.zeros_like(x)
        for expert in range(len(self.z)):
            rows, slot = (where == expert).nonzero(as_tuple=True)
            hidden = nn.functional.linear(x[rows], self.b1[expert]).relu() + self.z[expert]
            y = y.index_add(0, rows, (hidden @ self.q7[expert]) * share[rows, slot, None])
        return y


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = nn.Linear(6, 3)
        self.e = Mixture()

    def forward(self, x):
        share, where = self.k(x).softmax(-1).topk(2)
        return x + self.e(x, where, share)


@new_transformers
@pytest.mark.parametrize("name", EXPERTS)
def test_each_weight_has_its_role_and_its_sides(name):
    model = expert_model(name)
    found = {module: expert_weights(model.get_submodule(module)) for module in expert_modules(model)}
    assert len(found) == 2
    for module, weights in found.items():
        host = model.get_submodule(module)
        seen = {part: (w.role, w.transposed, tuple(w.shape(host)), w.experts(host)) for part, w in weights.items()}
        assert seen == {
            "gate_up_proj": (UP, EXPERTS[name], (48, 32), 4),
            "down_proj": (DOWN, EXPERTS[name], (32, 24), 4),
        }


@new_transformers
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_weights_without_values_show_the_same(name):
    model = expert_model(name)
    empty = copy.deepcopy(model).to("meta")
    assert expert_modules(empty) == expert_modules(model)
    module = expert_modules(model)[0]
    assert expert_weights(empty.get_submodule(module)) == expert_weights(model.get_submodule(module))


def test_neither_names_nor_shapes_are_needed():
    weights = expert_weights(Mixture())
    assert {part: (w.role, w.transposed) for part, w in weights.items()} == {"b1": (UP, False), "q7": (DOWN, True)}


def test_measuring_draws_no_random_number_and_leaves_the_module_as_it_is():
    module = Mixture(width=5)
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    assert len(expert_weights(module)) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("module", [nn.Conv1d(4, 4, 3), nn.Bilinear(3, 4, 5), nn.Linear(3, 3)])
def test_other_modules_hold_no_experts(module):
    assert expert_weights(module) == {}


class Gates(nn.Module):
    """Two block-diagonal gates of one input, as in RecurrentGemma: no product feeds the other."""

    def __init__(self):
        super().__init__()
        self.input_gate, self.recurrent_gate = (nn.Parameter(torch.randn(3, 4, 4)) for _ in range(2))

    def forward(self, x):
        x = x.view(3, -1, 4)
        return (torch.bmm(x, self.input_gate) * torch.bmm(x, self.recurrent_gate)).reshape(-1, 4)


def test_parallel_products_are_no_experts():
    assert expert_weights(Gates()) == {}


def test_roles_globs_and_exclusions_mean_weights():
    model = nn.ModuleList([Block(), Block()])
    selected = select_with_experts(model, ["experts.up", "1.e.q7"])
    assert [target.weight_name for target in selected.experts] == ["0.e.b1", "1.e.q7", "1.e.b1"]
    selected = select_with_experts(model, ["all-linear"], exclude=["e.q7"])
    assert [target.weight_name for target in selected.experts] == ["0.e.b1", "1.e.b1"]
    assert [target.name for target in selected.layers] == ["0.k", "1.k"]
    assert ROLES["experts.down"](model) == ["0.e", "1.e"]


def test_a_glob_of_one_word_means_modules():
    model = nn.ModuleList([Block(), Block()])
    model[0].q7 = nn.Linear(3, 3)
    selected = select_with_experts(model, ["q7"])
    assert ([target.name for target in selected.layers], selected.experts) == (["0.q7"], [])
    with pytest.raises(ValueError, match="'b1' matches nothing"):
        select_with_experts(model, ["b1"])


def test_methods_without_experts_leave_them_out_and_say_so():
    model = nn.ModuleList([Block(), Block()])
    with pytest.warns(UserWarning, match=r"leaves out the weights of experts in \*\.e: LoRA"):
        assert [target.name for target in select(model, ["all-linear"])] == ["0.k", "1.k"]


@pytest.mark.parametrize("targets", [["experts.up"], ["e"], ["e.b1"]])
@pytest.mark.parametrize(
    "method",
    [
        lp.FedPara,
        lp.KronA,
        lp.AdaLoRA,
        lambda **kwargs: lp.IA3(feedforward_targets=[], **kwargs),
        lambda **kwargs: lp.LoRA(decompose=True, **kwargs),
    ],
)
def test_methods_without_experts_refuse_them_by_name(method, targets):
    model = nn.ModuleList([Block(), Block()])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="3-D parameters that LoRA without decompose adapts"):
        lp.inject(model, method(targets=targets))
    assert list(model.state_dict()) == list(before)
    assert all(type(module) in (Block, Mixture, nn.Linear) for block in model for module in block.modules())


class Unmeasurable(Mixture):
    def forward(self, x, where, share, extra):
        return super().forward(x, where, share) + extra


def test_what_cannot_be_measured_is_left_out_and_said():
    model = nn.ModuleList([Block(), Block()])
    model[1].e = Unmeasurable()
    with pytest.warns(UserWarning, match=r"3-D parameters whose use could not be measured, in \*\.e"):
        selected = select_with_experts(model, ["all-linear"])
    assert [target.weight_name for target in selected.experts] == ["0.e.q7", "0.e.b1"]


def test_a_model_without_experts_hears_nothing_of_them():
    model = nn.ModuleList([nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(select(model, ["all-linear"])) == 2
    with pytest.raises(ValueError, match="'experts.up' matches nothing"):
        select(model, ["experts.up"])
