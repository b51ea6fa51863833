"""``EncodedPrompt``: virtual tokens computed by an encoder, in front of a row or in place of its placeholders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapter import Call
from ...ops.kept_result import KeptResult
from ...ops.value_checks import is_true, reading_is_free
from ...structure.cached_tokens import cached_tokens
from .embedded_calls import call_with_ids, embedded
from .prompt import Prompt, PromptSite
from .prompt_encoders import Encoder


class EncodedPrompt(Prompt):
    """Virtual tokens h = encoder(E).

    Args:
        site: Host of the prompt.
        prompt: E (n, features).
        encoder: Called with E and the training mode; None for h = E.
        placeholder: Id of the tokens that they replace in a row; None where they stand in front of it.
    """

    def __init__(
        self, site: PromptSite, prompt: nn.Parameter, encoder: Encoder | None, placeholder: int | None = None
    ) -> None:
        super().__init__(site, 1)
        self.prompt, self.encoder, self.placeholder, self.encoded = prompt, encoder, placeholder, KeptResult()
        nn.init.normal_(prompt)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prompt)
        if self.encoder is not None:
            self.encoder.reset_parameters()

    def virtual(self, rows: int) -> Tensor:
        if self.encoder is None or self.training or torch.is_grad_enabled():
            return self._vectors(self.training)
        inputs = (self.prompt, *self.encoder.parameters())
        return self.encoded.get((), inputs, partial(self._vectors, False))

    def per_example_tensors(self) -> tuple[Any, ...]:
        return super().per_example_tensors() if self.placeholder is None else ()

    @torch.no_grad()  # without gradients, the LSTM computes the same bits as in evaluation
    def export_state(self) -> dict[str, Tensor]:
        return {"prompt": self._vectors(train=False)}

    def finalize(self) -> None:
        self.prompt, self.encoder = nn.Parameter(self.export_state()["prompt"].detach().clone()), None

    def _vectors(self, train: bool) -> Tensor:
        """Return h (n, features)."""
        h: Tensor = self.prompt if self.encoder is None else self.encoder(self.prompt, train)
        return h


def fill_template(
    host: Any,
    inner: Call,
    call: Mapping[str, Any],
    virtual: Callable[[], Tensor],
    length: int,
    template: str,
    placeholder: int,
    stand_in: int | None = None,
) -> Any:
    """Call a backbone with vectors in place of the placeholders of each row; other tokens keep their embeddings.

    Args:
        host: Module that takes ``input_ids`` or ``inputs_embeds``.
        inner: Call of the host without the adapter.
        call: Arguments by name.
        virtual: Computes vectors (n, features); the k-th placeholder of a row gets the k-th.
        length: Their number n.
        template: Template of the rows, for messages.
        placeholder: Id of a pseudo token.
        stand_in: Id in its place for a host that needs ``input_ids``; None where embeddings tell it all.

    Raises:
        ValueError: A row has another number of placeholders than n; a continued row, with a cache, can have none.
    """
    call = dict(call)
    ids = call.get("input_ids")
    if ids is None:
        raise ValueError(f"The template {template!r} needs input_ids, got rows that are embedded already.")
    is_placeholder = ids == placeholder
    cached = cached_tokens(host, call)
    continued = cached is None or cached > 0
    if continued and reading_is_free(ids) and not is_placeholder.any():
        return inner(**call)
    counts = is_placeholder.sum(1)
    valid = (counts == length) | (counts == 0 if continued else counts < 0)
    advice = f"template {template!r} has {length} pseudo tokens; build rows with lightning_peft.Template."
    if not is_true(valid.all(), f"A row has another number of placeholders, but the {advice}"):
        wrong = int(counts[~valid][0])
        raise ValueError(f"A row has {wrong} placeholders (id {placeholder}), but the {advice}")
    index, prompt = (is_placeholder.cumsum(1) - 1).clamp(0, length - 1), virtual()

    def fill(tokens: Tensor) -> Tensor:
        return torch.where(is_placeholder[..., None], F.embedding(index, prompt).to(tokens.dtype), tokens)

    if stand_in is not None:
        call["input_ids"] = ids.masked_fill(is_placeholder, stand_in)
        return call_with_ids(host, inner, call, fill)
    call["inputs_embeds"] = fill(embedded(host, call, is_placeholder))
    return inner(**call)
