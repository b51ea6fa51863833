"""``check_types`` compares the settings in a file of HF PEFT with the types that HF PEFT gives them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

MOST = 2**20  # of virtual tokens, ranks and layers


def check_types(config: Mapping[str, Any], source: str) -> None:
    """Raise a ``ValueError`` if a setting that is read has a value that HF PEFT does not write."""
    for names, expected, fits in _EXPECTED:
        for name in names:
            if config.get(name) is not None and not fits(config[name]):
                value = f"{str(config[name])[:100]!r} ({type(config[name]).__name__})"
                raise ValueError(f"{source} is damaged: {name} must be {expected}, got {value}.")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < MOST


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(type(name) is str for name in value)


def _is_pattern_or_names(value: Any) -> bool:
    return _is_pattern(value) if type(value) is str else _is_names(value)


def _is_pattern(value: str) -> bool:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_layers(value: Any) -> bool:
    return _is_step(value) or (isinstance(value, list) and all(map(_is_step, value)))


def _is_by_name(of_name: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(of_name, value.values()))


def _is_rank(value: Any) -> bool:
    """Whether it is a rank or, of AdaLoRA, what is kept of one."""
    return _is_count(value) or (isinstance(value, list) and all(type(kept) is bool for kept in value))


_COUNTS = (
    *("r", "init_r", "target_r", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"),
    *("num_transformer_submodules", "encoder_hidden_size", "encoder_num_layers", "num_tasks", "num_ranks"),
    *("adapter_len", "adapter_layers", "deltaT"),
)
_NUMBERS = ("lora_alpha", "alpha", "lora_dropout", "encoder_dropout", "beta1", "beta2", "orth_reg_weight")
_FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out", "prefix_projection", "lora_bias", "inference_mode")
_TEXTS = ("peft_type", "task_type", "bias", "encoder_reparameterization_type", "base_model_name_or_path")
_EXPECTED: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (_COUNTS, f"a whole number from 1 to {MOST}", _is_count),
    (("tinit", "tfinal", "total_step"), "a number of steps", _is_step),
    (_NUMBERS, "a number", _is_number),
    (_FLAGS, "true or false", lambda value: type(value) is bool),
    (_TEXTS, "a text", lambda value: type(value) is str),
    (
        ("target_modules", "exclude_modules", "layers_pattern"),
        "a regular expression or a list of names",
        _is_pattern_or_names,
    ),
    (("feedforward_modules",), "a regular expression or a list of names", _is_pattern_or_names),
    (("modules_to_save", "target_parameters"), "a list of names", _is_names),
    (("layers_to_transform",), "a number of a layer, or a list of them", _is_layers),
    (("rank_pattern",), "ranks by name", _is_by_name(_is_rank)),
    (("alpha_pattern",), "numbers by name", _is_by_name(_is_number)),
)
