"""Positions of tokens that follow a prefix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...core.adapter import Adapter, Call
from ...structure.transformers_api import backbones, cached_tokens, from_config, is_encoder_decoder
from .virtual_tokens import names_of


class ShiftedPositions(Adapter):
    """Calls a backbone with ``position_ids + length``; trains nothing.

    Positions that are not given are those of the tokens, after what a cache holds.

    Args:
        host: Backbone.
        length: By how much positions move on.
    """

    part, unmergeable = "positions", "positions are no weight"

    def __init__(self, host: nn.Module, length: int) -> None:
        super().__init__()
        self.length, self.names, self.own_rule = length, names_of(host), _own_rule(host)

    def reset_parameters(self) -> None:
        """Nothing to fill."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        positions = call.get("position_ids")
        if positions is None:
            if self.own_rule:
                raise ValueError(
                    f"{type(host).__name__} computes positions by a rule of its own; give it position_ids, "
                    f"which shift_positions then moves on by {self.length}."
                )
            tokens = call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]
            positions = (torch.arange(tokens.shape[1], device=tokens.device) + cached_tokens(host, call))[None]
        call["position_ids"] = positions + self.length
        return inner(**call)


def shifted_positions(model: nn.Module, length: int, method: str) -> Iterator[tuple[str, Adapter]]:
    """Yield (host's name, adapter) for the backbones of a model.

    Raises:
        TypeError: There is none, or it does not take positions.
    """
    found = list(backbones(model))
    for name, host in found:
        by_distance = is_encoder_decoder(host) or from_config(host, "alibi")
        if "position_ids" not in names_of(host) or by_distance:
            raise TypeError(
                f"{name or 'The model'} ({type(host).__name__}) takes no position_ids, since it derives positions or "
                f"distances from its inputs; use {method}(shift_positions=False)."
            )
        yield name, ShiftedPositions(host, length)
    if not found:
        raise TypeError(f"No transformers backbone is found in the model; use {method}(shift_positions=False).")


def _own_rule(host: nn.Module) -> bool:
    """Whether positions depend on more than a token's place: on padding (RoBERTa, OPT)."""
    tables = [m for n, m in host.named_modules() if isinstance(m, nn.Embedding) and "position" in n.rpartition(".")[2]]
    return any(type(table) is not nn.Embedding or table.padding_idx is not None for table in tables)
