"""``check_tokens``, ``check_new_rows``, ``check_ends``: rows of tokens are there, new ones train, ends differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_peft.core.adapted_module import adapters
from lightning_peft.methods.families.token_rows import TokenLayer
from lightning_peft.structure.transformers_api import input_embeddings
from lightning_peft.tasks.chat_template import end_token
from lightning_peft.tasks.data.table_data import TableDataModule
from lightning_peft.tasks.messages import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EQUAL = 1e-3  # of a row's norm; rows of a base that were never trained differ by less
_FIRST = 8  # rows of the data whose labels are looked at
_CHUNK = 8192  # rows of the output layer that are compared at a time


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


def check_ends(network: nn.Module, data: Iterable[Any]) -> None:
    """Warn where a network cannot tell the token that ends its answers from others, and nothing trains to tell it.

    Args:
        network: Adapted model of transformers.
        data: What it is trained on; tables are looked at.
    """
    head: Any = network.get_output_embeddings()  # type: ignore[operator]
    for tokenizer, end in dict.fromkeys(pair for task in data for pair in _ends(task)):
        if head is None or _trains(network, head, {end}) or not (others := _equal_rows(head, end)):
            continue
        tokens = [tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else token for token in others]
        untied = head.weight is not getattr(input_embeddings(network), "weight", None)
        method = f"TrainableTokens(tokens=[{end}]{', output_head=true' * untied})"
        name = tokenizer.convert_ids_to_tokens(end)
        rank_zero_warn(
            f"Answers will not end: their end token {name!r} (id {end}) has the same row in the output layer as "
            f"{len(others)} other tokens ({quoted(tokens, 5)}), to within {_EQUAL:.1%}, so the model cannot tell it "
            f"from them, and nothing trains these rows. Add {method} to the list peft.method, or choose an end token "
            "that the base was trained with, by chat_template of chat data or eos_token of the tokenizer."
        )


def _ends(task: Any) -> list[tuple[PreTrainedTokenizerBase, int]]:
    """Return the end tokens that have labels in the first rows of a table, each after its tokenizer."""
    split: Any = "validation" if getattr(task, "streaming", False) else "train"
    if not isinstance(task, TableDataModule) or not task.splits.has(split):
        return []
    rows = [row.get("labels") for row in task.examples(split)[:_FIRST]]
    labels = {label for row in rows if isinstance(row, list) for label in row if isinstance(label, int)}
    known = {end_token(task.tokenizer), task.tokenizer.eos_token_id}
    return [(task.tokenizer, end) for end in sorted(known & labels)]


@torch.no_grad()
def _equal_rows(head: Any, token: int) -> list[int]:
    """Return the other tokens whose rows of an output layer are equal to that of a token; none if it is in parts."""
    weight, bias = head.weight, getattr(head, "bias", None)
    if type(weight) is not nn.Parameter or weight.dim() != 2 or weight.is_meta or not weight.is_floating_point():
        return []
    row = weight[token].float()
    distances = torch.cat([(chunk.float() - row).norm(dim=1) for chunk in torch.split(weight, _CHUNK)])
    are_equal = distances <= _EQUAL * row.norm()
    if isinstance(bias, Tensor):
        are_equal &= (bias - bias[token]).abs() <= _EQUAL * bias[token].abs()
    return [other for other in are_equal.nonzero().flatten().tolist() if other != token]
