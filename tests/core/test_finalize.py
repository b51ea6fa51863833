"""Encoders that only training needs give way to what they compute, and never reach an adapter file."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from models import MODELS, logits, tokens
from torch import nn
from trainer_models import data, module, trainer

import lightning_peft as lp
from lightning_peft.core.adapter import parameter_like


class Shift(lp.Adapter):
    """Adds a vector to the host's output; in training, a linear encoder computes it."""

    def __init__(self, host, encoder):
        super().__init__()
        self.vector = parameter_like(host.weight, host.weight.shape[0])
        self.encoder = nn.Linear(len(self.vector), len(self.vector)) if encoder else None
        nn.init.normal_(self.vector)

    def reset_parameters(self):
        nn.init.normal_(self.vector)

    def export_state(self):
        return {"vector": self.vector if self.encoder is None else self.encoder(self.vector)}

    def finalize(self):
        self.vector, self.encoder = nn.Parameter(self.export_state()["vector"].detach()), None

    def forward(self, host, inner, x):
        return inner(x) + self.export_state()["vector"]


@dataclass(frozen=True, kw_only=True)
class Shifts(lp.Method):
    name: str = "shift"
    encoder: bool = True

    def adapters(self, model):
        for name, host in model.named_modules():
            if name.endswith(("q_proj", "v_proj")):
                yield name, Shift(host, self.encoder)

    def finalized(self):
        return dataclasses.replace(self, encoder=False)


@pytest.fixture
def model():
    torch.manual_seed(3)
    return lp.inject(MODELS["llama"](), [Shifts(), lp.LoRA(rank=2)])


@torch.no_grad()
def run(model):
    return logits(model(tokens()))


def test_a_final_model_computes_the_same_without_encoders(model):
    y, before = run(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lp.finalize(model) is model
    assert torch.equal(run(model), y)
    hosts = 3 * (32 * 32 + 32) + 3 * (16 * 16 + 16)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == before - hosts
    assert torch.equal(run(lp.finalize(model)), y)
    logits(model(tokens())).sum().backward()
    assert all(p.grad is not None for *_, a in lp.adapters(model) for p in a.parameters())


def test_an_adapter_file_holds_no_encoder_and_loads_without(model, tmp_path):
    y = run(model)
    lp.save_adapter(model, tmp_path / "training")
    fresh = lp.load_adapter(MODELS["llama"](), tmp_path / "training")
    assert torch.equal(run(fresh), y)
    assert not any("encoder" in name for name, _ in fresh.named_parameters())
    lp.save_adapter(lp.finalize(model), tmp_path / "final")
    one, two = ((tmp_path / f / "adapter_model.safetensors").read_bytes() for f in ("training", "final"))
    assert one == two


def test_a_final_file_goes_into_a_model_in_training_once_that_is_final(model, tmp_path):
    y = run(model)
    lp.save_adapter(model, tmp_path)
    other = lp.inject(MODELS["llama"](), [Shifts(), lp.LoRA(rank=2)])
    with pytest.raises(ValueError, match=r"other settings .* call lightning_peft.finalize\(model\) first"):
        lp.load_adapter(other, tmp_path)
    assert torch.equal(run(lp.load_adapter(lp.finalize(other), tmp_path)), y)


def test_an_encoder_that_is_not_equal_to_what_replaces_it_is_found(model):
    class Wrong(Shift):
        def finalize(self):
            super().finalize()
            self.vector = nn.Parameter(self.vector + 1)

    for *_, adapter in lp.adapters(model):
        adapter.__class__ = Wrong if isinstance(adapter, Shift) else type(adapter)
    with pytest.raises(RuntimeError, match="does not hold what its encoder computed"):
        lp.finalize(model)


def test_a_model_without_adapters_is_refused_and_one_without_encoders_is_left_alone():
    with pytest.raises(ValueError, match="Nothing was injected"):
        lp.finalize(MODELS["llama"]())
    model = lp.inject(MODELS["llama"](), lp.LoRA(rank=2))
    before = model.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in lp.finalize(model).state_dict().items())


def test_a_trainer_tests_a_final_module_with_the_same_callback(tmp_path):
    net, callback = module(), lp.PEFTStrategy(Shifts(), show_summary=False)
    trainer(callback).fit(net, data())
    expected = trainer(callback).test(net, data(), verbose=False)
    lp.save_adapter(net, tmp_path)
    assert trainer(callback).test(lp.finalize(net), data(), verbose=False) == expected
    assert trainer(callback).test(lp.load_adapter(module(), tmp_path), data(), verbose=False) == expected
