"""``PlotCallback`` draws figures of the adapters while a run trains, beside its logs."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from .. import plots
from ..plots.adapter_values import PlotValues
from ..plots.runs import METRICS
from ..plots.style import matplotlib
from ..tasks.pretrained import build_tokenizer
from ..training.distributed.lightning_strategies import SHARDING
from ..training.lightning_namespace import is_instance
from .logged_figures import LoggedFigures


class PlotCallback(pl.Callback):
    """Writes what the adapters hold as PNG into the folder of the logs, and learning curves once training has ended.

    Adapters say themselves what there is to see: ``rank_map.png`` (AdaLoRA), ``gate_map.png`` (LLaMA-Adapter),
    ``prompt_similarity.png`` (prompts and prefixes). Files are replaced as training goes on. With CSVLogger, each
    validation metric gets ``curves_METRIC.png``. TensorBoardLogger, WandbLogger and MLFlowLogger show the same figures
    under the same names, with the optimizer step. Where a strategy shards parameters, no rank sees whole adapters:
    ``lightning-peft plot adapter FOLDER`` draws them from the folder that was saved.

    Args:
        every_n_epochs: After how many epochs with validation pictures of adapters are drawn; the last is drawn anyway.
        tokenizer: Folder or name of a tokenizer, or ``package:name/folder``, that tells the nearest word of each
            virtual token.
        log_figures: Whether loggers get the figures. A logger that fails to take one is warned of, and asked no more.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``every_n_epochs`` is not a positive whole number.

    Examples:
        >>> from lightning_peft.recipes.plot_callback import PlotCallback
        >>> trainer = L.Trainer(callbacks=[lp.PEFTStrategy(lp.AdaLoRA()), PlotCallback()], accelerator="cpu")
    """

    def __init__(self, every_n_epochs: int = 1, tokenizer: str | None = None, log_figures: bool = True) -> None:
        super().__init__()
        if type(every_n_epochs) is not int or every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be a positive whole number, got {every_n_epochs!r}.")
        matplotlib("figure")  # before any training
        self.every_n_epochs = every_n_epochs
        self.tokenizer = None if tokenizer is None else build_tokenizer(tokenizer)
        self.log_figures = log_figures
        self._logged = LoggedFigures()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what will be missing."""
        self._logged = LoggedFigures()
        if is_instance(trainer.strategy, *SHARDING):
            rank_zero_info(
                "Adapters are sharded, and not drawn: use `lightning-peft plot adapter FOLDER` after the run."
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the adapters."""
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._adapters(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the adapters a last time, and the learning curves."""
        self._adapters(trainer, pl_module)
        folder = trainer.log_dir
        if getattr(trainer, "fast_dev_run", False) or not trainer.is_global_zero or folder is None:
            return
        for logger in trainer.loggers:
            logger.save()  # what the last steps logged
        if (Path(folder) / METRICS).is_file():
            for metric in plots.validated(folder):
                plots.save(plots.learning_curves([folder], metric), Path(folder) / f"curves_{metric}.png")

    def _adapters(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = trainer.log_dir  # which all ranks must ask for
        writes = trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)
        if not writes or is_instance(trainer.strategy, *SHARDING):
            return
        for name, figure in plots.pictures(PlotValues.of(pl_module), self.tokenizer).items():
            if folder is not None:
                plots.save(figure, Path(folder) / f"{name}.png")
            if self.log_figures:
                self._logged.add(trainer, name, figure, "" if folder is None else f"{name}.png lies in {folder}.")
