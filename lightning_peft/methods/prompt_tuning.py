"""The Power of Scale for Parameter-Efficient Prompt Tuning, https://arxiv.org/abs/2104.08691."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Call, parameter_like
from ..method import Method, require
from ..select import select
from ..virtual_tokens import Insertion, backbones, names_of, surround
from ..words import token_ids


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Trains virtual tokens P (length, features) in front of the input embeddings: the model reads [P; x].

    They stand before the first token of each row that is no padding, left or right; outputs, labels and generation
    see the positions of x alone. In an encoder-decoder model they enter the encoder, and cross-attention sees them.

    Args:
        name: Name of the adapters on their hosts, and in files.
        length: Number of virtual tokens; the paper's largest models need few, its default is 100.
        init: ``random``: uniform in [-0.5, 0.5]. ``vocabulary``: rows of the first 5,000 tokens of the
            vocabulary, which tokenizers order by frequency. ``text``: the embeddings of ``init_text``, repeated
            or cut to the length.
        init_text: A text that says what the task is.
        tokenizer: Folder or name of the tokenizer for ``init_text``; that of the model if not given.
        targets: Globs of modules whose first input is (batch, tokens, features), for models that are not transformers'.
        embeddings: Glob of the input embeddings that belong to ``targets``.
    """

    name: str = "prompt_tuning"
    length: int = 100
    init: Literal["random", "vocabulary", "text"] = "random"
    init_text: str = ""
    tokenizer: str = ""
    targets: list[str] = dataclasses.field(default_factory=list)
    embeddings: str = ""

    def __post_init__(self) -> None:
        require(isinstance(self.length, int) and self.length > 0, "length", self.length, "a positive whole number")
        require(self.init in ("random", "vocabulary", "text"), "init", self.init, "'random', 'vocabulary' or 'text'")
        require(
            bool(self.init_text) == (self.init == "text"), "init_text", self.init_text, "given with init='text' alone"
        )
        require(
            bool(self.targets) == bool(self.embeddings), "embeddings", self.embeddings, "given together with targets"
        )

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        if self.targets:
            table: Any = next(iter(select(model, [self.embeddings]).values()))
            for name, host in select(model, self.targets).items():
                yield name, EmbeddedPrompt(host, self._start(table, model))
            return
        hosts = list(backbones(model))
        if not hosts:
            raise ValueError(
                "No transformers backbone is found in the model; give PromptTuning targets and embeddings."
            )
        for name, host in hosts:
            if not isinstance(host.get_input_embeddings(), nn.Embedding):
                raise TypeError(
                    f"{name or type(host).__name__} embeds no tokens; give PromptTuning targets and embeddings."
                )
            prompt = self._start(host.get_input_embeddings(), model)
            if not getattr(host.config, "is_encoder_decoder", False):
                yield name, Prompt(host, prompt)
                continue
            below = {module: below for below, module in host.named_modules(prefix=name)}
            yield below[host.get_encoder()], Prompt(host.get_encoder(), prompt, keep=True)
            yield below[host.get_decoder()], VisiblePrompt(host.get_decoder(), self.length)

    def _start(self, table: Any, model: nn.Module) -> nn.Parameter:
        """Return P as it starts."""
        prompt = parameter_like(table.weight, self.length, table.weight.shape[1])
        if self.init == "random":
            nn.init.uniform_(prompt, -0.5, 0.5)
            return prompt
        require(not table.weight.is_meta, "init", self.init, "'random' while the model has no values yet (meta device)")
        if self.init == "vocabulary":
            rows = torch.randperm(min(5000, len(table.weight)))
            require(len(rows) >= self.length, "length", self.length, f"at most {len(rows)}, the size of the vocabulary")
        else:
            rows = torch.tensor(token_ids(model, self.init_text, self.tokenizer))
            rows = rows.repeat(-(-self.length // len(rows)))
        with torch.no_grad():
            prompt.copy_(table.weight[rows[: self.length].to(table.weight.device)])
        return prompt


class Prompt(Adapter):
    """Virtual tokens of a transformers backbone.

    Args:
        host: Backbone.
        prompt: Virtual tokens (length, features).
        keep: Whether the output keeps them.
    """

    def __init__(self, host: nn.Module, prompt: nn.Parameter, keep: bool = False) -> None:
        super().__init__()
        self.prompt, self.keep, self.names = prompt, keep, names_of(host)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.prompt, -0.5, 0.5)

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        return surround(host, inner, call, self.prompt, self.keep)


class VisiblePrompt(Adapter):
    """Lets a decoder's cross-attention see the virtual tokens that its encoder kept; trains nothing."""

    def __init__(self, host: nn.Module, length: int) -> None:
        super().__init__()
        self.length, self.names = length, names_of(host)

    def reset_parameters(self) -> None:
        """Nothing to fill."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        mask = call.get("encoder_attention_mask")
        if mask is not None:
            call["encoder_attention_mask"] = Insertion(self.length, mask).mask(mask)
        return inner(**call)


class EmbeddedPrompt(Adapter):
    """Virtual tokens of a module that takes and returns (batch, tokens, features), such as torch's encoder.

    Padding may be marked by ``attention_mask`` (zero at padding) or ``src_key_padding_mask`` (True at padding).
    """

    def __init__(self, host: nn.Module, prompt: nn.Parameter) -> None:
        super().__init__()
        self.prompt, self.names = prompt, names_of(host)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.prompt, -0.5, 0.5)

    def forward(self, host: Any, inner: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names[1:], args, strict=False)) | kwargs
        mask, padding = call.get("attention_mask"), call.get("src_key_padding_mask")
        where = Insertion(len(self.prompt), ~padding if padding is not None else mask)
        if mask is not None:
            call["attention_mask"] = where.mask(mask)
        if padding is not None:
            call["src_key_padding_mask"] = ~where.mask(~padding)
        for name in ("mask", "src_mask", "attn_mask"):
            if call.get(name) is not None:
                raise ValueError(f"Virtual tokens cannot extend {name!r} of {type(host).__name__}; use a padding mask.")
        y = inner(where.insert(self.prompt.to(x.dtype).expand(len(x), -1, -1), x), **call)
        return (where.remove(y[0]), *y[1:]) if isinstance(y, tuple) else where.remove(y)
