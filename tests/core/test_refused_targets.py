"""Targets and methods that cannot be meant: messages name the module, the pattern, and what lists the others."""

import pytest
from torch import nn

import lightning_peft as lp

LISTING = r"lightning_peft\.targets\(model\), or lightning-peft targets --config FILE, lists what can be targeted"


class Net(nn.Module):
    """Layers that cannot be adapted beside others that can."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4)
        self.up = nn.ConvTranspose2d(3, 3, 3)
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["lstm"], r"LSTM is no known linear layer .* It is the module 'lstm', which 'lstm' in targets selects\. "),
        (["fc", "u*"], r"ConvTranspose2d is no .* It is the module 'up', which 'u\*' in targets selects\. "),
        (
            ["down.*"],
            r"BatchNorm2d is no .* 'down\.1', which 'down\.\*' in targets selects; exclude=\['down\.1'\] leav",
        ),
    ],
)
def test_a_layer_of_no_known_type_is_named_with_its_pattern(targets, said):
    net = Net()
    with pytest.raises(TypeError, match=said) as refused:
        lp.inject(net, lp.LoRA(rank=1, targets=targets))
    assert refused.match(LISTING)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_advice_to_exclude_works():
    net = lp.inject(Net(), lp.LoRA(rank=1, targets=["down.*"], exclude=["down.1"]))
    assert [name for name, *_ in lp.adapters(net)] == ["down.0"]


def test_patterns_without_a_match_say_what_lists_targets():
    with pytest.raises(
        ValueError, match=rf"'dwon' matches nothing in the model\. Close names: down, down\.\*\..*{LISTING}"
    ):
        lp.inject(Net(), lp.LoRA(rank=1, targets=["dwon"]))
    with pytest.raises(ValueError, match=rf"leaves nothing of targets=\['fc'\]\. {LISTING}"):
        lp.inject(Net(), lp.LoRA(rank=1, targets=["fc"], exclude=["fc"]))
    assert "fc" in str(lp.targets(Net()))


@pytest.mark.parametrize("given", [lp.LoRA, [lp.LoRA], [lp.IA3(), lp.LoRA]])
def test_a_class_in_place_of_a_method_is_said(given):
    for call in (lp.PEFTStrategy, lambda m: lp.inject(Net(), m), lambda m: lp.add_adapter(Net(), m)):
        with pytest.raises(TypeError, match=r"^LoRA is a class; write LoRA\(\)\.$"):
            call(given)
