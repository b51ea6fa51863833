"""``check_decoder``, ``check_causal``, ``check_positions``: what a model must be like to train on some rows of text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_peft.core.adapted_module import adapters
from lightning_peft.core.eval_mode import evaluating
from lightning_peft.methods.prompting.position_shift import ShiftedPositions
from lightning_peft.methods.prompting.prompt import Prompt
from lightning_peft.structure.transformers_api import from_config, input_embeddings
from lightning_peft.tasks.data.table_data import TableDataModule
from lightning_peft.tasks.pretrained import is_encoder, read_config

_LENGTH = 8  # tokens of the text by which it is measured what a model sees
_TOLERANCE = 1e-4  # of the change of what follows the changed token; decoders have 0, a small new BERT 1e-3


def check_decoder(model: str | None, config: dict[str, Any] | str | None) -> None:
    """Raise where a model's configuration says that it is no decoder.

    Args:
        model: A reference as `lightning_peft.tasks.pretrained.locate` reads it.
        config: Settings of the architecture with its ``model_type``, or a file of them, in place of a model.

    Raises:
        ValueError: It has an encoder, or is one.
    """
    if (model is None) == (config is None):
        return  # build_model says what is wrong
    built = read_config(model, config)
    name = "config" if model is None else repr(model)
    if built.is_encoder_decoder:
        raise ValueError(
            f"{name} has an encoder and a decoder ({built.model_type}), and CausalLM trains decoders "
            "alone. Take Seq2Seq with Seq2SeqDataModule (source, target), or a decoder such as Llama."
        )
    if is_encoder(built):
        raise ValueError(
            f"{name} is an encoder ({built.model_type}), whose tokens see those after them: it would "
            "learn to copy, not to continue text. Take a decoder such as Llama, ask it with TextClassification or "
            "Cloze, or set is_decoder=true in config for one that reads from left to right."
        )


@torch.no_grad()
def check_causal(network: Any) -> None:
    """Raise where what a network predicts depends on later tokens, which is measured on a text of eight.

    Args:
        network: One without values is not measured.

    Raises:
        ValueError: It does.
    """
    if any(parameter.is_meta for parameter in network.parameters()):
        return
    last = int(from_config(network, "vocab_size") or 16) - 1
    ids = torch.arange(1, _LENGTH + 1, device=next(network.parameters()).device).clamp(max=last).repeat(2, 1)
    ids[1, -1] = last if last != int(ids[0, -1]) else 0
    with evaluating(network):
        try:
            logits = network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        except (RuntimeError, NotImplementedError, ImportError):
            return  # kernels that need another device than the one where a model is before training
    change = (logits[0] - logits[1]).abs()
    if change[:-1].max() > _TOLERANCE * change[-1].max():
        raise ValueError(
            f"{type(network).__name__} is no decoder as it is: what it predicts after a token depends on later tokens, "
            "so it would learn to copy, not to continue text. Take a decoder, or the setting of its configuration "
            "by which it reads from left to right, such as is_decoder=true."
        )


def virtual_tokens(network: nn.Module) -> int:
    """How many positions the adapters of a network take before a text."""
    found = [adapter for *_, adapter in adapters(network)]
    lengths = [adapter.length for adapter in found if isinstance(adapter, ShiftedPositions)]
    for adapter in found:
        if isinstance(adapter, Prompt) and getattr(adapter, "placeholder", None) is None:  # else they are in the text
            lengths.append(adapter.get_parameter("prompt").shape[-2])
    return max(lengths, default=0)


def positions(network: nn.Module) -> int | None:
    """How many positions a model has embeddings for, or, with virtual tokens, is built for; None if any number will do.

    Args:
        network: Model of transformers.
    """
    limit = from_config(network, "max_position_embeddings")
    if not isinstance(limit, int) or limit <= 0:
        return None
    tables = [m for m in network.modules() if isinstance(m, nn.Embedding) and m is not input_embeddings(network)]
    learned = any(limit <= table.num_embeddings <= limit + 2 for table in tables)  # some begin at the third row
    return limit if learned or virtual_tokens(network) else None


def check_positions(network: nn.Module, data: Iterable[Any]) -> None:
    """Raise where rows and the virtual tokens before them are longer than a model is built for.

    Args:
        network: Adapted model of transformers.
        data: What it is trained on; tables are looked at.

    Raises:
        ValueError: They are.
    """
    limit, before = positions(network), virtual_tokens(network)
    lengths = [task.longest() for task in data if limit is not None and isinstance(task, TableDataModule)]
    longest = max(lengths, default=0)
    if limit is not None and before + longest > limit:
        tokens = f"{longest} tokens" + (f", and {before} virtual tokens come before it" if before else "")
        raise ValueError(
            f"The longest row of the data has {tokens}, but {type(network).__name__} has {limit} positions. "
            f"Set max_length={limit - before} or lower, or take fewer virtual tokens."
        )
