"""What an imported adapter trained beside its own tensors is its own: the base and other adapters stay as they are."""

import importlib.util

import pytest
import torch
from adapter_edits import stir
from models import MODELS, tokens
from torch import nn

import lightning_peft as lp

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed"),
    pytest.mark.filterwarnings("ignore"),  # peft's own advice, and what it calls
]
IDS = tokens(3)


@torch.no_grad()
def out(net, **inputs):
    return net.eval()(**(inputs or {"input_ids": IDS})).logits


def tied():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes))


def theirs(base, folder, **settings):
    """Return peft's model with all that trains changed, saved to a folder."""
    import peft

    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "query"], **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return out(model)


def test_an_imported_head_and_biases_leave_base_and_other_adapters_alone(tmp_path):
    net = MODELS["bert"]()
    base, stored = out(net), {key: value.clone() for key, value in net.state_dict().items()}
    lp.add_adapter(net, lp.LoRA(rank=2), "local")
    stir(net, 0)
    local = out(lp.activate(net, "local"))
    expected = theirs(MODELS["bert"](), tmp_path, task_type="SEQ_CLS", bias="all")
    lp.import_peft(net, tmp_path, "b")
    assert lp.active(net) == ("local", "b")
    assert torch.equal(out(lp.activate(net, "local")), local)
    assert not [name for name, p in net.named_parameters() if p.requires_grad and ".peft.local" not in name]
    torch.testing.assert_close(out(lp.activate(net, "b")), expected, atol=1e-5, rtol=1e-5)
    with lp.disabled(net):
        assert torch.equal(out(net), base)
    now = net.state_dict()
    assert all(torch.equal(now[key], value) for key, value in stored.items())
    folder = lp.save_adapter(net, tmp_path / "ours", name="b")
    again = lp.activate(lp.add_adapter(MODELS["bert"](), folder, "again"), "again")
    torch.testing.assert_close(out(again), expected, atol=1e-5, rtol=1e-5)
    lp.remove_adapter(net, "local")
    torch.testing.assert_close(out(lp.merge(net)), expected, atol=1e-5, rtol=1e-5)
    assert net.state_dict().keys() == stored.keys()


TIES = [
    (["embed_tokens"], False),
    (["lm_head"], False),
    (["embed_tokens", "lm_head"], False),
    (["embed_tokens"], True),
    (["lm_head"], True),
]


@pytest.mark.parametrize(("modules", "tie"), TIES)
def test_tied_weights_are_theirs_and_nothing_is_written_through_the_tie(modules, tie, tmp_path):
    expected = theirs(tied(), tmp_path, task_type="CAUSAL_LM", modules_to_save=list(modules), ensure_weight_tying=tie)
    net = tied()
    base, weight = out(net), net.lm_head.weight.clone()
    lp.import_peft(net, tmp_path)
    torch.testing.assert_close(out(net), expected, atol=1e-5, rtol=1e-5)
    assert (expected - base).abs().max() > 0.1
    head, table = net.lm_head._parameters["weight"], net.model.embed_tokens._parameters["weight"]
    assert head is table
    assert torch.equal(head, weight)
    assert (net.lm_head.weight is net.model.embed_tokens.weight) == tie
    with lp.disabled(net):
        assert torch.equal(out(net), base)
    copies = [p for n, p in net.named_parameters() if p.requires_grad and "_own.own." in n]
    assert len(copies) == (1 if tie else len(modules))
    lp.save_adapter(net, tmp_path / "ours")
    again = lp.load_adapter(tied(), tmp_path / "ours")
    torch.testing.assert_close(out(again), expected, atol=1e-5, rtol=1e-5)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tie
    if tie:
        with pytest.raises(ValueError, match="another module shares weight"):
            lp.export_peft(net, tmp_path / "back")
    else:
        lp.export_peft(net, tmp_path / "back")
        torch.testing.assert_close(out(lp.import_peft(tied(), tmp_path / "back")), expected, atol=1e-5, rtol=1e-5)


def test_a_head_that_is_read_and_not_called_is_the_adapters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Embedding(8, 4), nn.Linear(4, 4)

        def forward(self, ids):
            return self.layer(self.embed(ids)) @ self.embed.weight.T

    torch.manual_seed(0)
    net, ids = (
        lp.inject(Tied(), [lp.LoRA(targets=["layer"], rank=2), lp.OwnParameters(targets=["embed"])]),
        torch.arange(8),
    )
    stir(net, 2)
    plain = Tied()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if ".peft." not in k})
    plain.embed.weight.data.copy_(net.embed.peft["own"].own.weight)
    lora = net.layer.peft["lora"]
    plain.layer.weight.data.add_(lora.scale * lora.b @ lora.a)
    torch.testing.assert_close(net(ids), plain(ids))
