"""The Power of Scale for Parameter-Efficient Prompt Tuning, https://arxiv.org/abs/2104.08691."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..core.adapter import Adapter, parameter_like
from ..core.method import Method, check_setting
from .prompting.prompt import Prompt, PromptSite, check_sites, place_prompts
from .prompting.text_init import PromptInit


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Trains virtual tokens P (length, features) in front of the input embeddings: the model reads [P; x].

    They stand before the first token of each row that is no padding, left or right; outputs, labels and generation
    see the positions of x alone. In an encoder-decoder model they enter the encoder, and cross-attention sees them.
    With several tasks, each row of a batch takes the prompt of its own: ``with lp.row_tasks(model, ids)``.

    Args:
        name: Name of the adapters on their hosts, and in files.
        length: Number of virtual tokens; the paper's largest models need few, its default is 100.
        init: ``random``: uniform in [-0.5, 0.5]. ``vocabulary``: different rows of the first 5,000 tokens of the
            vocabulary, which tokenizers order by frequency. ``labels``: the mean embedding of each of ``labels``, the
            paper's default, and rows of the vocabulary after them. ``text``: the embeddings of ``init_text``, repeated
            or cut to the length.
        init_text: A text that says what the task is.
        labels: Words of the classes, at most ``length``.
        tokenizer: Folder or name of the tokenizer for words; that of the model if not given.
        tasks: Number of prompts; of several, P is (tasks, length, features).
        targets: Globs of modules whose first input is (batch, tokens, features), or of lists of such blocks, for models
            that are not transformers', and for those that read images.
        embeddings: Glob of the input embeddings that belong to ``targets``; a random start needs none.
    """

    name: str = "prompt_tuning"
    length: int = 100
    init: Literal["random", "vocabulary", "text", "labels"] = "random"
    init_text: str = ""
    labels: list[str] = dataclasses.field(default_factory=list)
    tokenizer: str = ""
    tasks: int = 1
    targets: list[str] = dataclasses.field(default_factory=list)
    embeddings: str = ""

    def __post_init__(self) -> None:
        PromptInit.of(self)
        check_setting(isinstance(self.tasks, int) and self.tasks > 0, "tasks", self.tasks, "a positive whole number")
        check_sites(self.targets, self.embeddings)

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        def make(place: PromptSite) -> Prompt:
            adapter = TrainedPrompt(place, self.tasks, self.length)
            PromptInit.of(self).apply(adapter.prompt, place.table, model)
            return adapter

        return place_prompts(model, self.targets, self.embeddings, self.length, make)


class TrainedPrompt(Prompt):
    """Virtual tokens that train as they are.

    Args:
        place: Where they enter.
        tasks: Number of prompts.
        length: Number of virtual tokens.
    """

    def __init__(self, place: PromptSite, tasks: int, length: int) -> None:
        super().__init__(place, tasks)
        several = [tasks] if tasks > 1 else []
        self.prompt = parameter_like(place.weight, *several, length, place.weight.shape[1])

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.prompt, -0.5, 0.5)

    def virtual(self, rows: int) -> Tensor:
        return self.prompt if self.tasks == 1 else self.of_rows(self.prompt, rows)
