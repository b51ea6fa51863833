"""Models and comparisons that tests of methods on activations share."""

import math
import re

import torch
from models import MODELS, tokens

import lightning_peft as lp


def disturb(model, spread=0.5):
    torch.manual_seed(3)
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def plain(step):
    """Run the plain model with ``step(number, block, x)`` for each block, in float64."""
    base = MODELS["plain"]().double()
    x = base.embed(tokens())
    for number, block in enumerate(base.trunk.blocks):
        x = step(number, block, x)
    return base.head(x)


def compare(model, expected, copies):
    """Compare outputs, and gradients of adapters with those of ``copies``, by host, part and name."""
    y = model(tokens())
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), list(trained(model).values()))
    by_name = dict(zip(trained(model), found, strict=True))
    wanted = torch.autograd.grad(expected.square().sum(), list(copies.values()))
    for name, gradient in zip(copies, wanted, strict=True):
        torch.testing.assert_close(by_name[name], gradient)
    assert len(copies) == len(by_name)


def copied(model):
    return {name: p.detach().clone().requires_grad_() for name, p in trained(model).items()}


def inside_first_blocks(name):
    """Return what follows the number of block 0 in a dotted name, if it is in one."""
    number, rest = re.match(r"(?:.*?\.)?(?:layers?|h|blocks?)\.(\d+)\.(.*)", name).groups()
    return rest if number == "0" else None


def heads_of(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attention(block, h, scale_key=1.0, scale_value=1.0):
    """Attention of the plain model, in words of the paper."""
    own = block.attention
    q, k, v = own.q_proj(h), own.k_proj(h) * scale_key, own.v_proj(h) * scale_value
    q, k, v = (heads_of(x, own.num_heads) for x in (q, k, v))
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return own.out_proj((weights @ v).transpose(1, 2).flatten(2))
