"""``mpt``: multitask prompt tuning in three stages, https://arxiv.org/abs/2303.02861."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import seed_everything

from ..checkpoints.save_load import load_adapter
from ..composition.ensemble import join_prompts
from ..core.adapter_folder import write_json
from ..core.method import Method
from ..methods import MultitaskPromptTuning, PromptTuning
from ..tasks.data.mixed_data import MixedDataModule
from ..tasks.data.table_data import TableDataModule
from ..tasks.module import TaskModule
from ..training.callback import PEFTStrategy
from .distillation import Distillation, twin
from .stages import Plain, Stage, Training, described

_NO_DECAY = ["*.u", "*.v"]  # which start at one
_TRAINING = Training()
_RESERVED_TRAINER_KEYS = {"callbacks", "default_root_dir", "max_epochs", "max_steps"}  # set by the stages


@dataclass(frozen=True, kw_only=True)
class Distilling:
    """How the teachers' answers and hidden states enter the loss of the second stage.

    The paper's weight and temperature could not be verified; 1 leaves both out of the formula.

    Args:
        weight: Lambda in L_task + lambda (L_logits + L_hidden).
        temperature: Divides the logits of teacher and student.
        hidden: ``mean`` of the squared differences over tokens and features, which suits any length and width, or the
            paper's ``sum``, which wants a small weight.
    """

    weight: float = 1.0
    temperature: float = 1.0
    hidden: Literal["mean", "sum"] = "mean"


_DISTILLING = Distilling()


def mpt(
    module: Callable[[], TaskModule],
    sources: dict[str, TableDataModule],
    targets: dict[str, TableDataModule],
    output: str,
    length: int = 100,
    init: Literal["random", "vocabulary"] = "vocabulary",
    teachers: Training = _TRAINING,
    multitask: Training = _TRAINING,
    transfer: Training = _TRAINING,
    distilling: Distilling = _DISTILLING,
    batch_size: int = 36,
    sampling: Literal["proportional", "stochastic"] = "stochastic",
    seed: int = 1,
    trainer: dict[str, Any] | None = None,
) -> Plain:
    """Train a prompt for each source task, one shared prompt by their example, and transfer it to target tasks.

    Given again after it was killed, it goes on in the stage where it was, and ends with the same values.

    Args:
        module: The base with its task, such as Cloze; it is frozen, and built anew for each stage.
        sources: Data of the source tasks by name, two or more.
        targets: Data of the target tasks by name.
        output: Folder of the stages: ``teachers/NAME``, ``multitask`` and ``targets/NAME``.
        length: Number of virtual tokens.
        init: How teachers and the shared prompt start; see PromptTuning.
        teachers: How each source task trains its own prompt.
        multitask: How P*, u and v train on all source tasks.
        transfer: How P*, u and v train on a target task.
        distilling: What is learned from the teachers.
        batch_size: Rows of a batch that mixes source tasks; the others' are those of their data.
        sampling: How source tasks mix; see MixedDataModule.
        seed: Decides every stage.
        trainer: Further arguments of each stage's Trainer, such as accelerator and precision; it has one device.

    Returns:
        The report of each stage, which ``output/report.json`` holds as well.

    Raises:
        ValueError: The folder was begun with other settings, or the tasks do not belong together.
    """
    trainer = trainer or {}
    if reserved := sorted(_RESERVED_TRAINER_KEYS & trainer.keys()):
        raise ValueError(f"Got trainer={reserved}, which the stages set themselves. Give epochs to each stage instead.")
    run = _Run(
        module, sources, targets, Path(output), length, init, seed, trainer, teachers, multitask, transfer, distilling
    )
    mixed = MixedDataModule(sources, batch_size, sampling, seed=seed)
    reports = run.all_stages(mixed)
    write_json(Path(output) / "report.json", reports)
    return reports


@dataclass
class _Run:
    """One call of ``mpt``."""

    build: Callable[[], TaskModule]
    sources: dict[str, TableDataModule]
    targets: dict[str, TableDataModule]
    output: Path
    length: int
    init: Literal["random", "vocabulary"]
    seed: int
    trainer: Plain
    teachers: Training
    multitask: Training
    transfer: Training
    distilling: Distilling
    stages: dict[str, Stage] = field(default_factory=dict)

    def all_stages(self, mixed: MixedDataModule) -> Plain:
        """Run what is not done; every setting is compared before anything is."""
        self.stages = dict(self._plan(mixed))
        for stage in self.stages.values():
            stage.check()
        for name, data in self.sources.items():
            self._teach(self.stages[f"teachers/{name}"], name, data)
        self._share(self.stages["multitask"], mixed)
        for name, data in self.targets.items():
            self._transfer(self.stages[f"targets/{name}"], data)
        return {name: stage.report() for name, stage in self.stages.items()}

    def _plan(self, mixed: MixedDataModule) -> Iterator[tuple[str, Stage]]:
        base = {"module": described(self._base(self.teachers)), "length": self.length, "init": self.init}
        base |= {"seed": self.seed, "trainer": self.trainer}
        sources = {name: described(data) for name, data in self.sources.items()}
        for name, source in sources.items():
            yield self._stage(f"teachers/{name}", {**base, "data": source}, self.teachers)
        shared: Plain = {"sources": sources, "order": list(sources), "teachers": dataclasses.asdict(self.teachers)}
        shared |= {"batch_size": mixed.batch_size, "sampling": mixed.sampling}
        shared |= {**base, "distilling": dataclasses.asdict(self.distilling)}
        yield self._stage("multitask", shared, self.multitask)
        before = {"multitask": {**shared, **dataclasses.asdict(self.multitask)}}
        for name, data in self.targets.items():
            yield self._stage(f"targets/{name}", {**before, "data": described(data)}, self.transfer)

    def _stage(self, name: str, settings: Plain, training: Training) -> tuple[str, Stage]:
        return name, Stage(self.output / name, {**settings, **dataclasses.asdict(training)})

    def _base(self, training: Training) -> TaskModule:
        seed_everything(self.seed, verbose=False)
        module = self.build()
        module.hparams["learning_rate"] = training.learning_rate
        return module

    def _teach(self, stage: Stage, name: str, data: TableDataModule) -> None:
        """Stage 0: an own prompt for one source task."""
        if not stage.done:
            module = self._base(self.teachers)
            method = PromptTuning(length=self.length, init=self.init)
            stage.train(module, module, _strategy(method, self.teachers), data, self.trainer)
        if "val" in stage.report()["worse_than_guess"]:
            warnings.warn(
                f"The teacher of {name!r} is right less often than the most frequent answer of its validation rows, "
                f"and will teach that: see {str(stage.folder)!r}. Train it longer, or leave the task out.",
                stacklevel=2,
            )

    def _share(self, stage: Stage, mixed: MixedDataModule) -> None:
        """Stage 1: one prompt for all source tasks, which learns from the teachers."""
        if stage.done:
            return
        student = self._base(self.multitask)
        folders = [self.stages[f"teachers/{name}"].adapter for name in self.sources]
        joined = join_prompts(folders, self.output / "teachers" / "joined")
        teacher = load_adapter(twin(student), joined)
        assert isinstance(teacher, TaskModule)  # noqa: S101
        module = Distillation(student, teacher, **dataclasses.asdict(self.distilling))
        method = MultitaskPromptTuning(length=self.length, init=self.init, tasks=len(self.sources))
        stage.train(module, student, _strategy(method, self.multitask, _NO_DECAY), mixed, self.trainer)

    def _transfer(self, stage: Stage, data: TableDataModule) -> None:
        """Stage 2: the shared prompt and the means of u and v go on with a target task."""
        if stage.done:
            return
        module = self._base(self.transfer)
        method = MultitaskPromptTuning(length=self.length, start=str(self.stages["multitask"].adapter))
        stage.train(module, module, _strategy(method, self.transfer, _NO_DECAY), data, self.trainer)


def _strategy(method: Method, training: Training, no_decay: list[str] | None = None) -> PEFTStrategy:
    return PEFTStrategy(method, lr_factors=training.lr_factors, no_decay=no_decay, show_summary=False)
