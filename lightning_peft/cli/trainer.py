"""``PEFTTrainer``: a Trainer with ``plan``, ``targets`` and the methods of ``AdapterTools``, for the command line."""

from __future__ import annotations

import json
import warnings
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from ..analysis.fake_model import shapes_only
from ..analysis.memory_plan import MemoryPlan, plan_memory
from ..analysis.plan_table import layouts, plan_text
from ..analysis.targets import targets
from ..core.console import echo
from ..quantization.meta_quantize import quantize_shapes
from ..structure.transformers_api import from_config
from ..training.callback import PEFTStrategy
from ..training.distributed import without_values
from ..training.module_modes import set_mode
from .adapter_tools import AdapterTools

_LONGEST = 2048  # tokens in a row, where neither data nor model have a limit


class PEFTTrainer(AdapterTools, pl.Trainer):
    """A Trainer that also merges, exports, imports, plans and shows targets."""

    def plan(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        batch_size: int | None = None,
        tokens: list[int] | None = None,
        processes: list[int] = [1, 2, 4, 8],  # noqa: B006  # jsonargparse shows it
        optimizer_bytes: float = 8.0,
        gradient_checkpointing: bool = False,
        as_json: bool = False,
    ) -> None:
        """Print the memory that training takes on each GPU, without allocating it.

        Args:
            model: Built without values; pretrained weights are not read.
            datamodule: Says how long and how many rows are; gives the batch to modules without sample_batch.
            batch_size: Rows of each GPU in one step; by default the data's, or 1.
            tokens: Numbers of tokens in a row; by default a quarter, half and all of the data's max_length, or of 2048.
            processes: Numbers of GPUs.
            optimizer_bytes: Optimizer state for each number that trains; 8 for Adam, 2 for Adam in 8 bits.
            gradient_checkpointing: Whether blocks run again in the backward pass.
            as_json: Whether to print JSON.

        Raises:
            ValueError: A number is not positive, rows are longer than the model's positions, or no batch is known.
        """
        if min([batch_size or 1, *processes]) < 1:
            raise ValueError(f"Got batch_size={batch_size} and processes={processes}, expected numbers from 1 on.")
        with without_values():
            model.configure_model()
        self.precision_plugin.convert_module(model)  # here, since shapes cannot change their type in place
        batches = _batch_of_data(model, datamodule)
        lengths = [] if batches else _lengths(model, datamodule, tokens)
        rows: int = batch_size or getattr(datamodule, "batch_size", None) or 1
        with shapes_only(model) as fake, warnings.catch_warnings(), self.precision_plugin.forward_context():
            warnings.filterwarnings("ignore", "You are trying to `self.log")
            self._adapt(fake)
            sample: Any = getattr(fake, "sample_batch", None)
            batches |= {number: sample(rows, number) for number in lengths}
            memory_plan = plan_memory(fake, _step, batches, optimizer_bytes, gradient_checkpointing)
        echo(_json(memory_plan, processes) if as_json else plan_text(memory_plan, processes))

    def targets(self, model: pl.LightningModule, datamodule: pl.LightningDataModule | None = None) -> None:
        """Print what methods can target in the model: roles, rows of fused layers, blocks, head and towers.

        Args:
            model: Built without values; pretrained weights are not read.
            datamodule: Is not used; a config may have one.
        """
        with without_values():
            model.configure_model()
        echo(str(targets(model)))

    def _adapt(self, model: pl.LightningModule) -> None:
        """Quantize and inject as before training; within ``shapes_only``, methods may read weights, too."""
        callback = next((c for c in self.callbacks if isinstance(c, PEFTStrategy)), None)  # type: ignore[attr-defined]
        if callback is None:
            raise ValueError("There is no method to plan: give the Trainer a PEFTStrategy among its callbacks.")
        if callback.quantize is not None:
            quantize_shapes(model, callback.quantize)
        callback.apply(model)
        set_mode(model, callback.frozen_mode)


def _step(module: pl.LightningModule, batch: Any) -> Tensor:
    result: Any = module.training_step(batch, 0)
    loss: Tensor = result["loss"] if isinstance(result, dict) else result
    return loss


def _lengths(model: nn.Module, data: Any, tokens: list[int] | None) -> list[int]:
    """Return the numbers of tokens to plan for.

    Raises:
        ValueError: The model has fewer positions.
    """
    if not getattr(model, "reads_tokens", True):
        return [0]  # shown as that of the data
    limits = [from_config(module, "max_position_embeddings") for module in model.modules()]
    limit = min((number for number in limits if isinstance(number, int) and number > 0), default=None)
    longest = getattr(data, "max_length", None) or min(_LONGEST, limit or _LONGEST)
    lengths = sorted(set(tokens or [max(1, longest // divisor) for divisor in (4, 2, 1)]))
    if lengths[0] < 1:
        raise ValueError(f"Got tokens={lengths}, expected numbers from 1 on.")
    if limit is not None and lengths[-1] > limit:
        raise ValueError(
            f"Got tokens={lengths}, but the model has {limit} positions. Give fewer tokens, or a model with a larger "
            f"max_position_embeddings."
        )
    return lengths


def _batch_of_data(model: pl.LightningModule, data: pl.LightningDataModule | None) -> dict[int, Any]:
    """Return the first batch of the data as that of 0 tokens, unless the module knows what batches look like."""
    if callable(getattr(model, "sample_batch", None)):
        return {}
    if data is None:
        raise ValueError(f"{type(model).__name__} has no sample_batch(rows, tokens); give data, whose batch is taken.")
    data.prepare_data()
    data.setup("fit")
    return {0: next(iter(data.train_dataloader()))}


def _json(memory_plan: MemoryPlan, processes: list[int]) -> str:
    return json.dumps({**vars(memory_plan), "layouts": layouts(memory_plan, processes)}, indent=2)
