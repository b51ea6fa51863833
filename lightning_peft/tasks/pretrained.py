"""Builds models and tokenizers from a folder, a Python package, the hub, or a config with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_peft.tasks.messages import close_names
from lightning_peft.tasks.references import config_file, locate, transformers, weights_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DataType = Literal["auto", "bfloat16", "float16", "float32"]

__all__ = [
    "DataType",
    "build_config",
    "build_model",
    "build_tokenizer",
    "has_encoder",
    "is_encoder",
    "locate",
    "prompt_ids",
    "read_config",
    "transformers",
    "weights_folder",
]


def build_model(
    kind: str, model: str | None, config: dict[str, Any] | str | None, dtype: DataType, **settings: object
) -> PreTrainedModel:
    """A transformers model in train mode: pretrained if ``model`` is given, with random weights if ``config`` is.

    ``from_pretrained`` returns a model in eval mode and Lightning does not change that, so dropout would stay off.
    Random weights are drawn from torch's global generator: ``seed_everything`` makes them repeatable. Where
    parameters are built without values, no weights are read.

    Args:
        kind: The transformers auto class, such as ``AutoModelForCausalLM``.
        model: A reference as `locate` reads it.
        config: Settings of the architecture with its ``model_type``, or a config.json of transformers, or its folder.
        dtype: Of the weights; ``auto`` keeps that of the pretrained file, or that which the config names.
        settings: Changes to the model's config.
    """
    if (model is None) == (config is None):
        raise ValueError(
            f"Got model={model!r} and config={config!r}, expected exactly one of the two. Give model=FOLDER_OR_NAME "
            "for pretrained weights, or config={'model_type': ...} for random ones."
        )
    twice = sorted(set(config if isinstance(config, dict) else ()) & set(settings))
    if twice:
        raise ValueError(f"config sets {twice[0]!r}, which another argument decides. Remove it from config.")
    auto = getattr(transformers(), kind)
    probe = torch.nn.ParameterList([torch.empty(0)])
    if model is not None and not probe[0].is_meta:  # without values, from_pretrained would read them in vain
        network: PreTrainedModel = _from_pretrained(auto, model, dtype=dtype, **settings)
    else:
        load = transformers().AutoConfig.from_pretrained
        network = auto.from_config(
            build_config(config, **settings) if config else load(locate(model or ""), **settings)
        )
        network = network if dtype == "auto" else network.to(getattr(torch, dtype))
    network.train()
    return network


def _from_pretrained(auto: Any, model: str, **settings: Any) -> Any:
    try:
        return auto.from_pretrained(locate(model), **settings)
    except OSError as error:
        said = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"The model {model!r} cannot be read: it is no folder of a model here, and the hub has none of the name or "
            f"cannot be reached. Give a folder, package:name/folder, or a name on the hub. transformers says: {said}"
        ) from error


def has_encoder(model: str | None, config: dict[str, Any] | str | None) -> bool:
    """Whether a model that generates text reads its prompts by an encoder of its own.

    Args:
        model: A reference as `locate` reads it.
        config: As for ``build_model``, in place of a model.

    Raises:
        ValueError: The model sees a text all at once, and so cannot tell how likely the next token is.
    """
    if (model is None) == (config is None):
        return False  # build_model says what is wrong
    built = read_config(model, config)
    if built.is_encoder_decoder:
        return True
    if is_encoder(built):
        raise ValueError(
            f"{model or config!r} is an encoder ({built.model_type}), which sees all tokens of an answer at once. Take "
            "a model with encoder and decoder, such as T5, or a decoder, or ask with Cloze."
        )
    return False


def read_config(model: str | None, config: dict[str, Any] | str | None) -> PretrainedConfig:
    """The transformers config of a model.

    Args:
        model: A reference as `locate` reads it.
        config: As for ``build_model``, in place of a model.
    """
    built: PretrainedConfig
    built = build_config(config) if config else transformers().AutoConfig.from_pretrained(locate(model or ""))
    return built


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a model of this config sees a text all at once, as BERT does."""
    masked_types = transformers().models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return config.model_type in masked_types and not getattr(config, "is_decoder", False)


def build_config(config: dict[str, Any] | str, **settings: object) -> PretrainedConfig:
    """A transformers config. Unlike transformers, it refuses names that the architecture does not know.

    Args:
        config: Settings of the architecture with its ``model_type``, or a config.json of transformers, or its folder.
        settings: Further settings.

    Raises:
        FileNotFoundError: There is no such file.
    """
    auto = transformers().AutoConfig
    if isinstance(config, str):
        built: PretrainedConfig = auto.from_pretrained(config_file(config), **settings)
        built.name_or_path = ""  # weights are random, and not those beside the file
        return built
    config = {**config, **settings}
    kind = config.get("model_type")
    types = sorted(transformers().CONFIG_MAPPING)
    if kind not in types:
        raise ValueError(
            f"config has model_type={kind!r}, expected a name that transformers knows. {close_names(str(kind), types)}"
        )
    base = auto.for_model(kind)
    fields = {name: value for name, value in config.items() if name != "model_type"}
    unknown = [name for name in fields if not hasattr(base, name) and not hasattr(base, f"_{name}")]
    if unknown:
        raise ValueError(
            f"config names {unknown[0]!r}, which is no setting of {kind!r}. {close_names(unknown[0], base.to_dict())}"
        )
    known: PretrainedConfig = auto.for_model(kind, **fields)
    return known


def build_tokenizer(reference: str, padding_side: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. One without a padding token pads with its end token; the attention mask hides that.

    Args:
        reference: As `locate` reads it.
        padding_side: ``left`` or ``right``; None keeps the tokenizer's own.
    """
    settings = {} if padding_side is None else {"padding_side": padding_side}
    tokenizer: PreTrainedTokenizerBase = transformers().AutoTokenizer.from_pretrained(locate(reference), **settings)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer of {reference!r} has neither a padding token nor an end token, so rows of different "
                "length cannot share a batch. Set pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that are to be continued: with the tokenizer's start token, without an end token."""
    rows: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    return [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in rows]
