"""``PromptInit``: virtual tokens that start as embeddings of a text or of labels; ``token_ids`` encodes a text."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ...core.method import Method, check_setting
from ...structure.transformers_api import from_config

COMMON = 5000  # number of tokens at the beginning of a vocabulary, which are its most frequent


def token_ids(model: nn.Module, text: str, tokenizer: str = "", field: str = "init_text") -> list[int]:
    """Return the ids of a text's tokens, without special tokens.

    Args:
        model: Transformers model, whose configuration tells the tokenizer unless it was built without a checkpoint.
        text: Text to encode.
        tokenizer: Folder or name of the tokenizer, if it is not that of the model.
        field: Name of the setting that holds the text, for error messages.

    Raises:
        ValueError: No tokenizer is known, or the text has no tokens.
    """
    from transformers import AutoTokenizer

    checkpoints = [from_config(m, "_name_or_path") for m in model.modules()]
    source = tokenizer or next(filter(None, checkpoints), "")
    check_setting(bool(source), "tokenizer", tokenizer, "a folder or name, since the model does not tell its own")
    ids: list[int] = AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False)["input_ids"]
    check_setting(len(ids) > 0, field, text, "a text with at least one token")
    return ids


@dataclass(frozen=True, kw_only=True)
class PromptInit:
    """Initialization of virtual tokens; the arguments are those of ``PromptTuning``.

    Raises:
        ValueError: A setting is invalid.
    """

    length: int
    init: str
    init_text: str
    labels: list[str]
    tokenizer: str

    def __post_init__(self) -> None:
        kinds = ("random", "vocabulary", "text", "labels")
        check_setting(
            isinstance(self.length, int) and self.length > 0, "length", self.length, "a positive whole number"
        )
        check_setting(self.init in kinds, "init", self.init, "'random', 'vocabulary', 'text' or 'labels'")
        text, labels = self.init == "text", self.init == "labels"
        check_setting(bool(self.init_text) == text, "init_text", self.init_text, "given with init='text' alone")
        check_setting(bool(self.labels) == labels, "labels", self.labels, "given with init='labels' alone")
        check_setting(
            len(self.labels) <= self.length, "labels", self.labels, f"at most {self.length}, one for each virtual token"
        )

    @classmethod
    def of(cls, method: Method) -> PromptInit:
        """Return the initialization that a method's fields of these names describe."""
        return cls(**{field.name: getattr(method, field.name) for field in fields(cls)})

    def apply(self, prompt: Tensor, table: nn.Module | None, model: nn.Module) -> None:
        """Fill virtual tokens (..., length, features), in place.

        Args:
            prompt: Tensor to fill; each of several prompts is drawn separately.
            table: Input embeddings of the model; not needed for a random start.
            model: Model whose configuration tells the tokenizer.
        """
        if self.init == "random":
            nn.init.uniform_(prompt, -0.5, 0.5)
            return
        check_setting(table is not None, "init", self.init, "'random' where targets come without embeddings")
        check_setting(not prompt.is_meta, "init", self.init, "'random' while the model has no values yet (meta device)")
        with torch.no_grad():
            for tokens in prompt.view(-1, *prompt.shape[-2:]):
                tokens.copy_(self._embeddings(table, model))

    def _embeddings(self, table: Any, model: nn.Module) -> Tensor:
        """Return embeddings (length, features) to start from."""

        def embed(ids: Tensor | list[int]) -> Tensor:
            embeddings: Tensor = table(torch.as_tensor(ids, device=table.weight.device))
            return embeddings

        if self.init == "text":
            ids = token_ids(model, self.init_text, self.tokenizer)
            return embed((ids * -(-self.length // len(ids)))[: self.length])
        means = [embed(token_ids(model, label, self.tokenizer, "labels")).mean(0) for label in self.labels]
        rest, common = self.length - len(means), min(COMMON, len(table.weight))
        check_setting(
            rest <= common, "length", self.length, f"at most {common + len(means)}, the size of the vocabulary"
        )
        return torch.cat([*(mean[None] for mean in means), embed(torch.randperm(common)[:rest])])
