"""``lists_of_token_blocks``: which lists of blocks virtual tokens can stand before; measured, for advice in errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...structure.roles import blocks
from ...structure.tracing.example_inputs import example_inputs
from ...structure.tracing.hollow_twin import hollow_twin, twin_runs


def lists_of_token_blocks(model: nn.Module) -> list[str]:
    """Return the names of lists whose blocks take any number of tokens (batch, tokens, features)."""
    names = dict.fromkeys(name.rpartition(".")[0] for name, block in blocks(model).items() if any(block.children()))
    lists = [name for name in names if isinstance(model.get_submodule(name), nn.ModuleList)]
    return [name for name in lists if _takes_more_tokens(model, name)]


def _takes_more_tokens(model: nn.Module, name: str) -> bool:
    """Return whether a forward of the model's twin succeeds with a token more before these blocks."""
    longer = list[int]()

    def add(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        longer.append(x.shape[1])
        if x.dim() != 3:
            raise ValueError
        return torch.cat([x[:, :1], x], 1), *args[1:]

    def strip(block: nn.Module, args: Any, output: Any) -> Any:
        return output[:, 1:] if isinstance(output, Tensor) else (output[0][:, 1:], *output[1:])

    try:
        with twin_runs(), torch.no_grad():
            if (inputs := example_inputs(model)) is None:
                return False
            twin = hollow_twin(model)
            layers: Any = twin.get_submodule(name)
            layers[0].register_forward_pre_hook(add)
            layers[-1].register_forward_hook(strip)
            twin(*inputs[0], **inputs[1])
    except Exception:
        return False
    return len(longer) == 1
