"""``example_inputs``: the arguments of one small forward of a model, for tracing what it computes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..token_arguments import plain_ids
from .image_inputs import with_images

_TOKENS = 8
_ROWS = 1  # of several, a classifier without a padding token could not find the last tokens

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # by position and by name

_remembered = WeakKeyDictionary[nn.Module, Inputs]()


def as_inputs(example: Any) -> Inputs:
    """Return positional and named arguments, on the CPU, where the twin is."""
    example = tree_map_only(Tensor, lambda x: x.detach().cpu(), example)
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def remember_example(model: nn.Module, example: Inputs) -> None:
    """Keep inputs that a user gave for a model."""
    _remembered[model] = example


def known_example(model: nn.Module) -> Inputs | None:
    """Return inputs of a model that a user gave, or its ``example_input_array``; None without."""
    given = getattr(model, "example_input_array", None)
    return _remembered.get(model) or (None if given is None else as_inputs(given))


def example_inputs(model: nn.Module) -> Inputs:
    """Return (args, kwargs) for a model of transformers, or its twin.

    Of a configuration are read: the vocabulary, the size of images, of spectrograms. Text is random tokens.

    Raises:
        ValueError: The model has no configuration, or one that does not tell.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise ValueError("it is no model of transformers, whose configuration would tell its inputs")
    inputs = _inputs_from_config(model, config, main)
    if main not in inputs:
        raise ValueError(f"no {main} can be made from its configuration")
    return (), inputs


def _inputs_from_config(model: nn.Module, config: Any, main: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    names = inspect.signature(model.forward).parameters
    towers = hasattr(config, "vision_config") and hasattr(config, "text_config")  # side by side, as in CLIP
    inputs: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    if "input_ids" in names:
        inputs["input_ids"] = _tokens(config, generator)
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = _tokens(config, generator)
        if "input_ids" in inputs and isinstance(eos := getattr(config, "eos_token_id", None), int):
            inputs["input_ids"][:, -1] = eos  # where classifiers read
    if main == "pixel_values" or (towers and "pixel_values" in names and not hasattr(config, "image_token_id")):
        inputs["pixel_values"] = _images(config, generator)
    if main == "input_features":
        frames = 2 * config.max_source_positions if hasattr(config, "max_source_positions") else 64
        inputs["input_features"] = torch.randn(1, config.num_mel_bins, frames, generator=generator)
    if main == "input_values":
        inputs["input_values"] = _sound(config, generator)
    if "input_ids" in inputs:
        inputs = with_images(model, config, inputs, _images(config, generator))
    return inputs


def _from(config: Any, *names: str) -> Any:
    """Return the first of these entries that a configuration, or that of its text, has."""
    sources = (config, getattr(config, "text_config", None), getattr(config, "decoder", None))
    return next((getattr(s, n) for s in sources for n in names if getattr(s, n, None) is not None), None)


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    """Return tokens of which none marks padding, an end or an image."""
    plain = plain_ids(config, int(_from(config, "vocab_size") or 32))
    return plain[torch.randint(len(plain), (_ROWS, _TOKENS), generator=generator)]


def _images(config: Any, generator: torch.Generator) -> Tensor:
    backbone = getattr(config, "backbone_config", None) or getattr(config, "vision_config", None) or config
    size = _from(config, "image_size") or _from(backbone, "image_size") or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = _from(config, "num_channels") or _from(backbone, "num_channels") or 3
    return torch.randn(_ROWS, channels, height, width, generator=generator)


def _sound(config: Any, generator: torch.Generator) -> Tensor:
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):  # spectrograms
        return torch.randn(_ROWS, config.max_length, config.num_mel_bins, generator=generator)
    stride = 1
    for step in getattr(config, "conv_stride", ()):
        stride *= step
    return torch.randn(_ROWS, max(400, 12 * stride), generator=generator)
