"""Tiny decoders that differ in what makes logits of hidden states, and their loss by way of all logits."""

import torch
import transformers
from adapter_edits import stir

import lightning_peft as lp

VOCABULARY, WIDTH = 50, 16
_LIKE_LLAMA = {
    "num_hidden_layers": 1, "hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
_LIKE_GPT2 = {"n_layer": 1, "n_embd": WIDTH, "n_head": 2, "vocab_size": VOCABULARY, "initializer_range": 0.3}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DECODERS = {
    "llama": {"model_type": "llama", **_LIKE_LLAMA},
    "tied llama": {"model_type": "llama", "tie_word_embeddings": True, **_LIKE_LLAMA},
    "gpt2": {"model_type": "gpt2", "bos_token_id": 1, "eos_token_id": 2, **_LIKE_GPT2, **_NO_DROPOUT},
    "gemma2 with a softcap": {
        "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8, **_LIKE_LLAMA
    },
    "granite with a scale": {"model_type": "granite", "logits_scaling": 3.0, **_LIKE_LLAMA},
    "phi with a bias": {"model_type": "phi", "resid_pdrop": 0.0, "embd_pdrop": 0.0, **_LIKE_LLAMA},
}  # fmt: skip


def decoder(name, **settings):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**DECODERS[name] | settings)
    net = transformers.AutoModelForCausalLM.from_config(config).train()
    for parameter in net.parameters():
        if parameter.dim() == 1:  # norms and biases, which start at one and zero
            parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def batch(left=False):
    """Three rows of 8 tokens with 9 labels: prompts that do not count, padding, and a row without any."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 8))
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[0, 1:4] = labels[1] = -100  # the first token of row 0 keeps its label, which does not count
    padding = slice(0, 3) if left else slice(6, 8)
    ids[2, padding], mask[2, padding], labels[2, padding] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def full(net, given):
    """The loss as transformers computes it, of all logits."""
    logits, labels = net(**{k: v for k, v in given.items() if k != "labels"}).logits[:, :-1], given["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).to(logits.dtype), labels.flatten())


def gradients(loss, net):
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True), strict=True))


def difference(found, wanted):
    """The largest difference of gradients, of which some have to be large and the same ones absent."""
    assert {name for name, g in found.items() if g is None} == {name for name, g in wanted.items() if g is None}
    pairs = [(found[name], g) for name, g in wanted.items() if g is not None]
    assert max(g.abs().max() for _, g in pairs) > 1e-2
    return max((a - g).abs().max().item() for a, g in pairs)


def adapted(name="llama", targets=("*q_proj", "lm_head")):
    net = lp.inject(decoder(name), lp.LoRA(rank=2, targets=list(targets)))
    stir(net, 1)
    return net


def expected(net, given):
    loss = full(net, given)
    return loss.item(), gradients(loss, net)
