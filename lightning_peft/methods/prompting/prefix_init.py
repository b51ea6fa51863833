"""``init_from_text``: prefixes that start as the keys and values which the model computes for a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapter import Adapter, Call
from ...core.eval_mode import evaluating
from ...core.method import check_setting
from ...structure.attention.calls import AttentionCalls
from ...structure.transformers_api import backbones, is_encoder_decoder
from .prefix import Prefix
from .virtual_tokens import names_of

STEPS, LEARNING_RATE = 500, 1e-4  # of the fit, as in the authors' code


def init_from_text(model: nn.Module, adapters: Sequence[tuple[str, Adapter]], ids: Sequence[int]) -> None:
    """Set prefixes to the keys and values that attention modules compute for the tokens of a text.

    A perceptron is fitted to them: mean squared error, Adam, ``STEPS`` steps, no randomness but that of its start.

    Args:
        model: Model with a transformers backbone and its weights.
        adapters: (host's name, adapter) of prefixes and of their shared encoder.
        ids: Ids of as many tokens as the prefixes are long.

    Raises:
        ValueError: The model has no values yet, reads no tokens, or does not call an attention module.
    """
    by_name = {name: adapter for name, adapter in adapters if isinstance(adapter, Prefix)}
    check_setting(
        not any(p.is_meta for p in model.parameters()), "init", "text", "'random' while the model is on the meta device"
    )
    computed = _keys_and_values(model, list(by_name), ids)
    expected = {name: _as_prefix(computed[name], prefix) for name, prefix in by_name.items()}
    trained = list({id(p): p for _, adapter in adapters for p in adapter.parameters()}.values())
    if not any(prefix.projection for prefix in by_name.values()):
        with torch.no_grad():
            for name, prefix in by_name.items():
                prefix.key.copy_(expected[name][0])
                prefix.value.copy_(expected[name][1])
        return
    with torch.enable_grad():
        optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            errors = [
                F.mse_loss(torch.cat(prefix.key_value(), 1), torch.cat(expected[name], 1))
                for name, prefix in by_name.items()
            ]
            torch.autograd.backward(torch.stack(errors).mean())
            optimizer.step()
        optimizer.zero_grad()


def _keys_and_values(model: nn.Module, names: Sequence[str], ids: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return keys and values (heads, tokens, size) of attention modules by name."""
    computed: dict[str, tuple[Tensor, Tensor]] = {}
    entered: list[str] = []

    def record(attend: Call, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any) -> Any:
        if entered:
            computed[entered[-1]] = key[0], value[0]
        return attend(query, key, value, *rest, **settings)

    calls = AttentionCalls(record)
    with torch.no_grad(), evaluating(model), _record_entered(model, names, entered, calls), calls:
        for name, host in backbones(model):
            check_setting(
                "input_ids" in names_of(host), "init", "text", f"'random', as {name or 'the model'} reads no tokens"
            )
            row = torch.tensor([ids], device=next(host.parameters()).device)
            host(input_ids=row, **({"decoder_input_ids": row} if is_encoder_decoder(host) else {}))
    missing = [name for name in names if name not in computed]
    check_setting(not missing, "init", "text", f"'random', since no transformers backbone calls {missing[:3]}")
    return computed


def _as_prefix(pair: tuple[Tensor, Tensor], prefix: Prefix) -> tuple[Tensor, Tensor]:
    """Reshape (heads, tokens, size) to (tokens, width), with one head of each group that the caller repeated."""
    key, value = (
        x[:: len(x) * x.shape[-1] // width].transpose(0, 1).flatten(1).to(torch.promote_types(x.dtype, torch.float32))
        for x, width in zip(pair, prefix.widths, strict=True)
    )
    return key, value


@contextmanager
def _record_entered(
    model: nn.Module, names: Sequence[str], entered: list[str], calls: AttentionCalls
) -> Iterator[None]:
    """Context in which the name of each of these modules is appended to ``entered`` when it is called."""

    def append(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            entered.append(name)
            calls.start(module)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(append(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
