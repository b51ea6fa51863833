"""Checks of ``Seq2Seq``: the model has an encoder and a decoder, and its data has tokens that it knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_peft.tasks.data.seq2seq_data import end_token
from lightning_peft.tasks.pretrained import has_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_has_encoder(model: str | None, config: dict[str, Any] | str | None) -> None:
    """Refuse a model without an encoder.

    Args:
        model: A reference as `locate` reads it.
        config: As for ``build_model``, in place of a model.

    Raises:
        ValueError: It continues texts.
    """
    if (model is None) != (config is None) and not has_encoder(model, config):
        raise ValueError(
            f"{model or config!r} is a decoder alone, which continues texts. Use CausalLM with it, or give Seq2Seq a "
            "model with an encoder and a decoder, such as T5 or BART."
        )


def check_data(network: Any, tokenizer: PreTrainedTokenizerBase, data: Any) -> None:
    """Refuse a tokenizer whose tokens the model does not know, and rows that are longer than its positions.

    Args:
        network: The model.
        tokenizer: Of the data.
        data: With ``max_length`` and ``max_target_length``, or without.

    Raises:
        ValueError: They do not fit together.
    """
    known = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > known:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model knows {known}. Use the model's own tokenizer, "
            "or a model with a larger vocab_size."
        )
    ends = network.generation_config.eos_token_id
    end = end_token(tokenizer)
    if end is not None and end not in (ends if isinstance(ends, list) else [ends]):
        raise ValueError(
            f"The tokenizer ends texts with token {end}, but the model stops at eos_token_id={ends}, so what it writes "
            f"would not end. Use the model's own tokenizer, or set eos_token_id: {end} in config."
        )
    positions = getattr(network.config, "max_position_embeddings", None)
    for name, attribute in (("max_source_length", "max_length"), ("max_target_length", "max_target_length")):
        length = getattr(data, attribute, None)
        if positions is not None and length is not None and length > positions:
            raise ValueError(f"Got {name}={length}, but the model has {positions} positions. Lower {name}.")
