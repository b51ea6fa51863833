"""What cannot be on one host together, and contexts where nothing is adapted: refused at once, or right."""

import pytest
import torch
from adapter_edits import stir
from torch import nn

import lightning_peft as lp


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))


COPY, LORA = lp.OwnParameters(targets=["1"]), lp.LoRA(targets=["0"], rank=1)


def test_a_parameter_does_not_train_in_the_base_below_a_copy_of_it():
    net = lp.inject(build(), COPY)
    with pytest.raises(ValueError, match="1.bias would train in the base, below an adapter's copy"):
        lp.inject(net, LORA, also_train=["1.bias"])
    other = lp.inject(build(), LORA, also_train=["1.bias"])
    with pytest.raises(ValueError, match="1.bias would train in the base, below an adapter's copy"):
        lp.inject(other, COPY)
    lp.add_adapter(other, COPY, "head")
    assert lp.active(other) == ("lora",)


@torch.no_grad()
def test_rows_have_copies_that_are_a_method_or_belong_to_a_group():
    net = build().eval()
    lp.add_adapter(net, COPY, "a")
    lp.add_adapter(net, LORA, "b", also_train=["1"])
    stir(net, 1)
    x = torch.randn(3, 4)
    alone = {name: lp.activate(net, name)(x) for name in "ab"}
    with lp.row_adapters(net, ["b", "a", "b"]):
        y = net(x)
    torch.testing.assert_close(y, torch.stack([alone["b"][0], alone["a"][1], alone["b"][2]]))


def test_copies_of_a_quantized_layer_are_those_of_its_bias_alone():
    net = lp.inject(lp.quantize(build(), "int8", ["0"]), lp.OwnParameters(targets=["0.bias"]))
    ((*_, adapter),) = lp.adapters(net)
    assert list(adapter.state_dict()) == ["own.bias"]
    x = torch.randn(2, 4)
    before = net(x).detach()
    lp.dequantize(net)
    torch.testing.assert_close(net(x), before)


def test_contexts_where_nothing_is_adapted_or_merged_forbid_the_same():
    net = lp.inject(build(), lp.BitFit(targets=["1"]))
    with lp.row_adapters(net, [None]), pytest.raises(RuntimeError, match="while they are inactive"):
        lp.inject(net, LORA)
    idle = lp.add_adapter(build(), LORA)
    lp.merge(idle, keep=True)
    with pytest.raises(RuntimeError, match="call unmerge"), lp.disabled(idle):
        pass
    assert lp.unmerge(idle) is idle


def test_one_of_several_adapters_is_saved_while_another_is_merged(tmp_path):
    net = lp.add_adapter(lp.inject(build(), LORA), COPY, "copy")
    stir(net, 1)
    lp.merge(net, keep=True)
    lp.save_adapter(net, tmp_path / "copy", "copy")
    lp.save_adapter(net, tmp_path / "lora", "lora")
    lp.unmerge(net)
    x = torch.randn(3, 4)
    for name in ("copy", "lora"):
        torch.testing.assert_close(lp.load_adapter(build(), tmp_path / name)(x), lp.activate(net, name)(x))
