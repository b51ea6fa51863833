"""P-tuning, of "GPT Understands, Too", https://arxiv.org/abs/2103.10385."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..adapter import Adapter, parameter_like
from ..encoders import MLP, Encoder, LSTMThenMLP
from ..method import Method, require
from ..pseudo_tokens import EncodedPrompt, TemplatePrompt
from ..templates import PLACEHOLDER, Template
from ..virtual_tokens import backbones


@dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """Trains pseudo tokens h_1..h_n through an encoder: h = MLP(BiLSTM(E)), E (n, features), two layers each.

    With a template they stand where it says, between words and fields that keep their own embeddings; rows come from
    ``Template`` and hold the id ``placeholder`` at these places, the k-th of a row gets h_k. With a length they stand
    before the first token, as with ``PromptTuning``. Only training needs the encoder: files hold h alone.
    In an encoder-decoder model they enter the encoder.

    Args:
        name: Name of the adapters on their hosts, and in files.
        length: Number of pseudo tokens in front of each row; give this or a template.
        template: What rows look like, such as ``[P:3] {subject} [P:3] {mask}``; see ``Template``.
        encoder: ``lstm``: as above. ``mlp``: h = MLP(E). ``none``: h = E, which a trained encoder gives way to.
        hidden_size: Features between the encoder's parts, by default those of the embeddings. ``lstm``: of both
            directions together, which the authors set to features for LAMA, and to twice that for SuperGLUE; the
            MLP maps them to features. ``mlp``: of its hidden layer.
        dropout: Probability with which features between the layers of the LSTM are dropped in training.
        placeholder: Id of pseudo tokens in rows; the default collides with no vocabulary.

    Raises:
        ValueError: The template cannot be read or has no pseudo token.
    """

    name: str = "p_tuning"
    length: int | None = None
    template: str | None = None
    encoder: Literal["lstm", "mlp", "none"] = "lstm"
    hidden_size: int | None = None
    dropout: float = 0.0
    placeholder: int = PLACEHOLDER

    def __post_init__(self) -> None:
        length, hidden = self.length, self.hidden_size
        require((length is None) != (self.template is None), "length", length, "given, or else a template")
        require(length is None or isinstance(length, int) and length > 0, "length", length, "a positive whole number")
        if self.template is not None:
            count = Template(self.template).pseudo_tokens
            require(count > 0, "template", self.template, "one with pseudo tokens, such as [P:3]")
        require(self.encoder in ("lstm", "mlp", "none"), "encoder", self.encoder, "'lstm', 'mlp' or 'none'")
        require(hidden is None or hidden > 0 and hidden % 2 == 0, "hidden_size", hidden, "a positive even number")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "from 0 to below 1")
        require(not self.dropout or self.encoder == "lstm", "dropout", self.dropout, "0 with this encoder")

    def finalized(self) -> PTuning:
        return dataclasses.replace(self, encoder="none", hidden_size=None, dropout=0.0)

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        hosts = list(backbones(model))
        if not hosts:
            raise ValueError("No transformers backbone is found in the model, and PTuning needs one.")
        for name, host in hosts:
            table = host.get_input_embeddings()
            if not isinstance(table, nn.Embedding):
                raise TypeError(f"{name or type(host).__name__} embeds no tokens, which PTuning needs.")
            if not getattr(host.config, "is_encoder_decoder", False):
                yield name, self._prompt(host, table.weight)
                continue
            below = {module: below for below, module in host.named_modules(prefix=name)}
            yield below[host.get_encoder()], self._prompt(host.get_encoder(), table.weight)

    def _prompt(self, host: nn.Module, weight: Tensor) -> EncodedPrompt:
        """Return the adapter of a host whose tokens have such embeddings."""
        features = weight.shape[1]
        hidden = self.hidden_size or features
        encoder: Encoder | None = None
        if self.encoder == "lstm":
            encoder = LSTMThenMLP(weight, features, hidden, self.dropout)
        elif self.encoder == "mlp":
            encoder = MLP(weight, features, hidden, features)
        if self.template is None:
            return EncodedPrompt(host, parameter_like(weight, self.length or 0, features), encoder)
        count = Template(self.template).pseudo_tokens
        prompt = parameter_like(weight, count, features)
        return TemplatePrompt(host, prompt, encoder, self.template, self.placeholder)
