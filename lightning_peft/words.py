"""From a text to the ids that a model's tokenizer gives it."""

from __future__ import annotations

from torch import nn

from .method import require


def token_ids(model: nn.Module, text: str, tokenizer: str = "", field: str = "init_text") -> list[int]:
    """Return the ids of a text's tokens, without those that a tokenizer sets around a text.

    Args:
        model: Transformers model; it tells its tokenizer, unless it was built from a configuration.
        text: What to encode.
        tokenizer: Folder or name of the tokenizer, if it is not the model's own.
        field: Which setting the text is, for the message of an error.

    Raises:
        ValueError: No tokenizer is known, or the text has no token.
    """
    from transformers import AutoTokenizer

    named = [getattr(getattr(m, "config", None), "_name_or_path", "") for m in model.modules()]
    source = tokenizer or next(filter(None, named), "")
    require(bool(source), "tokenizer", tokenizer, "a folder or name, since the model does not tell its own")
    ids: list[int] = AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False)["input_ids"]
    require(len(ids) > 0, field, text, "a text with at least one token")
    return ids
