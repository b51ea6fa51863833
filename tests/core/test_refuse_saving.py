"""``save_pretrained`` of an adapted model says what to call instead."""

import copy
import io

import lightning.pytorch as pl
import pytest
import torch
from models import MODELS
from torch import nn

import lightning_peft as lp

transformers = pytest.importorskip("transformers")
REFUSED = r"This model has adapters.*save_adapter\(model, folder\).*call lightning_peft.merge"


class Task(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = MODELS["llama"]()


def stored(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [lambda net: net, copy.deepcopy, stored], ids=["itself", "deepcopy", "pickle"])
def test_an_adapted_model_is_not_saved_among_its_weights(copied, tmp_path):
    module = copied(lp.inject(Task(), lp.LoRA(rank=2)))
    with pytest.raises(ValueError, match=REFUSED):
        module.net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSED):
        module.net.push_to_hub("me/nothing")
    assert list(tmp_path.iterdir()) == []
    for *_, adapter in lp.adapters(module):
        nn.init.normal_(adapter.b, std=0.1)
    expected = lp.merge(module).state_dict()
    module.net.save_pretrained(tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, found[name.removeprefix("net.")]) for name, value in expected.items())
    assert not torch.equal(found["model.layers.0.self_attn.q_proj.weight"], query(MODELS["llama"]()))


def query(net):
    return net.model.layers[0].self_attn.q_proj.weight


def test_it_is_saved_again_once_the_last_adapter_is_gone(tmp_path):
    net = lp.add_adapter(MODELS["llama"](), lp.LoRA(rank=2), "one")
    lp.add_adapter(net, lp.IA3(), "two")
    lp.remove_adapter(net, "one")
    with pytest.raises(ValueError, match=REFUSED):
        net.save_pretrained(tmp_path)
    lp.remove_adapter(net, "two")
    assert "save_pretrained" not in vars(net)
    assert vars(net).keys() == vars(MODELS["llama"]()).keys()


def test_a_model_that_trains_without_adapters_is_saved_as_it_is(tmp_path):
    net = lp.inject(MODELS["bert"](), lp.BitFit())
    nn.init.ones_(net.classifier.bias)
    net.save_pretrained(tmp_path)
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in net.state_dict().items())
