"""``PTuning``, of "GPT Understands, Too", https://arxiv.org/abs/2103.10385."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from ..core.adapter import Adapter, parameter_like
from ..core.method import Method, check_setting
from .prompting.encoded_prompt import EncodedPrompt, fill_template
from .prompting.prompt import PromptSite
from .prompting.prompt_encoders import MLP, Encoder, LSTMThenMLP
from .prompting.prompt_sites import check_sites, place_prompts
from .prompting.template import PLACEHOLDER, Template


@dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """Trains pseudo tokens h_1..h_n through an encoder: h = MLP(BiLSTM(E)), E (n, features), two layers each.

    With a template, pseudo tokens stand between words and fields, which keep their embeddings; rows come from
    ``Template`` and have the id ``placeholder`` at these positions, the k-th of a row gets h_k. With a length, they
    stand before the first token, as with ``PromptTuning``. Only training needs the encoder: files contain only h.
    In an encoder-decoder model, pseudo tokens enter the encoder.
    Where a model reads more from the ids of its tokens than their embeddings (images, embeddings of each layer),
    virtual tokens are text there that says nothing, as padding; at injection it is measured which models do.

    Args:
        name: Name of the adapters on their hosts, and in files.
        length: Number of pseudo tokens in front of each row; give this or a template.
        template: Template of rows, such as ``[P:3] {subject} [P:3] {mask}``; see ``Template``.
        encoder: ``lstm``: as above. ``mlp``: h = MLP(E). ``none``: h = E, the form of a finalized adapter.
        hidden_size: Number of features between the encoder's layers, by default that of the embeddings. ``lstm``: of
            both directions together, which the authors set to features for LAMA, and to twice that for SuperGLUE; the
            MLP maps them to features. ``mlp``: of its hidden layer.
        dropout: Probability with which features between the layers of the LSTM are dropped in training.
        placeholder: Id of pseudo tokens in rows. The default collides with no vocabulary; options of ``generate``
            that look ids up, such as ``repetition_penalty``, need an id that the vocabulary has.
        targets: Globs of modules whose first input is (batch, tokens, features), or of lists of such blocks, for models
            that are not transformers', and for those that read images; with a length only.
        embeddings: Glob of the input embeddings that belong to ``targets``; may be left out.

    Raises:
        ValueError: The template cannot be read or has no pseudo token.

    Examples:
        >>> model = nn.ModuleDict({"block": nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)})
        >>> _ = lp.inject(model, lp.PTuning(length=5, targets=["block"]))
        >>> lp.summary(model).trainable, lp.summary(lp.finalize(model)).trainable  # with the LSTM, and 5 x 16 without
        (3952, 80)
    """

    name: str = "p_tuning"
    length: int | None = None
    template: str | None = None
    encoder: Literal["lstm", "mlp", "none"] = "lstm"
    hidden_size: int | None = None
    dropout: float = 0.0
    placeholder: int = PLACEHOLDER
    targets: list[str] = dataclasses.field(default_factory=list)
    embeddings: str = ""

    def __post_init__(self) -> None:
        length, hidden = self.length, self.hidden_size
        check_setting((length is None) != (self.template is None), "length", length, "given, or else a template")
        check_setting(
            length is None or isinstance(length, int) and length > 0, "length", length, "a positive whole number"
        )
        if self.template is not None:
            count = Template(self.template).pseudo_tokens
            check_setting(count > 0, "template", self.template, "one with pseudo tokens, such as [P:3]")
        check_setting(self.encoder in ("lstm", "mlp", "none"), "encoder", self.encoder, "'lstm', 'mlp' or 'none'")
        check_setting(hidden is None or hidden > 0, "hidden_size", hidden, "a positive whole number")
        check_setting(0 <= self.dropout < 1, "dropout", self.dropout, "from 0 to below 1")
        check_setting(
            not self.targets or self.template is None, "targets", self.targets, "absent where a template is given"
        )
        check_sites(self.targets, self.embeddings)
        check_setting(not self.dropout or self.encoder == "lstm", "dropout", self.dropout, "0 with this encoder")

    def finalized(self) -> PTuning:
        return dataclasses.replace(self, encoder="none", hidden_size=None, dropout=0.0)

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        for name, adapter in place_prompts(model, self.targets, self.embeddings, self._count, self._prompt):
            if self.template is None or isinstance(adapter, EncodedPrompt):  # with a template, decoders need no adapter
                yield name, adapter

    @property
    def _count(self) -> int:
        return self.length or Template(self.template or "").pseudo_tokens

    def _prompt(self, site: PromptSite) -> EncodedPrompt:
        weight, features = site.weight, site.weight.shape[1]
        hidden = self.hidden_size or features
        encoder: Encoder | None = None
        if self.encoder == "lstm":
            check_setting(
                hidden % 2 == 0, "hidden_size", hidden, "even, as half of it comes from each direction of the LSTM"
            )
            encoder = LSTMThenMLP(weight, features, hidden, self.dropout)
        elif self.encoder == "mlp":
            encoder = MLP(weight, features, hidden, features)
        prompt = parameter_like(weight, self._count, features)
        if self.template is None:
            return EncodedPrompt(site, prompt, encoder)
        fill = partial(fill_template, template=self.template, placeholder=self.placeholder, stand_in=site.stand_in)
        return EncodedPrompt(dataclasses.replace(site, insert=fill), prompt, encoder, self.placeholder)
