"""``PrefixFormat``: ``prompt_embeddings`` is (length, layers * 2 * width), P_k and P_v of each layer in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..core.adapter import Adapter
from ..methods import PrefixTuning
from ..methods.prompting.prefix import Prefix
from ..ops.sharded_tensors import full_tensor
from ..structure.selection import select_modules
from ..structure.transformers_api import is_encoder_decoder
from .peft_format import Base, PeftFile, PeftFormat, StateDict, check_supported
from .prompts import VIRTUAL

_PREFIXES = "prompt_embeddings"


class PrefixFormat(PeftFormat):
    """HF PEFT puts prefixes into a key-value cache, so that positions move on: ``shift_positions=True``."""

    kind, method, tensors, prefix = "PREFIX_TUNING", PrefixTuning, (_PREFIXES,), "base_model."
    by_task = True
    settings = (*VIRTUAL, "modules_to_save")
    ignored_settings = ("encoder_hidden_size", "prefix_projection", "init_weights")

    def to_peft(
        self, base: Base, method: PrefixTuning, hosts: Mapping[str, Sequence[Adapter]]
    ) -> tuple[dict[str, Any], StateDict]:
        _check_not_encoder_decoder(base)
        heads = _heads(base)
        check_supported(
            not method.shift_positions, "shift_positions=False", "its cache moves positions on by the length"
        )
        prefixes = [adapter for adapters in hosts.values() for adapter in adapters if isinstance(adapter, Prefix)]
        layers = len(select_modules(base.network, ["attention"]))
        check_supported(
            len(prefixes) != layers, f"A prefix for {len(prefixes)} of {layers} layers", "its bank has all of them"
        )
        check_supported(
            len({prefix.widths for prefix in prefixes}) > 1, "Layers of different widths", "its bank has one for all"
        )
        keys_and_values = [full_tensor(x).detach() for prefix in prefixes for x in prefix.key_value()]
        length, width = keys_and_values[0].shape
        settings = {
            "num_virtual_tokens": length,
            "num_layers": layers,
            "num_attention_heads": heads,
            "token_dim": width,
            "num_transformer_submodules": 1,
            "prefix_projection": False,
        }
        return settings, {_PREFIXES: torch.cat(keys_and_values, 1)}

    def from_peft(
        self, base: Base, file: PeftFile, name: str
    ) -> Iterator[tuple[PrefixTuning, Mapping[str, StateDict]]]:
        _check_not_encoder_decoder(base)
        _heads(base)
        bank = file.state[""][_PREFIXES]
        method = PrefixTuning(name=name, length=len(bank), reparameterize=False, shift_positions=True)
        hosts = [host for host, adapter in method.adapters(base.model) if isinstance(adapter, Prefix)]
        if bank.shape[1] % (2 * len(hosts)):
            raise ValueError(f"{_PREFIXES} {tuple(bank.shape)} holds no keys and values of {len(hosts)} layers.")
        keys_and_values = bank.chunk(2 * len(hosts), 1)
        pairs = zip(keys_and_values[::2], keys_and_values[1::2], strict=True)
        yield method, {host: {"key": k, "value": v} for host, (k, v) in zip(hosts, pairs, strict=True)}


def _check_not_encoder_decoder(base: Base) -> None:
    check_supported(
        is_encoder_decoder(base.network),
        "A prefix for an encoder-decoder model",
        "it prefixes the decoder's own attention alone",
    )


def _heads(base: Base) -> int:
    """Return the number of heads with keys of their own, of a model with one stack of layers."""
    config: Any = base.network.config
    heads: Any = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    check_supported(
        not heads, f"A prefix for {type(base.network).__name__}", "its bank is for one stack of layers, not for several"
    )
    return int(heads)
