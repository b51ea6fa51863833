"""``PromptTuning``: The Power of Scale for Parameter-Efficient Prompt Tuning, https://arxiv.org/abs/2104.08691."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..core.adapter import Adapter, parameter_like
from ..core.method import Method, check_setting
from .prompting.prompt import Prompt, PromptSite
from .prompting.prompt_sites import check_sites, place_prompts
from .prompting.text_init import PromptInit


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Trains virtual tokens P (length, features) in front of the input embeddings: the model reads [P; x].

    They stand before the first token of each row that is not padding, left or right; outputs, labels and generation
    have the positions of x only. In an encoder-decoder model they enter the encoder, and cross-attention sees them.
    With several tasks, each row of a batch gets the prompt of its task: ``with lp.row_tasks(model, ids)``.
    Where a model reads more from the ids of its tokens than their embeddings (images, embeddings of each layer),
    virtual tokens are text there that says nothing, as padding; at injection it is measured which models do.

    Args:
        name: Name of the adapters on their hosts, and in files.
        length: Number of virtual tokens; 100 is the paper's default, and its largest models need few.
        init: ``random``: uniform in [-0.5, 0.5]. ``vocabulary``: different rows of the first 5,000 tokens of the
            vocabulary, which tokenizers order by frequency. ``labels``: the mean embedding of each of ``labels``, the
            paper's default, and rows of the vocabulary after them. ``text``: the embeddings of ``init_text``, repeated
            or cut to the length.
        init_text: Text that describes the task.
        labels: Words of the classes, at most ``length``.
        tokenizer: Folder or name of the tokenizer for words; by default that of the model.
        tasks: Number of prompts; with several, P is (tasks, length, features).
        targets: Globs of modules whose first input is (batch, tokens, features), or of lists of such blocks, for models
            that are not transformers', and for those that read images.
        embeddings: Glob of the input embeddings that belong to ``targets``; a random start needs none.

    Examples:
        >>> model = nn.ModuleDict({"block": nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)})
        >>> _ = lp.inject(model, lp.PromptTuning(length=5, targets=["block"]))
        >>> lp.summary(model).trainable, model["block"](torch.randn(2, 7, 16)).shape  # outputs as before
        (80, torch.Size([2, 7, 16]))
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
        def make(site: PromptSite) -> Prompt:
            adapter = TrainedPrompt(site, self.tasks, self.length)
            PromptInit.of(self).apply(adapter.prompt, site.table, model)
            return adapter

        return place_prompts(model, self.targets, self.embeddings, self.length, make)


class TrainedPrompt(Prompt):
    """Virtual tokens that are parameters themselves, not computed by an encoder.

    Args:
        site: Host of the prompt.
        tasks: Number of prompts.
        length: Number of virtual tokens.
    """

    def __init__(self, site: PromptSite, tasks: int, length: int) -> None:
        super().__init__(site, tasks)
        of_tasks = [tasks] if tasks > 1 else []
        self.prompt = parameter_like(site.weight, *of_tasks, length, site.weight.shape[1])

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.prompt, -0.5, 0.5)

    def virtual(self, rows: int) -> Tensor:
        return self.prompt if self.tasks == 1 else self.of_rows(self.prompt, rows)
