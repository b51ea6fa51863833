"""``MultitaskPromptTuning``: Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, https://arxiv.org/abs/2303.02861."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, parameter_like
from ..core.adapter_folder import read_adapter
from ..core.fingerprint import fingerprint
from ..core.method import Method, check_setting
from ..structure.base_model import split_adapter_key
from ..structure.selection import select_parameters
from .prompting.prompt import Prompt, PromptSite
from .prompting.prompt_sites import check_sites, place_prompts
from .prompting.text_init import PromptInit


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(Method):
    """Trains one prompt P* for all tasks, and for each task k a rank-one matrix that scales it: P_k = P* o (u_k v_k^T).

    P* is (length, features), u (tasks, length), v (tasks, features); P_k is put in front of the input as by
    ``PromptTuning``. Each row of a batch gets the prompt of its task: ``with lp.row_tasks(model, ids)``.
    u and v start at one, so that each P_k starts as P*, at the scale of any other prompt; peft's N(0, 0.02) for both
    makes it start about 2,500 times as small. List ``*.u`` and ``*.v`` in ``no_decay``, since decay draws them to zero.

    Args:
        name: Name of the adapters on their hosts, and in files.
        length: Number of virtual tokens.
        tasks: Number of tasks.
        init: How P* starts; as for ``PromptTuning``.
        init_text: Text that describes the tasks.
        labels: Words of the classes, at most ``length``.
        tokenizer: Folder or name of the tokenizer for words; by default that of the model.
        start: Folder of a trained adapter of this method that a new task starts from: with its P*, and the means of its
            u and of its v, as in the paper; a mean of products would not have rank one. Adapter files of the new task
            do not need that folder, checkpoints of its training do.
        targets: Globs of modules whose first input is (batch, tokens, features), or of lists of such blocks, for models
            that are not transformers', and for those that read images.
        embeddings: Glob of the input embeddings that belong to ``targets``; a random start needs none.

    Examples:
        >>> model = nn.ModuleDict({"block": nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)})
        >>> method = lp.MultitaskPromptTuning(length=5, tasks=3, targets=["block"])
        >>> lp.summary(lp.inject(model, method)).trainable  # 5 x 16 of all tasks, 5 + 16 of each
        143
    """

    name: str = "multitask_prompt_tuning"
    length: int = 100
    tasks: int = 1
    init: Literal["random", "vocabulary", "text", "labels"] = "random"
    init_text: str = ""
    labels: list[str] = dataclasses.field(default_factory=list)
    tokenizer: str = ""
    start: str = ""
    targets: list[str] = dataclasses.field(default_factory=list)
    embeddings: str = ""

    def __post_init__(self) -> None:
        PromptInit.of(self)
        check_setting(isinstance(self.tasks, int) and self.tasks > 0, "tasks", self.tasks, "a positive whole number")
        check_setting(not self.start or self.init == "random", "init", self.init, "left alone where start is given")
        check_sites(self.targets, self.embeddings)

    def adapters(self, model: nn.Module) -> Iterable[tuple[str, Adapter]]:
        start_values = self._start_values(model) if self.start else {}

        def make(site: PromptSite) -> Prompt:
            adapter = SharedPrompt(site, self.tasks, self.length)
            PromptInit.of(self).apply(adapter.prompt, site.table, model)
            adapter.start_from(start_values)
            return adapter

        return place_prompts(model, self.targets, self.embeddings, self.length, make)

    def finalized(self) -> Method:
        return dataclasses.replace(self, start="")

    def _start_values(self, model: nn.Module) -> dict[str, Tensor]:
        """Return P*, u and v of the adapter to start from, by name."""
        config, state = read_adapter(self.start)
        source, *more_methods = config["methods"]
        same_method = source["method"] == type(self).__name__ and not more_methods
        check_setting(same_method, "start", self.start, f"the folder of an adapter of {type(self).__name__} alone")
        check_setting(source["length"] == self.length, "length", self.length, f"{source['length']}, as in {self.start}")
        stored = {key: value for key, value in state.items() if split_adapter_key(key, [source["name"]])}
        values = {key.rpartition(".")[2]: value for key, value in stored.items()}
        check_setting(len(values) == len(stored), "start", self.start, "of one prompt")
        base = fingerprint(model, select_parameters(model, config["also_train"]))
        if None not in (base, config["base"]) and base != config["base"]:
            raise ValueError(f"start={self.start!r} was learned on another base model: {config['base']}, here {base}.")
        return values


class SharedPrompt(Prompt):
    """Prompt P* that all tasks share, scaled for each task by a rank-one matrix.

    Args:
        site: Host of the prompt.
        tasks: Number of tasks.
        length: Number of virtual tokens.
    """

    def __init__(self, site: PromptSite, tasks: int, length: int) -> None:
        super().__init__(site, tasks)
        like, features = site.weight, site.weight.shape[1]
        self.prompt = parameter_like(like, length, features)
        self.u, self.v = parameter_like(like, tasks, length), parameter_like(like, tasks, features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.prompt, -0.5, 0.5)
        nn.init.ones_(self.u)
        nn.init.ones_(self.v)

    def start_from(self, trained: dict[str, Tensor]) -> None:
        """Start from another adapter's tensors; u and v start from the means over its tasks."""
        for name, values in trained.items():
            parameter = self.get_parameter(name)
            check_setting(
                not parameter.is_meta, "start", name, "left out while the model has no values yet (meta device)"
            )
            values = values if name == "prompt" else values.mean(0)
            width = parameter.shape[-1]
            check_setting(values.shape[-1] == width, name, tuple(values.shape), f"{width} wide, as the model")
            with torch.no_grad():
                parameter.copy_(values)

    def virtual(self, rows: int) -> Tensor:
        return self.of_rows(self.prompt * (self.u[:, :, None] * self.v[:, None]), rows)
