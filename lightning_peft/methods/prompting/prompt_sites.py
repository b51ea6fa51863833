"""``place_prompts`` finds the modules of a model that virtual tokens enter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.method import check_setting
from ...structure.layer_of import is_called_linear, layer_of
from ...structure.read_weights import read_weight_attribute
from ...structure.selection import select_modules
from ...structure.transformers_api import backbones, input_embeddings, is_encoder_decoder, outermost_pretrained
from .backbone_call import prepend_to_backbone
from .probe_backbone import probe_backbone
from .prompt import ExtendEncoderMask, Prompt, PromptSite, StripPrompt
from .token_blocks import lists_of_token_blocks
from .virtual_tokens import names_of, prepend_to_blocks, prepend_to_embedded


def place_prompts(
    model: nn.Module, targets: Sequence[str], embeddings: str, length: int, make: Callable[[PromptSite], Prompt]
) -> Iterator[tuple[str, Adapter]]:
    """Yield (host's name, adapter) of the adapters that insert virtual tokens into a model.

    They enter the modules that ``targets`` name or, without targets, each transformers backbone. In an encoder-decoder
    model they enter the encoder, and the decoder sees them. A list of blocks is not called, so tokens are inserted at
    its first block and removed after its last.

    Args:
        model: Model to search.
        targets: Globs of modules that take and return (batch, tokens, features), or of lists of such blocks.
        embeddings: Glob of the input embeddings that belong to them; can be empty.
        length: Number of virtual tokens.
        make: Function that creates a prompt for a site.

    Raises:
        ValueError: No model of transformers is found, or more than one module of embeddings.
        TypeError: No backbone is found that embeds tokens and treats virtual ones as such, or a target takes (tokens,
            batch, features).
    """
    if targets:
        yield from _place_at(model, targets, embeddings, length, make)
        return
    hosts = [(n, h, table) for n, h in backbones(model) if isinstance(table := input_embeddings(h), nn.Embedding)]
    readers: list[Any] = [host.get_encoder() if _has_decoder(host) else host for _, host, _ in hosts]
    if not hosts or not all({"input_ids", "inputs_embeds"} & set(names_of(host)) for host in readers):
        raise _no_tokens(model)
    for (name, host, table), reader in zip(hosts, readers, strict=True):
        name_of = {module: path for path, module in host.named_modules(prefix=name)}
        keep = reader is not host  # the decoder sees what the encoder returns
        stand_in = probe_backbone(name_of[reader], reader, keep)
        insert = partial(prepend_to_backbone, keep=keep, stand_in=stand_in)
        yield name_of[reader], make(PromptSite(reader, table.weight, table, insert, stand_in))
        if keep:
            yield name_of[host.get_decoder()], ExtendEncoderMask(host.get_decoder(), length)


def _has_decoder(host: Any) -> bool:
    """Return whether a backbone has a decoder beside its encoder; encoders alone may have the configuration of both."""
    decoder = getattr(host, "get_decoder", None)
    return is_encoder_decoder(host) and decoder is not None and decoder() not in (host, None)


def _place_at(
    model: nn.Module, targets: Sequence[str], embeddings: str, length: int, make: Callable[[PromptSite], Prompt]
) -> Iterator[tuple[str, Adapter]]:
    """Yield (host's name, adapter) for the modules, and lists of blocks, that ``targets`` name."""
    table = _table(model, embeddings) if embeddings else None
    for name, host in select_modules(model, targets).items():
        _check_not_tokens_first(host, name)
        weight: Any = _first_weight(host, name) if table is None else table.weight
        if not isinstance(host, nn.ModuleList):
            yield name, make(PromptSite(host, weight, table, partial(prepend_to_embedded, first=names_of(host)[0])))
            continue
        insert = partial(prepend_to_blocks, first=names_of(host[0])[0])
        yield f"{name}.0", make(PromptSite(host[0], weight, table, insert))
        yield f"{name}.{len(host) - 1}", StripPrompt(length)


def _no_tokens(model: nn.Module) -> Exception:
    """Return an error that says why virtual tokens enter no backbone of a model, and what to do instead."""
    name, part = next(outermost_pretrained(model), ("", None))
    if part is None:
        return ValueError("No transformers backbone is found in the model; give the method targets.")
    advice = "use LoRA, which needs no tokens"
    if lists := lists_of_token_blocks(part):
        advice = f"give the method targets, such as targets=[{f'{name}.{lists[0]}'.lstrip('.')!r}]"
    return TypeError(
        f"{type(part).__name__} reads {part.main_input_name} and has no backbone that embeds tokens, before which "
        f"virtual tokens could stand; {advice}."
    )


def check_sites(targets: Sequence[str], embeddings: str) -> None:
    """Raise a ``ValueError`` where embeddings are given without targets."""
    check_setting(bool(targets) or not embeddings, "embeddings", embeddings, "given together with targets")


def _table(model: nn.Module, embeddings: str) -> nn.Module:
    """Return the only module that a glob of input embeddings matches."""
    (name, table), *more = select_modules(model, [embeddings]).items()
    if more:
        raise ValueError(f"embeddings={embeddings!r} names {name} and {more[0][0]}; give the glob of one.")
    if getattr(getattr(table, "weight", None), "dim", int)() != 2:
        raise TypeError(f"{name} is a {type(table).__name__}, no table (vocabulary, features) of embeddings.")
    return table


def _first_weight(host: nn.Module, name: str) -> Tensor:
    """Return the weight (out, features) of the first linear layer in a host."""
    for module in host.modules():
        if is_called_linear(module) or read_weight_attribute(type(module)):
            return layer_of(module).read(module)
    raise ValueError(f"{name} ({type(host).__name__}) holds no linear layer, which would tell its width.")


def _check_not_tokens_first(host: nn.Module, name: str) -> None:
    attention = [m for m in host.modules() if isinstance(m, nn.MultiheadAttention)]
    if any(not module.batch_first for module in attention):
        raise TypeError(f"{name} takes (tokens, batch, features); build it with batch_first=True.")
