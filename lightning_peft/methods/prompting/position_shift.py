"""``ShiftedPositions`` moves the positions of tokens by the length of a prefix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...core.adapter import Adapter, Call
from ...structure.cached_tokens import cached_tokens
from ...structure.transformers_api import backbones, from_config, is_encoder_decoder
from .virtual_tokens import names_of


class ShiftedPositions(Adapter):
    """Calls a backbone with ``position_ids + length``; has no parameters.

    Without ``position_ids``, positions are counted from the number of tokens in the cache.

    Args:
        host: Backbone.
        length: Number that is added to positions.
    """

    part, unmergeable = "positions", "positions are no weight"

    def __init__(self, host: nn.Module, length: int) -> None:
        super().__init__()
        self.length, self.names, self.computes_positions = length, names_of(host), _computes_positions(host)

    def reset_parameters(self) -> None:
        """Nothing to fill."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        positions = call.get("position_ids")
        if positions is None:
            if self.computes_positions:
                raise ValueError(
                    f"{type(host).__name__} computes positions by a rule of its own; give it position_ids, "
                    f"to which shift_positions then adds {self.length}."
                )
            tokens = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
            positions = (torch.arange(tokens.shape[1], device=tokens.device) + cached_tokens(host, call))[None]
        call["position_ids"] = positions + self.length
        return inner(**call)


def shifted_positions(model: nn.Module, length: int, method: str) -> Iterator[tuple[str, Adapter]]:
    """Yield (host's name, adapter) for the backbones of a model.

    Raises:
        TypeError: The model has no backbone, or one that does not take positions.
    """
    hosts = list(backbones(model))
    for name, host in hosts:
        by_distance = is_encoder_decoder(host) or from_config(host, "alibi")
        if "position_ids" not in names_of(host) or by_distance:
            raise TypeError(
                f"{name or 'The model'} ({type(host).__name__}) takes no position_ids, since it derives positions or "
                f"distances from its inputs; use {method}(shift_positions=False)."
            )
        yield name, ShiftedPositions(host, length)
    if not hosts:
        raise TypeError(f"No transformers backbone is found in the model; use {method}(shift_positions=False).")


def _computes_positions(host: nn.Module) -> bool:
    """Return whether a backbone computes positions from padding too (RoBERTa, OPT), not from the index alone."""
    tables = [m for n, m in host.named_modules() if isinstance(m, nn.Embedding) and "position" in n.rpartition(".")[2]]
    return any(type(table) is not nn.Embedding or table.padding_idx is not None for table in tables)
