"""``backbones``, ``attention_heads``...: all access to names in transformers that one of its releases may change.

Other modules of the package take such names from here, and ``test_transformers_api.py`` reports which of them the
installed release no longer has. transformers is never imported here: a program that holds one of its models has it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .base_model import base_modules

SDPA_FUNCTION = "sdpa_attention_forward"  # of the attention interface: calls scaled_dot_product_attention
CONV1D = "transformers.pytorch_utils.Conv1D"  # linear layer of GPT-2 whose weight is (in, out)
POSITIONS = ("position_ids", "cache_position")  # arguments of a backbone that hold the positions of its tokens
HAS_HOOKS = "_output_capturing_hooks_installed"  # attribute of a model whose hooks record hidden states
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


def enable_checkpointing(network: Any) -> None:
    """Have the blocks of a model of transformers keep their inputs alone, and run again in the backward pass."""
    enable = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)  # renamed
    enable()


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


def checkpoint_without_reentry(model: nn.Module) -> list[Callable[[], None]]:
    """Let gradient checkpointing work below frozen embeddings, where the reentrant kind gives no gradients.

    Returns:
        What undoes it.
    """
    module: Any
    undo = list[Callable[[], None]]()
    for module in model.modules():
        function = vars(module).get("_gradient_checkpointing_func")
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant", True):
            module._gradient_checkpointing_func = functools.partial(
                function.func, *function.args, **{**function.keywords, "use_reentrant": False}
            )
            undo.append(functools.partial(setattr, module, "_gradient_checkpointing_func", function))
    return undo
