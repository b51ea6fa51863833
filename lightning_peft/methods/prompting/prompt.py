"""``Prompt``: adapters that insert virtual tokens; ``place_prompts`` finds the modules of a model that read them."""

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
from ...structure.layer_of import is_called_linear, layer_of
from ...structure.read_weights import read_weight_attribute
from ...structure.selection import select_modules
from ...structure.transformers_api import backbones, is_encoder_decoder
from .row_tasks import TaskAdapter
from .strip_outputs import strip_virtual_tokens
from .virtual_tokens import Insertion, names_of, prepend_to_backbone, prepend_to_blocks, prepend_to_embedded

Insert = Callable[..., Any]


@dataclass(frozen=True)
class PromptSite:
    """Module of a model that virtual tokens enter."""

    host: nn.Module
    weight: Tensor  # (any, features), for width, device and type
    table: nn.Module | None  # input embeddings of the model, if they are known
    insert: Insert  # (host, inner, arguments by name, virtual tokens) -> output, with the tokens inserted


class Prompt(BatchableModuleAdapter, TaskAdapter):
    """Adapter that inserts virtual tokens before the input of its host.

    Args:
        site: Host of the prompt.
        tasks: Number of tasks.
    """

    tensor_parallel_dims, unmergeable = {}, "virtual tokens are no weight"
    plot_tensors = {"tokens": "prompt"}

    def __init__(self, site: PromptSite, tasks: int) -> None:
        super().__init__(tasks)
        self.insert, self.names = site.insert, names_of(site.host)

    @abstractmethod
    def virtual(self, rows: int) -> Tensor:
        """Return the virtual tokens (length, features), or (rows, length, features) where each row has a task."""

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
                raise ValueError(f"row_adapters was given {len(prompts)} names; {rows} rows are no multiple of that.")
            return prompts.repeat_interleave(rows // len(prompts), 0)

        return self._call_with(virtual, host, inner, *args, **kwargs)

    def _call_with(self, virtual: Callable[[int], Tensor], host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        inputs = call.get("inputs_embeds")
        inputs = call.get(self.names[0]) if inputs is None else inputs
        if inputs is None:
            return inner(**call)  # the host raises for the missing argument
        return self.insert(host, inner, call, virtual(len(inputs)))


class ExtendEncoderMask(BatchableAdapter, Adapter):
    """Lets a decoder's cross-attention see the virtual tokens in the encoder's output; has no parameters."""

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
    """Removes the virtual tokens from the output of the last of several blocks; has no parameters."""

    tensor_parallel_dims, part = {}, "end"  # with a single block, the prompt is on the same host

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
        ValueError: No backbone is found, or more than one module of embeddings.
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
            insert = partial(prepend_to_blocks, first=names_of(host[0])[0])
            yield f"{name}.0", make(PromptSite(host[0], weight, table, insert))
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
        name_of = {module: path for path, module in host.named_modules(prefix=name)}
        encoder, decoder = host.get_encoder(), host.get_decoder()
        yield name_of[encoder], make(PromptSite(encoder, table.weight, table, partial(prepend_to_backbone, keep=True)))
        yield name_of[decoder], ExtendEncoderMask(decoder, length)


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
