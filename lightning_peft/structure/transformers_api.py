"""``backbones``, ``cached_tokens``...: all access to names in transformers that one of its releases may change.

Other modules of the package take such names from here, and ``test_transformers_api.py`` reports which of them the
installed release no longer has. transformers is never imported here: a program that holds one of its models has it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .base_model import base_modules

SDPA_FUNCTION = "sdpa_attention_forward"  # of the attention interface: calls scaled_dot_product_attention
CONV1D = "transformers.pytorch_utils.Conv1D"  # linear layer of GPT-2 whose weight is (in, out)
POSITIONS = ("position_ids", "cache_position")  # arguments of a backbone that hold the positions of its tokens
HAS_HOOKS = "_output_capturing_hooks_installed"  # attribute of a model whose hooks record hidden states
_STATES = ("state", "mems")  # arguments of RWKV and XLNet that are lists of tensors, and no caches
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
    Some models that generate name no backbone (Llama4, BLIP-2); it is looked for inside of them.
    """
    outermost: list[str] = []
    for name, module in [("", model), *base_modules(model).items()]:
        if _is_backbone(module):
            if any(name.startswith(f"{outer}." if outer else "") for outer in outermost):
                continue
            outermost.append(name)
            wraps_decoder = not is_encoder_decoder(module) and has_input_embeddings(getattr(module, "decoder", None))
            yield (f"{name}.decoder".lstrip("."), module.decoder) if wraps_decoder else (name, module)


def is_pretrained(module: nn.Module) -> bool:
    """Return whether a module is a model of transformers."""
    # Of the class, since the wrapper of torch.compile has the attributes of the model inside.
    embeds = callable(getattr(type(module), "get_input_embeddings", None))
    return embeds and isinstance(getattr(module, "base_model", None), nn.Module)


def _is_backbone(module: Any) -> bool:
    is_own: bool = has_input_embeddings(module) and getattr(module, "base_model", None) is module
    if not is_own or is_encoder_decoder(module):
        return is_own
    generates = callable(getattr(module, "can_generate", None)) and module.can_generate()
    return not generates and input_embeddings(module) is not None


def input_embeddings(module: Any) -> nn.Module | None:
    """Return the input embeddings of a model; None where transformers knows none, as for pairs of towers."""
    try:
        embeddings: nn.Module | None = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return embeddings


def outermost_pretrained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) of the outermost models of transformers."""
    prefixes = list[str]()
    for name, module in [("", model), *base_modules(model).items()]:
        inside = any(name.startswith(prefix) for prefix in prefixes)
        if not inside and is_pretrained(module):
            prefixes.append(f"{name}.".lstrip("."))
            yield name, module


def has_input_embeddings(module: Any) -> bool:
    """Return whether a module has ``get_input_embeddings``, as every transformers model does."""
    return callable(getattr(module, "get_input_embeddings", None))


def cached_tokens(host: nn.Module, call: Mapping[str, Any]) -> Any:
    """Return how many tokens the key-value cache among the arguments of a call holds; 0 without a cache.

    The cache is found by its type, so that it does not matter what a release calls the argument. The number is an
    int, or a tensor of one number for caches of a fixed size; None for a state that has read tokens and does not count
    them, as Mamba and RWKV have it.

    Args:
        host: Module that is called, for messages.
        call: Arguments by name.

    Raises:
        TypeError: An argument carries state of earlier calls and does not tell the number of their tokens.
    """
    for name, value in call.items():
        if name in _STATES and isinstance(value, list):
            return None
        if value is None or isinstance(value, _PLAIN):
            continue
        if _is_cache(value):
            return _length_of(value)
        if isinstance(value, tuple):
            if value and isinstance(value[0], tuple) and value[0]:
                return value[0][0].shape[-2]  # keys (batch, heads, tokens, size), as before there were cache classes
        elif type(value).__module__.partition(".")[0] == "transformers":
            raise TypeError(
                f"{type(host).__name__} was given a {type(value).__name__} as {name!r}, which does not say how many "
                f"tokens it holds, so that virtual tokens could enter twice; generate with use_cache=False."
            )
    return 0


def _length_of(cache: Any) -> Any:
    """Return the number of tokens in a cache; None for states alone, which count none, once they have read some."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return None if cache.has_previous_state() else 0


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


def attention_interface() -> Any:
    """Return the class of transformers' attention interface; None without transformers, and before its release 5.

    There, attention modules call eager attention without asking the interface.
    """
    package = sys.modules.get("transformers.modeling_utils")
    interface = getattr(package, "AttentionInterface", None)
    return interface if hasattr(interface, "get_interface") else None


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
