"""Virtual tokens that an encoder computes, in front of a row or in place of its placeholders."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Adapter, Call
from .encoders import Encoder
from .virtual_tokens import names_of, surround


class EncodedPrompt(Adapter):
    """Virtual tokens h = encoder(E) in front of each row of a transformers backbone.

    Args:
        host: Backbone.
        prompt: E (n, features).
        encoder: Called with E and whether it trains; None where h = E.
    """

    def __init__(self, host: nn.Module, prompt: nn.Parameter, encoder: Encoder | None) -> None:
        super().__init__()
        self.prompt, self.encoder, self.names = prompt, encoder, names_of(host)
        nn.init.normal_(prompt)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prompt)
        if self.encoder is not None:
            self.encoder.reset_parameters()

    def vectors(self, train: bool) -> Tensor:
        """Return h (n, features)."""
        h: Tensor = self.prompt if self.encoder is None else self.encoder(self.prompt, train)
        return h

    def pack(self) -> dict[str, Tensor]:
        return {"prompt": self.vectors(train=False)}

    def finalize(self) -> None:
        self.prompt, self.encoder = nn.Parameter(self.pack()["prompt"].detach().clone()), None

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        return surround(host, inner, call, self.vectors(self.training))


class TemplatePrompt(EncodedPrompt):
    """Vectors h in place of the placeholders of each row.

    Args:
        template: What rows look like, for messages.
        placeholder: Id of a pseudo token.
    """

    def __init__(
        self, host: nn.Module, prompt: nn.Parameter, encoder: Encoder | None, template: str, placeholder: int
    ) -> None:
        super().__init__(host, prompt, encoder)
        self.template, self.placeholder = template, placeholder

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        ids, past = call.pop("input_ids", None), call.get("past_key_values")
        if ids is None:
            raise ValueError(f"The template {self.template!r} needs input_ids, got rows that are embedded already.")
        here = ids == self.placeholder
        self._check(here.sum(1), started=past is not None and past.get_seq_length() > 0)
        tokens = host.get_input_embeddings()(ids.masked_fill(here, 0))
        index = (here.cumsum(1) - 1).clamp(0, len(self.prompt) - 1)
        vectors = F.embedding(index, self.vectors(self.training)).to(tokens.dtype)
        call["inputs_embeds"] = torch.where(here[..., None], vectors, tokens)
        return inner(**call)

    def _check(self, counts: Tensor, started: bool) -> None:
        """Raise unless each row has all pseudo tokens, or none while a row is being continued."""
        expected, advice = len(self.prompt), "build rows with lightning_peft.Template"
        right = (counts == expected) | (counts == 0 if started else counts < 0)
        if torch.compiler.is_compiling():  # reading a value would leave the graph
            torch._assert_async(right.all(), f"Rows lack placeholders of the template {self.template!r}; {advice}.")
            return
        wrong = counts[~right].tolist()
        if wrong:
            raise ValueError(
                f"A row has {wrong[0]} placeholders (id {self.placeholder}), but the template {self.template!r} has "
                f"{expected} pseudo tokens; {advice}."
            )
