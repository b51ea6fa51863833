"""``PrefixTuning``, https://arxiv.org/abs/2101.00190, and ``PTuningV2``, https://arxiv.org/abs/2110.07602."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..core.adapter import Adapter
from ..core.method import Method, check_setting
from ..structure.attention.hosts import attention_hosts
from ..structure.roles import head_layers
from ..structure.selection import select_parameters
from .prompting.position_shift import shifted_positions
from .prompting.prefix import prefixes
from .prompting.prefix_init import init_from_text
from .prompting.text_init import token_ids


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Lets every query attend to learned keys and values: K' = [P_k; K], V' = [P_v; V], in each attention module.

    Encoder, decoder and cross-attention have separate prefixes. In training, one perceptron computes them, as in the
    authors' code: [P_k, P_v] = tanh(E W_1^T + b_1) W_2^T + b_2, with E (length, features), W_1 (hidden_size,
    features), and separate rows of W_2 and b_2 for each module. ``finalize`` and adapter files keep only P_k and P_v.

    Added keys are scored as all others, softcaps included, and share their softmax, sinks included. No mask hides them.
    Biases by distance add nothing to them (T5, ALiBi of Falcon), but for the ALiBi of Bloom and MPT, where they stand
    before the first token, as in a key-value cache.

    Args:
        name: Name of the adapters on their hosts, and in files.
        length: Number of keys and values of each module; 10 is the authors' default, 5 to 200 their range.
        reparameterize: Whether the perceptron computes them; trained directly, they are less stable.
        hidden_size: Width of the perceptron's hidden layer; 512 for tables to text, 800 for summaries.
        dropout: Probability with which entries of keys and values are dropped in training.
        targets: Globs of attention modules, or roles.
        exclude: Globs of modules to leave out.
        init: ``random``: normal, and torch's defaults in the perceptron. ``text``: the keys and values that the model
            computes for ``init_text``, repeated or cut to the length; a perceptron is fitted to them in 500 steps.
        init_text: Words that describe the task, such as "summarization".
        tokenizer: Folder or name of the tokenizer for ``init_text``; by default that of the model.
        shift_positions: Whether the positions of tokens begin after a prefix of this length, as they do where prefixes
            are put into a key-value cache. If not, tokens keep their positions, and the prefix has none.

    Examples:
        >>> model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        >>> _ = lp.inject(model, lp.PrefixTuning(length=5, targets=["self_attn"]))
        >>> lp.summary(lp.finalize(model)).trainable  # 5 keys and 5 values of 16
        160
    """

    name: str = "prefix_tuning"
    length: int = 10
    reparameterize: bool = True
    hidden_size: int = 512
    dropout: float = 0.0
    targets: list[str] = dataclasses.field(default_factory=lambda: ["attention"])
    exclude: list[str] = dataclasses.field(default_factory=list)
    init: Literal["random", "text"] = "random"
    init_text: str = ""
    tokenizer: str = ""
    shift_positions: bool = False

    def __post_init__(self) -> None:
        _check(self.length, self.hidden_size, self.dropout)
        check_setting(self.init in ("random", "text"), "init", self.init, "'random' or 'text'")
        has_text = bool(self.init_text)
        check_setting(has_text == (self.init == "text"), "init_text", self.init_text, "given with init='text' alone")

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        hosts = attention_hosts(model, self.targets, self.exclude, joins=True)
        hidden = self.hidden_size if self.reparameterize else None
        adapters = list(prefixes(model, hosts, self.length, self.dropout, hidden))
        if self.init == "text":
            ids = token_ids(model, self.init_text, self.tokenizer)
            init_from_text(model, adapters, (ids * self.length)[: self.length])
        if self.shift_positions:
            return [*shifted_positions(model, self.length, type(self).__name__), *adapters]
        return adapters

    def finalized(self) -> PrefixTuning:
        """Return the method of plain prefixes, without the settings of their initialization."""
        return dataclasses.replace(self, reparameterize=False, init="random", init_text="", tokenizer="")


@dataclass(frozen=True, kw_only=True)
class PTuningV2(Method):
    """Lets every query attend to learned keys and values, and trains a head for the task with them.

    The prefixes are those of ``PrefixTuning``, by default without a perceptron: P_k and P_v start normal.

    Args:
        name: Name of the adapters on their hosts, and in files.
        length: Number of keys and values of each module. Simple classification needs less than 20, labelling of tokens
            about 100.
        projection: Whether a perceptron computes them in training; whether that helps depends on the task.
        hidden_size: Width of its hidden layer.
        dropout: Probability with which entries of keys and values are dropped in training.
        targets: Globs of attention modules, or roles.
        exclude: Globs of modules to leave out.
        train_head: Whether the head trains as well, if the model has one; see the role ``head``.

    Examples:
        >>> model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        >>> method = lp.PTuningV2(length=5, targets=["self_attn"], train_head=False)
        >>> lp.summary(lp.inject(model, method)).trainable  # 5 keys and 5 values of 16
        160
    """

    name: str = "p_tuning_v2"
    length: int = 20
    projection: bool = False
    hidden_size: int = 512
    dropout: float = 0.1
    targets: list[str] = dataclasses.field(default_factory=lambda: ["attention"])
    exclude: list[str] = dataclasses.field(default_factory=list)
    train_head: bool = True

    def __post_init__(self) -> None:
        _check(self.length, self.hidden_size, self.dropout)

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        hosts = attention_hosts(model, self.targets, self.exclude, joins=True)
        return prefixes(model, hosts, self.length, self.dropout, self.hidden_size if self.projection else None)

    def parameters(self, model: nn.Module) -> Iterable[str]:
        return select_parameters(model, ["head"], roles_only=True) if self.train_head and head_layers(model) else ()

    def finalized(self) -> PTuningV2:
        return dataclasses.replace(self, projection=False)


def _check(length: int, hidden_size: int, dropout: float) -> None:
    for field, value in (("length", length), ("hidden_size", hidden_size)):
        check_setting(type(value) is int and value > 0, field, value, "a positive whole number")
    check_setting(0 <= dropout < 1, "dropout", dropout, "a probability in [0, 1)")
