"""A module that the user replaces after injection takes its adapters along, which is noticed."""

import pytest
import torch
from models import MODELS, tokens
from torch.utils.data import DataLoader
from trainer_models import Module, trainer

import lightning_peft as lp

LOST = "'lora' had an adapter on .*lm_head, which is no longer in the model: the module was replaced after injection"


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("method", [lp.LoRA(rank=2, targets=["lm_head", "q_proj"]), "own"])
def test_a_resized_vocabulary_is_noticed(method, tmp_path):
    net = MODELS["llama"]()
    if method == "own":
        lp.add_adapter(net, lp.LoRA(rank=2), "lora", also_train=["lm_head"])
    else:
        lp.inject(net, method)
    net.resize_token_embeddings(80)
    lost = LOST if method != "own" else LOST.replace("'lora'", "'lora_own'")
    with pytest.raises(RuntimeError, match=lost):
        lp.save_adapter(net, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(RuntimeError, match=lost):
        lp.activate(net, "lora")
    if method != "own":
        with pytest.raises(RuntimeError, match=lost):
            lp.merge(net)


def test_training_does_not_start_without_an_adapter_that_was_injected(tmp_path):
    module = Module()
    lp.inject(module.net, lp.LoRA(rank=2, targets=["lm_head", "q_proj"]))
    module.net.lm_head = torch.nn.Linear(16, 64, bias=False)
    with pytest.raises(RuntimeError, match=LOST):
        trainer(lp.PEFTStrategy(), max_steps=1).fit(module, DataLoader(tokens(4), batch_size=2))


def test_a_model_that_is_resized_first_is_whole(tmp_path):
    net = MODELS["llama"]()
    net.resize_token_embeddings(80)
    lp.inject(net, lp.LoRA(rank=2, targets=["lm_head", "q_proj"]))
    assert lp.save_adapter(net, tmp_path).exists()
    lp.remove_adapter(lp.add_adapter(net, lp.LoRA(rank=1), "b"), "b")
    assert lp.active(lp.activate(net, "lora")) == ("lora",)
