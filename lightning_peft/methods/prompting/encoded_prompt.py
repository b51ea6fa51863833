"""Virtual tokens that an encoder computes, in front of a row or in place of its placeholders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapter import Call
from ...structure.transformers_api import cached_tokens
from .prompt import Prompt, PromptSite
from .prompt_encoders import Encoder
from .virtual_tokens import embedded


class EncodedPrompt(Prompt):
    """Virtual tokens h = encoder(E).

    Args:
        place: Where they enter.
        prompt: E (n, features).
        encoder: Called with E and whether it trains; None where h = E.
        placeholder: Id of the places that they take in a row; None where they stand in front.
    """

    def __init__(
        self, place: PromptSite, prompt: nn.Parameter, encoder: Encoder | None, placeholder: int | None = None
    ) -> None:
        super().__init__(place, 1)
        self.prompt, self.encoder, self.placeholder = prompt, encoder, placeholder
        nn.init.normal_(prompt)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prompt)
        if self.encoder is not None:
            self.encoder.reset_parameters()

    def virtual(self, rows: int) -> Tensor:
        return self._vectors(self.training)

    def per_example_tensors(self) -> tuple[Any, ...]:
        return super().per_example_tensors() if self.placeholder is None else ()

    @torch.no_grad()  # in which the LSTM is computed as in evaluation, to the last bit
    def export_state(self) -> dict[str, Tensor]:
        return {"prompt": self._vectors(train=False)}

    def finalize(self) -> None:
        self.prompt, self.encoder = nn.Parameter(self.export_state()["prompt"].detach().clone()), None

    def _vectors(self, train: bool) -> Tensor:
        """Return h (n, features)."""
        h: Tensor = self.prompt if self.encoder is None else self.encoder(self.prompt, train)
        return h


def fill_template(
    host: Any, inner: Call, call: Mapping[str, Any], prompt: Tensor, template: str, placeholder: int
) -> Any:
    """Call a backbone with vectors in place of the placeholders of each row; all other tokens stay what they are.

    Args:
        host: Module that takes ``input_ids`` or ``inputs_embeds``.
        inner: The host's own call.
        call: Arguments by name.
        prompt: Vectors (n, features); the k-th placeholder of a row gets the k-th.
        template: What rows look like, for messages.
        placeholder: Id of a pseudo token.

    Raises:
        ValueError: A row has another number of placeholders than n; while a row is continued it may have none.
    """
    call = dict(call)
    ids = call.get("input_ids")
    if ids is None:
        raise ValueError(f"The template {template!r} needs input_ids, got rows that are embedded already.")
    here = ids == placeholder
    continued = cached_tokens(host, call) > 0
    counts = here.sum(1)
    right = (counts == len(prompt)) | (counts == 0 if continued else counts < 0)
    advice = f"template {template!r} has {len(prompt)} pseudo tokens; build rows with lightning_peft.Template."
    if torch.compiler.is_compiling():  # reading a value would leave the graph
        torch._assert_async(right.all(), f"A row has another number of placeholders, but the {advice}")
    elif wrong := counts[~right].tolist():
        raise ValueError(f"A row has {wrong[0]} placeholders (id {placeholder}), but the {advice}")
    tokens = embedded(host, call, here)
    index = (here.cumsum(1) - 1).clamp(0, len(prompt) - 1)
    call["inputs_embeds"] = torch.where(here[..., None], F.embedding(index, prompt).to(tokens.dtype), tokens)
    return inner(**call)
