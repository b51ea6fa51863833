"""``PEFTCLI`` is LightningCLI with a method, optimizers of its parameters, and adapter tools."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerTypeTuple,
    instantiate_class,
)

from .. import tasks  # noqa: F401  # so that its classes are known by their short names
from ..training.callback import PEFTStrategy
from ..training.distributed import without_values
from ..training.saved_arguments import check_names
from .after_fit import finish_fit
from .arguments import ALL_MESSAGES
from .before_run import EVALUATIONS, add_prediction_writer, check_accelerator, check_fit, load_adapter_folder
from .parser import TOOLS, PEFTParser
from .trainer import PEFTTrainer
from .validation_metrics import ValidationMetrics

# torch's own come first: bitsandbytes has others of the same names, which would make short names ambiguous.
_OPTIMIZERS = sorted(
    (cls for cls in vars(torch.optim).values() if isinstance(cls, type)), key=lambda cls: cls is torch.optim.Optimizer
)
# `plan` and `targets` run where neither the GPUs nor the packages that a Trainer needs may be, and log nothing.
_WITHOUT_TRAINING = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "sync_batchnorm": False,
    "logger": False,
    "plugins": {"class_path": "lightning.pytorch.plugins.environments.LightningEnvironment"},
}

_SHAPES_ALONE = ("plan", "targets")


class PEFTCLI(LightningCLI):
    """LightningCLI whose ``peft`` section is a ``PEFTStrategy``.

    Optimizers named on the command line are built in ``configure_optimizers``, after injection; LightningCLI itself
    builds them before the Trainer exists, where they would hold frozen parameters and no adapters. After ``fit`` the
    adapter of the best checkpoint is saved, and tested if the data has a test set.

    Args:
        args: Of ``LightningCLI``.
        kwargs: Of ``LightningCLI``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("trainer_class", PEFTTrainer)
        kwargs.setdefault("parser_class", PEFTParser)
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})
        kwargs["auto_configure_optimizers"] = False
        arguments = sys.argv[1:] if kwargs.get("args") is None else kwargs["args"]
        self._first = arguments[0] if isinstance(arguments, list) and arguments else None
        super().__init__(*args, **kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Leave out the arguments of what is not called: to add those of all subcommands takes most of the start."""
        if self._first != subcommand and self._first in ("-h", "--help", *self.subcommands()):
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def _parse_ckpt_path(self) -> None:
        """Take the arguments of a checkpoint, as LightningCLI does, which imports what they name."""
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if path and Path(path).is_file():
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            check_names(checkpoint.get(pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY))
        super()._parse_ckpt_path()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the method, the optimizer, and what follows a fit."""
        parser.add_lightning_class_args(PEFTStrategy, "peft")
        parser.add_optimizer_args(tuple(_OPTIMIZERS))
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple)
        parser.add_argument("--adapter_dir", type=str | None, default=None, help="Where fit saves the adapter")
        parser.add_argument("--test_after_fit", type=bool, default=False, help="Whether fit ends with a test")
        said = "File for predict: .jsonl or .csv; by default predictions.jsonl in the folder of the run's logs"
        parser.add_argument("--predictions", type=str | None, default=None, help=said)
        said = "Show what other libraries say of themselves, too: devices found, tips, deprecations among them"
        parser.add_argument(ALL_MESSAGES, action="store_true", help=said)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Add the tools that need a model to what a Trainer does."""
        return {**LightningCLI.subcommands(), **dict.fromkeys(TOOLS, {"model", "datamodule"})}

    def before_instantiate_classes(self) -> None:
        """Build the model without memory if its weights come later, or not at all; then ask for no GPU."""
        if self.subcommand in _SHAPES_ALONE:
            trainer = self.config[self.subcommand]["trainer"]
            for key, value in _WITHOUT_TRAINING.items():
                trainer[key] = value
            if str(trainer["precision"]) in ("16", "16-mixed"):  # which CPUs have not; the sizes are the same
                trainer["precision"] = "bf16-mixed"
        check_accelerator(self._get(self.config, "trainer.accelerator"))
        streams = self.subcommand == "merge" and self.config["merge"]["base"] is not None
        if self.subcommand in _SHAPES_ALONE or streams or self._reads_by_unit():
            self.parser.add_instantiator(_without_values, pl.LightningModule, subclasses=True, prepend=True)

    def _reads_by_unit(self) -> bool:
        """Whether the strategy gives the model its weights later."""
        strategy: Any = self._get(self.config, "trainer.strategy")
        return getattr(getattr(strategy, "init_args", None), "base_weights", None) is not None

    def instantiate_classes(self) -> None:
        """Build everything but the optimizer, which comes with ``configure_optimizers``."""
        super().instantiate_classes()
        optimizer, scheduler = (self._get(self.config_init, key) for key in ("optimizer", "lr_scheduler"))
        if optimizer:
            self.model.__dict__["configure_optimizers"] = types.MethodType(
                self._configured(optimizer, scheduler), self.model
            )

    def _configured(self, optimizer: Any, scheduler: Any) -> Any:
        def configure_optimizers(module: pl.LightningModule) -> Any:
            parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
            built = instantiate_class((parameters,), optimizer)
            return self.configure_optimizers(module, built, instantiate_class(built, scheduler) if scheduler else None)

        return configure_optimizers

    def before_fit(self) -> None:
        """Check what would fail only after the training, and have validation metrics kept with each checkpoint."""
        tests, checkpoint = bool(self._get(self.config, "test_after_fit")), self.config["fit"]["ckpt_path"]
        check_fit(self.model, self.datamodule, tests, checkpoint)
        self.trainer.callbacks.insert(0, ValidationMetrics())  # type: ignore[attr-defined]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Take the folder of an adapter for a checkpoint, and have predictions written, not returned."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in EVALUATIONS:
            arguments["ckpt_path"] = load_adapter_folder(self.model, arguments["ckpt_path"])
        if subcommand == "predict":
            add_prediction_writer(self.trainer, self._get(self.config, "predictions"))
            arguments["return_predictions"] = bool(arguments["return_predictions"])
        return arguments

    def after_fit(self) -> None:
        """Save the adapter of the best checkpoint, test it if asked, and report."""
        folder, tests = self._get(self.config, "adapter_dir"), self._get(self.config, "test_after_fit")
        finish_fit(self.trainer, self.model, self.datamodule, folder, tests)


def _without_values(module_class: type[pl.LightningModule], *args: Any, **kwargs: Any) -> pl.LightningModule:
    with without_values():
        return module_class(*args, **kwargs)
