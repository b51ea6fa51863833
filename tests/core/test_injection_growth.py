"""How the work of an injection grows: in proportion to the blocks of a model."""

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp


def calls(blocks, targets):
    """Calls of Python functions while a Llama without values is adapted."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, **sizes))
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        lp.inject(model, lp.LoRA(rank=2, targets=targets))
    finally:
        sys.setprofile(before)
    assert len(list(lp.adapters(model))) == blocks * (2 if len(targets) == 2 else 7)
    return count


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["all-linear"]])
def test_an_injection_into_twice_as_many_blocks_makes_twice_as_many_calls(targets):
    calls(2, targets)  # measures each class of layers once
    first, second, third = (calls(blocks, targets) for blocks in (8, 16, 32))
    assert third - second == 2 * (second - first)
