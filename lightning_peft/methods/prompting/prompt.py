"""Prompts as adapters: where virtual tokens enter a model, whatever they are made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...core.adapter import Adapter, Call
from ...core.method import check_setting
from ...core.per_row import BatchableAdapter, BatchableModuleAdapter
from ...structure.layer_types import is_called_linear, layer_of, read_weight_attribute
from ...structure.selection import select_modules
from ...structure.transformers_api import backbones, is_encoder_decoder
from .row_tasks import TaskAdapter
from .strip_outputs import strip_virtual_tokens
from .virtual_tokens import Insertion, names_of, prepend_to_backbone, prepend_to_blocks, prepend_to_embedded

Insert = Callable[..., Any]


@dataclass(frozen=True)
class PromptSite:
    """Where virtual tokens enter a model."""

    host: nn.Module
    weight: Tensor  # (any, features), for width, device and type
    table: nn.Module | None  # of input embeddings, where it is known
    insert: Insert  # calls the host with virtual tokens inserted: (host, inner, arguments by name, virtual tokens)


class Prompt(BatchableModuleAdapter, TaskAdapter):
    """Adapter that puts virtual tokens in front of what its host reads.

    Args:
        place: Where they enter.
        tasks: Number of tasks.
    """

    tensor_parallel_dims = {}
    plot_tensors = {"tokens": "prompt"}

    def __init__(self, place: PromptSite, tasks: int) -> None:
        super().__init__(tasks)
        self.insert, self.names = place.insert, names_of(place.host)

    @abstractmethod
    def virtual(self, rows: int) -> Tensor:
        """Return the virtual tokens (length, features), or (rows, length, features) where rows have own tasks."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        return self._call_with(self.virtual, host, inner, *args, **kwargs)

    def per_example_tensors(self) -> tuple[Any, ...]:
        if self.tasks > 1:
            return ()
        virtual = self.virtual(1)
        return (Prompt, len(virtual)), virtual

    def for_rows(self, host: Any, inner: Call, values: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        prompts: Tensor = values[0]

        def virtual(rows: int) -> Tensor:
            if rows % len(prompts):
                raise ValueError(f"row_adapters was given {len(prompts)} names; {rows} rows at hand are no multiple.")
            return prompts.repeat_interleave(rows // len(prompts), 0)

        return self._call_with(virtual, host, inner, *args, **kwargs)

    def _call_with(self, virtual: Callable[[int], Tensor], host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        given = call.get("inputs_embeds")
        given = call.get(self.names[0]) if given is None else given
        if given is None:
            return inner(**call)  # which says itself what it misses
        return self.insert(host, inner, call, virtual(len(given)))


class ExtendEncoderMask(BatchableAdapter, Adapter):
    """Lets a decoder's cross-attention see the virtual tokens that its encoder kept; trains nothing."""

    tensor_parallel_dims = {}

    def __init__(self, host: nn.Module, length: int) -> None:
        super().__init__()
        self.length, self.names = length, names_of(host)

    def reset_parameters(self) -> None:
        """Nothing to fill."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        mask = call.get("encoder_attention_mask")
        if mask is not None:
            call["encoder_attention_mask"] = Insertion(self.length, mask).mask(mask)
        return inner(**call)

    def per_example_tensors(self) -> tuple[Any, ...]:
        return ((ExtendEncoderMask, self.length),)


class StripPrompt(BatchableAdapter, Adapter):
    """Takes the virtual tokens out of what the last of several blocks returns; trains nothing."""

    tensor_parallel_dims = {}
    part = "end"  # beside the prompt itself, where there is one block

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def reset_parameters(self) -> None:
        """Nothing to fill."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        return strip_virtual_tokens(inner(*args, **kwargs), Insertion(self.length, None).remove)

    def per_example_tensors(self) -> tuple[Any, ...]:
        return ((StripPrompt, self.length),)


def place_prompts(
    model: nn.Module, targets: Sequence[str], embeddings: str, length: int, make: Callable[[PromptSite], Prompt]
) -> Iterator[tuple[str, Adapter]]:
    """Yield (host's name, adapter) of what lets virtual tokens into a model.

    They enter each transformers backbone, and the encoder of one with two halves, whose decoder then sees them; or the
    modules that ``targets`` name. A list of blocks, which nobody calls, they enter with its first and leave with its
    last.

    Args:
        model: Where to look.
        targets: Globs of modules that take and return (batch, tokens, features), or of lists of such blocks.
        embeddings: Glob of the input embeddings that belong to them; may be empty.
        length: Number of virtual tokens.
        make: Builds a prompt.

    Raises:
        ValueError: No backbone is found, or more than one table of embeddings.
        TypeError: A host embeds no tokens, or takes (tokens, batch, features).
    """
    if targets:
        table = _table(model, embeddings) if embeddings else None
        for name, host in select_modules(model, targets).items():
            _check_not_tokens_first(host, name)
            weight: Any = _first_weight(host, name) if table is None else table.weight
            if not isinstance(host, nn.ModuleList):
                yield name, make(PromptSite(host, weight, table, partial(prepend_to_embedded, first=names_of(host)[0])))
                continue
            yield (
                f"{name}.0",
                make(PromptSite(host[0], weight, table, partial(prepend_to_blocks, first=names_of(host[0])[0]))),
            )
            yield f"{name}.{len(host) - 1}", StripPrompt(length)
        return
    hosts = list(backbones(model))
    if not hosts:
        raise ValueError("No transformers backbone is found in the model; give the method targets.")
    for name, host in hosts:
        table = host.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            raise TypeError(f"{name or type(host).__name__} embeds no tokens; give the method targets.")
        if not is_encoder_decoder(host):
            yield name, make(PromptSite(host, table.weight, table, prepend_to_backbone))
            continue
        below = {module: below for below, module in host.named_modules(prefix=name)}
        encoder, decoder = host.get_encoder(), host.get_decoder()
        yield below[encoder], make(PromptSite(encoder, table.weight, table, partial(prepend_to_backbone, keep=True)))
        yield below[decoder], ExtendEncoderMask(decoder, length)


def check_sites(targets: Sequence[str], embeddings: str) -> None:
    """Raise a ``ValueError`` where embeddings are given for no targets."""
    check_setting(bool(targets) or not embeddings, "embeddings", embeddings, "given together with targets")


def _table(model: nn.Module, embeddings: str) -> nn.Module:
    (name, table), *others = select_modules(model, [embeddings]).items()
    if others:
        raise ValueError(f"embeddings={embeddings!r} names {name} and {others[0][0]}; give the glob of one.")
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
