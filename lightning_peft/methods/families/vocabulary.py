"""``add_tokens`` adds tokens to a tokenizer and rows for them to a model; ``resolve_tokens`` turns tokens into ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.method import check_setting
from ...structure.base_model import is_adapted
from ...structure.transformers_api import input_embeddings, outermost_pretrained


def resolve_tokens(tokens: Sequence[int | str], tokenizer: Any = "") -> list[int]:
    """Return the ids of tokens, ascending and each once.

    Args:
        tokens: Ids, or tokens as they stand in the vocabulary.
        tokenizer: The tokenizer, or its folder or name; ids need none.

    Raises:
        ValueError: There are no tokens, one is not in the vocabulary, or an id is not a whole number.
    """
    check_setting(not isinstance(tokens, str) and len(tokens) > 0, "tokens", tokens, "a list of ids or tokens")
    ids = set[int]()
    vocabulary: dict[str, int] = {}
    if any(isinstance(token, str) for token in tokens):
        vocabulary = _load(tokenizer, tokens).get_vocab()
    for token in tokens:
        if isinstance(token, str):
            check_setting(token in vocabulary, "tokens", token, "in the tokenizer's vocabulary; see lp.add_tokens")
            token = vocabulary[token]
        check_setting(type(token) is int and token >= 0, "tokens", token, "ids, from 0 on, or tokens as text")
        ids.add(token)
    return sorted(ids)


def _load(tokenizer: Any, tokens: Sequence[int | str]) -> Any:
    """Return a tokenizer that was given as such, or by its folder or name."""
    check_setting(tokenizer not in ("", None), "tokenizer", tokenizer, f"given, since tokens are text: {tokens}")
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)


def add_tokens(
    model: nn.Module, tokenizer: Any, tokens: Sequence[Any], pad_to_multiple_of: int | None = None
) -> list[int]:
    """Add tokens to a tokenizer, and rows for them to the embeddings of a model where it has too few; return their ids.

    New rows are the mean of the others, as transformers makes them but without its noise, so that each machine gets the
    same base. Ties stay. A token that the tokenizer has already keeps its id; called twice, or on a fresh model with
    the tokenizer of the first, this does the same. ``TrainableTokens(tokens=ids)`` then trains these rows alone.

    Args:
        model: Model of transformers, or a module that holds one, not adapted yet.
        tokenizer: Its tokenizer; save it beside the adapter.
        tokens: Tokens, as text or as ``AddedToken``.
        pad_to_multiple_of: Number of which the number of rows becomes a multiple, for fast kernels.

    Raises:
        RuntimeError: The model is adapted.
        TypeError: It is no model of transformers, or its embeddings are stored in few bits.

    Examples:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=2, **sizes))
        >>> ids = lp.add_tokens(model, tokenizer, ["<call>", "<result>"])
        >>> ids, model.get_input_embeddings().weight.shape
        ([2, 3], torch.Size([4, 8]))
        >>> _ = lp.inject(model, [lp.LoRA(), lp.TrainableTokens(tokens=ids)])
    """
    _network(model)  # raises where it cannot get rows, before the tokenizer changes
    tokenizer.add_tokens(list(tokens))
    ids: list[int] = tokenizer.convert_tokens_to_ids([str(token) for token in tokens])
    needed, multiple = max(len(tokenizer), max(ids, default=-1) + 1), pad_to_multiple_of or 1
    grow_vocabulary(model, -(-needed // multiple) * multiple)
    return ids


def grow_vocabulary(model: nn.Module, rows: int) -> None:
    """Give the embeddings of a model rows for more tokens where they have fewer; see ``add_tokens``.

    Args:
        model: Model of transformers, or a module that holds one, not adapted yet.
        rows: Number of rows to have.

    Raises:
        RuntimeError: The model is adapted.
        TypeError: It is no model of transformers, or its embeddings are stored in few bits.
    """
    network = _network(model)
    if rows > len(input_embeddings(network).weight):  # type: ignore[union-attr, arg-type]
        _resize(network, rows)


def _network(model: nn.Module) -> Any:
    """Return the one model of transformers in a module, if its embeddings can be resized."""
    if any(is_adapted(module) for module in model.modules()):
        raise RuntimeError(
            "The model is adapted, and resizing would replace layers that adapters are on: add tokens first, then "
            "inject; or call lightning_peft.merge or detach before."
        )
    networks = [network for _, network in outermost_pretrained(model) if input_embeddings(network) is not None]
    if len(networks) != 1 or not callable(getattr(networks[0], "resize_token_embeddings", None)):
        raise TypeError(
            f"{type(model).__name__} holds {len(networks)} models of transformers with input embeddings, expected one; "
            f"give that one, or make room for tokens where the model is built."
        )
    weight = input_embeddings(networks[0]).weight  # type: ignore[union-attr]
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError("The input embeddings are stored in few bits and get no rows; leave them out of quantization.")
    return networks[0]


@torch.no_grad()
def _resize(network: Any, rows: int) -> None:
    """Give a network more rows, each the mean of those that it had."""
    before = len(input_embeddings(network).weight)  # type: ignore[union-attr, arg-type]
    with torch.random.fork_rng(devices=[]):
        network.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (input_embeddings(network), network.get_output_embeddings()):
        for tensor in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
            if tensor is not None and len(tensor) == rows and not tensor.is_meta:
                tensor[before:] = (tensor[:before].sum(0, dtype=torch.float64) / before).to(tensor.dtype)
