"""``probe_backbone``: whether virtual tokens can enter a backbone, and whether it needs ids; measured on a hollow twin.

Virtual tokens with the embeddings of some tokens must do what these tokens do. Where they do not, the backbone reads
more from ids than embeddings tell (embeddings of its own for each layer, positions, grids of images), and virtual
tokens get an id as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...structure.token_arguments import plain_ids
from ...structure.tracing.hollow_twin import twin_runs
from ...structure.transformers_api import from_config, has_input_embeddings, input_embeddings
from .backbone_call import prepend_to_backbone
from .mixing_twin import mixing_twin
from .virtual_tokens import Insertion, names_of

_ROWS, _TOKENS, _PADDING, _LENGTH = 3, 6, 2, 2


def probe_backbone(name: str, host: Any, keep: bool) -> int | None:
    """Return the id of virtual tokens among ``input_ids``; None where the backbone needs no ids.

    Args:
        name: Name of the backbone, for messages.
        host: Backbone with input embeddings.
        keep: Whether its output keeps the virtual tokens.

    Raises:
        TypeError: Virtual tokens do not what tokens do.
    """
    names = names_of(host)
    with twin_runs():
        try:
            probe = _Probe.of(host, names, keep)
        except Exception:  # it needs more than text, or cannot be copied; ids tell it all
            return int(_plain_ids(host)[0]) if "input_ids" in names else None
        embeddings_suffice = "inputs_embeds" in names and not probe.tables and not _is_composite(host)
        if embeddings_suffice and not probe.difference(None):
            return None
        # With tables for each layer, the id that such models give to what is no word, as images.
        stand_in = (from_config(host, "pad_token_id") or 0) if probe.tables else int(_plain_ids(host)[0])
        if difference := probe.difference(stand_in):
            raise TypeError(
                f"Virtual tokens cannot stand before the tokens of {name or 'the model'}: {type(host).__name__} "
                f"{difference}. Use PrefixTuning or LoRA, or give the method targets."
            )
    return stand_in


@dataclass(frozen=True)
class _Probe:
    """A call of a backbone's twin, and what it returns for a longer one with two tokens more.

    Args:
        twin: The twin.
        call: Arguments by name.
        virtual: Embeddings of the two tokens.
        output: Output of the longer call.
        where: Where the two tokens stand.
        tables: Whether embeddings besides the input embeddings read the ids.
        keep: Whether the output keeps the two tokens.
    """

    twin: Any
    call: dict[str, Any]
    virtual: Tensor
    output: Any
    where: Insertion
    tables: bool
    keep: bool

    @classmethod
    def of(cls, host: Any, names: list[str], keep: bool) -> _Probe:
        """Return the probe of a host; raises what its forward raises."""
        plain, twin = _plain_ids(host), mixing_twin(host)
        call = _example(host, names, plain)
        mask, two = call.get("attention_mask"), plain[-_LENGTH:]
        where = Insertion(len(two), mask)
        longer = call | {"input_ids": where.insert(two.expand(_ROWS, -1), call["input_ids"])}
        if mask is not None:
            longer["attention_mask"] = where.mask(mask)
        with _tables_that_read(twin, longer["input_ids"]) as tables:
            output = _run(lambda: twin(**longer))
        return cls(twin, call, input_embeddings(twin)(two), output, where, bool(tables), keep)  # type: ignore[misc]

    def difference(self, stand_in: int | None) -> str:
        """Return what is wrong about the output for virtual tokens; empty where nothing is."""
        twin, mask = self.twin, self.call.get("attention_mask")
        try:
            virtual, length = (lambda: self.virtual), self.virtual.shape[0]
            found = _run(lambda: prepend_to_backbone(twin, twin, self.call, virtual, length, self.keep, stand_in))
        except Exception as error:
            return f"fails with them ({type(error).__name__}: {error})"
        hidden, expected = _hidden(found), _hidden(self.output)
        expected = expected if self.keep else self.where.remove(expected)
        if hidden.shape != expected.shape:
            return f"returns {tuple(hidden.shape)} where {tuple(expected.shape)} is expected"
        pools, pooled = (out.get("pooler_output") if isinstance(out, Mapping) else None for out in (found, self.output))
        if isinstance(pools, Tensor) and isinstance(pooled, Tensor) and pools.shape != pooled.shape:
            return f"pools {tuple(pools.shape)} where {tuple(pooled.shape)} is expected"
        if mask is not None:
            kept = (self.where.mask(mask) if self.keep else mask).bool()
            hidden, expected = hidden[kept], expected[kept]
        same = self.tables or torch.allclose(hidden, expected, 1e-4, 1e-4, equal_nan=True)
        return "" if same else "does not treat them as tokens of the same embeddings, since it also reads ids"


def _plain_ids(host: Any) -> Tensor:
    """Return ids of which none marks padding, an image or an end."""
    table: Any = input_embeddings(host)
    return plain_ids(host.config, table.weight.shape[0])


def _example(host: Any, names: list[str], plain: Tensor) -> dict[str, Any]:
    """Return a call with a row of tokens, one that ends in padding and one that begins with it."""
    chosen = torch.arange(_ROWS * _TOKENS).mul(7) % len(plain)
    ids, mask = plain[chosen].view(_ROWS, _TOKENS), torch.ones(_ROWS, _TOKENS, dtype=torch.long)
    call: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    padding = from_config(host, "pad_token_id")
    if "attention_mask" in names:
        mask[1, -_PADDING:] = mask[2, :_PADDING] = 0
        call["attention_mask"] = mask
        if padding is not None and 0 <= padding < len(plain):
            ids = ids.where(mask.bool(), padding)
    return call | {"input_ids": ids}


def _run(call: Callable[[], Any]) -> Any:
    """Return the output of a call; what is random in it is the same in each run."""
    with torch.no_grad():
        torch.manual_seed(0)
        return call()


def _hidden(output: Any) -> Tensor:
    """Return the last hidden states."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _is_composite(host: nn.Module) -> bool:
    """Return whether a model inside embeds no tokens: images or sound may stand between those of the host."""
    inside = (part for part in host.modules() if part is not host and has_input_embeddings(part))
    return any(not isinstance(input_embeddings(part), nn.Embedding) for part in inside)


@contextmanager
def _tables_that_read(twin: nn.Module, ids: Tensor) -> Iterator[list[nn.Module]]:
    """Context that collects the embeddings, besides the input embeddings, that look the ids up."""
    found: list[nn.Module] = []

    def look(table: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and torch.equal(args[0], ids):
            found.append(table)

    inputs: Any = input_embeddings(twin)
    tables = [x for x in twin.modules() if isinstance(x, nn.Embedding) and x.weight is not inputs.weight]
    handles = [table.register_forward_hook(look) for table in tables]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
