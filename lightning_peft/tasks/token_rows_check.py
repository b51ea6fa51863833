"""``check_tokens`` and ``check_new_rows``: a model has a row for each token of its tokenizer, and new rows train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_peft.core.adapted_module import adapters
from lightning_peft.methods.families.token_rows import TokenLayer
from lightning_peft.structure.transformers_api import input_embeddings
from lightning_peft.tasks.messages import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def count_rows(network: nn.Module) -> int:
    """How many tokens a network has embeddings for; 0 if its embeddings are not known."""
    weight: Tensor | None = getattr(input_embeddings(network), "weight", None)
    return 0 if weight is None else weight.shape[0]


def count_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows the tokens of a tokenizer need."""
    last: int = max(tokenizer.get_vocab().values())
    return last + 1


def check_tokens(network: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise where a tokenizer has tokens that a network has no embeddings for.

    Args:
        network: Model of transformers.
        tokenizer: The tokenizer.

    Raises:
        ValueError: If there are such tokens; names them.
    """
    rows = count_rows(network)
    lacking = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= rows)
    if lacking:
        raise ValueError(
            f"The tokenizer has {len(lacking)} tokens that the model has no embeddings for: "
            f"{quoted(token for _, token in lacking)} (the model has {rows}). Set resize_embeddings=true of the model "
            f"and train these rows by the method TrainableTokens(tokens={[id for id, _ in lacking[:20]]}), or take the "
            "model's own tokenizer."
        )


def check_new_rows(network: nn.Module, tokens: Sequence[int]) -> None:
    """Raise where embeddings of new tokens stay what they were created as, since nothing trains them.

    Args:
        network: Adapted model of transformers.
        tokens: Ids of the new tokens.

    Raises:
        ValueError: If it does not.
    """
    tables = {"input embeddings": input_embeddings(network), "output layer": network.get_output_embeddings()}  # type: ignore[operator]
    for kind, layer in tables.items():
        if layer is not None and tokens and not _trains(network, layer, set(tokens)):
            head = kind == "output layer"
            method = f"TrainableTokens(tokens={list(tokens)}{', output_head=true' * head})"
            raise ValueError(
                f"resize_embeddings gave the {kind} {len(tokens)} new rows, which nothing trains: they would stay the "
                f"mean of the others. Add the method {method}, or train the whole layer by also_train."
            )


def _trains(network: nn.Module, layer: Any, tokens: set[int]) -> bool:
    found = [adapter for _, host, _, adapter in adapters(network) if host is layer]
    if any(parameter.requires_grad for parameter in layer._parameters.values() if parameter is not None):
        return True
    return any(tokens <= set(adapter.ids) if isinstance(adapter, TokenLayer) else True for adapter in found)
