"""``LoggedFigures`` shows figures in a Trainer's loggers, each in the way of that logger."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..training.lightning_namespace import is_instance

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LoggedFigures:
    """Shows figures in loggers: images of TensorBoard and W&B, artifacts of MLflow. No failure of a logger ends a run.

    A logger that shows no figures is named once. One that fails is warned of, and gets no more.
    """

    def __init__(self) -> None:
        self._last_steps = dict[tuple[int, str], int]()  # by place of the logger and name of the figure
        self._left_out = set[int]()  # places of loggers that get no figures

    def add(self, trainer: pl.Trainer, name: str, figure: Figure, instead: str = "") -> None:
        """Show a figure at the present optimizer step, once; only the first rank calls it.

        Args:
            trainer: Whose loggers show it.
            name: Such as ``gate_map``. In MLflow it is a folder of artifacts with a file for each step.
            figure: The figure, which stays open.
            instead: A sentence about where to see it without a logger.
        """
        for place, logger in enumerate(trainer.loggers):
            if place in self._left_out or self._last_steps.get((place, name)) == trainer.global_step:
                continue
            self._last_steps[place, name] = trainer.global_step
            show = next((show for kind, show in _WAYS.items() if is_instance(logger, kind)), None)
            if show is None:
                self._left_out.add(place)
                rank_zero_info(f"{type(logger).__name__} shows no figures. {instead}".rstrip())
                continue
            try:
                show(logger, name, figure, trainer.global_step)
            except Exception as error:  # a server out of reach, say: no picture is worth a run
                self._left_out.add(place)
                rank_zero_warn(f"{type(logger).__name__} gets no more figures, since it did not take {name}: {error!r}")


def _tensorboard(logger: Any, name: str, figure: Figure, step: int) -> None:
    logger.experiment.add_figure(name, figure, global_step=step, close=False)


def _wandb(logger: Any, name: str, figure: Figure, step: int) -> None:
    logger.log_image(name, [figure], step=step)


def _mlflow(logger: Any, name: str, figure: Figure, step: int) -> None:
    logger.experiment.log_figure(logger.run_id, figure, f"{name}/step_{step:08}.png")


_WAYS: dict[type[Logger], Callable[[Any, str, Figure, int], None]] = {
    TensorBoardLogger: _tensorboard,
    WandbLogger: _wandb,
    MLFlowLogger: _mlflow,
}
