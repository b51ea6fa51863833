"""``finalize`` replaces encoders that only training needs by the vectors that they compute."""

from __future__ import annotations

import torch
from torch import nn

from .injection_record import adapters_of, require_record


def finalize(model: nn.Module) -> nn.Module:
    """Replace encoders that only training needs (of prefix tuning, P-tuning) by the tensors that they compute.

    The model computes the same, faster and with fewer parameters. It can be trained further in this form, with a new
    optimizer: an older one holds the parameters of the encoders. ``save_adapter`` writes this form in any case.

    Args:
        model: The module that was given to ``inject`` (with a Trainer: the LightningModule).

    Returns:
        The model; unchanged if no method has such an encoder.

    Raises:
        ValueError: Nothing was injected into this module.
        RuntimeError: The tensors of a finalized adapter are not those that its encoder computed.

    Examples:
        >>> model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        >>> _ = lp.inject(model, lp.PrefixTuning(length=5, targets=["self_attn"]))
        >>> lp.summary(model).trainable, lp.summary(lp.finalize(model)).trainable  # 5 keys and 5 values of 16 stay
        (25200, 160)
    """
    record = require_record(model)
    for method in record.methods:
        if method.finalized() == method:
            continue
        for name, adapter in adapters_of(model, method).items():
            before = {key: value.detach() for key, value in adapter.export_state().items()}
            adapter.finalize()
            after = adapter.state_dict()
            same = before.keys() == after.keys() and all(
                value.is_meta or torch.equal(value, after[key]) for key, value in before.items()
            )
            if not same:
                raise RuntimeError(f"{type(adapter).__name__} at {name} does not hold what its encoder computed.")
    record.finalize()
    return model
