"""``backbones``, ``cached_tokens``...: all access to names in transformers that one of its releases may change.

Other modules of the package take such names from here, and ``test_transformers_api.py`` reports which of them the
installed release no longer has. transformers is never imported here: a program that holds one of its models has it.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .base_model import base_modules

CONV1D = "transformers.pytorch_utils.Conv1D"  # linear layer of GPT-2 whose weight is (in, out)
POSITIONS = ("position_ids", "cache_position")  # arguments of a backbone that hold the positions of its tokens
_PLAIN = (Tensor, bool, int, float, str, list, Mapping)  # arguments that carry no state of earlier calls
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")


def is_encoder_decoder(module: Any) -> bool:
    """Return whether a model, by its configuration, has an encoder and a decoder."""
    return bool(from_config(module, "is_encoder_decoder"))


def from_config(module: Any, name: str) -> Any:
    """Return an entry of a model's configuration, None where the model or its configuration has none."""
    return getattr(getattr(module, "config", None), name, None)


def backbones(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) of the outermost transformers backbones: no head, input embeddings known.

    Where a decoder-only backbone only wraps its decoder (OPT), heads call the decoder, so the decoder is yielded.
    """
    outermost: list[str] = []
    for name, module in [("", model), *base_modules(model).items()]:
        if has_input_embeddings(module) and getattr(module, "base_model", None) is module:
            if any(name.startswith(f"{outer}." if outer else "") for outer in outermost):
                continue
            outermost.append(name)
            wraps_decoder = not is_encoder_decoder(module) and has_input_embeddings(getattr(module, "decoder", None))
            yield (f"{name}.decoder".lstrip("."), module.decoder) if wraps_decoder else (name, module)


def outermost_pretrained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) of the outermost models of transformers."""
    prefixes = list[str]()
    for name, module in [("", model), *base_modules(model).items()]:
        # Of the class, since the wrapper of torch.compile has the attributes of the model inside.
        embeds = callable(getattr(type(module), "get_input_embeddings", None))
        inside = any(name.startswith(prefix) for prefix in prefixes)
        if embeds and isinstance(getattr(module, "base_model", None), nn.Module) and not inside:
            prefixes.append(f"{name}.".lstrip("."))
            yield name, module


def names_by_loading(model: Any, known: Collection[str], ending: str) -> Callable[[str], str]:
    """Return a function that renames what another release, or a model with another head, wrote, as loading does.

    Releases before 5 keep their rules on the class of a model, later ones collect them from all of its modules. The
    name of the backbone is then added, or left out, where the result is known.

    Args:
        model: A model of transformers; names of other models stay as they are.
        known: Names that the model has, of modules or of tensors.
        ending: What makes the names those of tensors, of which the rules are; empty if they are.
    """
    prefix = getattr(model, "base_model_prefix", None)
    if not isinstance(prefix, str):
        return lambda name: name
    rename = _renaming(model)

    def place(name: str) -> str:
        name = rename(name + ending).removesuffix(ending)
        if name in known or not prefix:
            return name
        without = name.removeprefix(f"{prefix}.")
        return without if without in known else f"{prefix}.{name}"

    return place


def _renaming(model: Any) -> Callable[[str], str]:
    """Return how transformers renames a tensor that it reads for a model."""
    collect = getattr(sys.modules.get("transformers.conversion_mapping"), "get_model_conversion_mapping", None)
    if collect is None:  # before transformers 5
        old = getattr(type(model), "_checkpoint_conversion_mapping", None) or {}
        return lambda name: next((re.sub(part, new, name) for part, new in old.items() if re.search(part, name)), name)
    # Rules that compute tensors from several others, such as fused experts, have operations.
    rules = [rule for rule in collect(model) if not hasattr(rule, "operations")]
    return lambda name: functools.reduce(lambda renamed, rule: str(rule.rename_source_key(renamed)[0]), rules, name)


def renamed_like(model: Any) -> str | None:
    """Return the type of the model by whose rules transformers renames the weights of this one; None for its own."""
    patterns = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    kind: str | None = patterns.get(from_config(model, "model_type"))
    return kind


def has_input_embeddings(module: Any) -> bool:
    """Return whether a module has ``get_input_embeddings``, as every transformers model does."""
    return callable(getattr(module, "get_input_embeddings", None))


def cached_tokens(host: nn.Module, call: Mapping[str, Any]) -> Any:
    """Return how many tokens the key-value cache among the arguments of a call holds; 0 without a cache.

    The cache is found by its type, so that it does not matter what a release calls the argument. The number is an
    int, or a tensor of one number for caches of a fixed size.

    Args:
        host: Module that is called, for messages.
        call: Arguments by name.

    Raises:
        TypeError: An argument carries state of earlier calls and does not tell the number of their tokens.
    """
    for name, value in call.items():
        if value is None or isinstance(value, _PLAIN):
            continue
        if _is_cache(value):
            return value.get_seq_length()
        if isinstance(value, tuple):
            if value and isinstance(value[0], tuple) and value[0]:
                return value[0][0].shape[-2]  # keys (batch, heads, tokens, size), as before there were cache classes
        elif type(value).__module__.partition(".")[0] == "transformers":
            raise TypeError(
                f"{type(host).__name__} was given a {type(value).__name__} as {name!r}, which does not say how many "
                f"tokens it holds, so that virtual tokens could enter twice; generate with use_cache=False."
            )
    return 0


def _is_cache(value: Any) -> bool:
    """Return whether a value is a key-value cache; before transformers 5, some models define separate classes."""
    package = sys.modules.get("transformers")
    is_cache = package is not None and isinstance(value, package.Cache)
    return is_cache or callable(getattr(value, "get_seq_length", None))


def attention_implementation(module: Any) -> str | None:
    """Return how a module computes attention (``sdpa``, ``eager``...); None if its configuration does not tell."""
    implementation: str | None = from_config(module, "_attn_implementation")
    return implementation


def use_eager_attention(model: nn.Module) -> None:
    """Let a model compute attention by operators that run on a CPU, where its configuration asks for others."""
    for module in model.modules():
        if attention_implementation(module) not in (None, "eager", "sdpa"):
            module.config._attn_implementation = "eager"  # type: ignore[union-attr]


def attention_heads(module: nn.Module) -> int | None:
    """Return the number of query heads, read from an attention module or its configuration; None if neither tells."""
    for source in (module, getattr(module, "config", None)):
        for attribute in _HEAD_COUNTS:
            if isinstance(count := getattr(source, attribute, None), int):
                return count
    return None


def is_checkpointing(module: nn.Module) -> bool:
    """Return whether a module of transformers recomputes its activations in the backward pass."""
    return bool(vars(module).get("gradient_checkpointing"))


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[bool]:
    """Context in which no module of a model recomputes its activations; yields whether one did before."""
    switched: list[Any] = [module for module in model.modules() if is_checkpointing(module)]
    try:
        for module in switched:
            module.gradient_checkpointing = False
        yield bool(switched)
    finally:
        for module in switched:
            module.gradient_checkpointing = True


def checkpoint_without_reentry(model: nn.Module) -> None:
    """Let gradient checkpointing work below frozen embeddings, where the reentrant kind gives no gradients."""
    module: Any
    for module in model.modules():
        function = vars(module).get("_gradient_checkpointing_func")
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant", True):
            module._gradient_checkpointing_func = functools.partial(
                function.func, *function.args, **{**function.keywords, "use_reentrant": False}
            )
