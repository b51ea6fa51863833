"""Adapted models whose adapters go to HF PEFT."""

import torch
from models import MODELS, Model

import lightning_peft as lp


def tagger():
    from transformers import BertForTokenClassification

    return BertForTokenClassification(MODELS["bert"]().config)


BASES = {**MODELS, "tagger": Model(tagger, positions="absolute")}


def disturbed(model):
    """Give everything that trains, and nothing else, other values."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def adapted(name, method, also_train=()):
    torch.manual_seed(0)
    return disturbed(lp.inject(BASES[name](), method, also_train))
