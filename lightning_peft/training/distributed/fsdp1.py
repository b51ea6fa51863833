"""``FSDP1Strategy``: FullyShardedDataParallel for a frozen base with adapters, set in the Trainer alone."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.optim import Optimizer

from ...ops.sharded_tensors import shard_of
from ..distributed import fsdp1_state as flat_states
from ..lightning_api import saves_shards, torch_optimizer
from .base_consistency import check_one_base
from .fsdp1_parameters import annotate_shards
from .fsdp1_precision import OwnTypes
from .fsdp1_wrapping import check_flattens, flatten_inside
from .fsdp2 import DataType
from .replicated import average_gradients, broadcast_trained
from .sharded_checkpoint import read_folder, write_folder
from .sharded_state import own_optimizer_state, saved_tensors
from .sharding_plan import plan_units

_ROOT = "_peft_root"  # no child of the module that it wraps


class FSDP1Strategy(FSDPStrategy):
    """Shards a model by FSDP1 once its adapters are there; for clusters and code that FSDP2 does not reach yet.

    What is frozen is flattened and sharded. Beside adapters, all that trains stays whole on each process, as under DDP:
    it starts from the first process's values, and its gradients are averaged after each backward pass. Without adapters
    (full fine-tuning, last layers, biases), what trains is sharded as well. Parameters keep their types; no checkpoint
    gathers what is frozen. ``FSDP2Strategy`` also takes quantized bases, types that differ inside a unit, and bases
    without values yet.

    Args:
        wrap_modules: What is gathered at once: class names such as ``LlamaDecoderLayer``, or globs on the end of
            dotted names; by default the model's repeated blocks. The rest is gathered for the whole of a step.
        state_dict_type: ``full``: a checkpoint is one file, as under DDP. ``sharded``: a folder to which each process
            writes its part. Either holds adapter state only.
        reshard_after_forward: Whether blocks are freed after the forward pass and gathered again for the backward pass.
        param_dtype: Type that sharded parameters are gathered and computed in; by default their own.
        process_group_backend: Backend of ``torch.distributed``; by default the device's.
        timeout: How long a process waits for the others before it ends with an error.

    Raises:
        ValueError: A pattern matches nothing.
        TypeError: A unit cannot be flattened.

    Examples:
        >>> strategy = lp.FSDP1Strategy(wrap_modules=["LlamaDecoderLayer"], param_dtype="bfloat16")
        >>> trainer = L.Trainer(strategy=strategy, accelerator="cpu", callbacks=[lp.PEFTStrategy(lp.LoRA())])
        >>> strategy.mixed_precision_config.param_dtype
        torch.bfloat16
    """

    def __init__(
        self,
        wrap_modules: list[str] | None = None,
        state_dict_type: Literal["full", "sharded"] = "full",
        reshard_after_forward: bool = True,
        param_dtype: DataType | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if state_dict_type not in ("full", "sharded"):
            raise ValueError(f"state_dict_type must be 'full' or 'sharded', got {state_dict_type!r}.")
        kind = ShardingStrategy.FULL_SHARD if reshard_after_forward else ShardingStrategy.SHARD_GRAD_OP
        policy = None
        if param_dtype is not None:
            policy = MixedPrecision(param_dtype=getattr(torch, param_dtype), reduce_dtype=torch.float32)
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timeout,
            mixed_precision=policy,
            sharding_strategy=kind,
            state_dict_type=state_dict_type,
        )
        self.wrap_modules = wrap_modules
        self._replicated: list[nn.Parameter] = []

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        """Nothing but ``param_dtype``: autocast does the rest, as everywhere else."""
        return self.mixed_precision

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the model, then build the optimizers."""
        if type(self.precision_plugin) is FSDPPrecision:
            self.precision_plugin = OwnTypes(self.precision_plugin.precision, self.root_device.type)
        super().setup(trainer)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        group: Any = torch.distributed.group.WORLD
        if group.size() == 1:
            return model.to(self.root_device)
        root: nn.Module | None = vars(model).get(_ROOT)  # of an earlier run, whose units are still in their places
        if root is None and any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
            raise TypeError("configure_model wrapped modules in FSDP1; leave that to FSDP1Strategy.")
        model = self._shard(model, group) if root is None else root
        self._replicated = [p for p in model.parameters() if p.requires_grad and shard_of(p) is None]
        if isinstance(self.precision_plugin, OwnTypes):
            self.precision_plugin.root = model
        return model

    def _shard(self, model: nn.Module, group: torch.distributed.ProcessGroup) -> nn.Module:
        units = plan_units(model, self.wrap_modules, group.size())
        check_flattens(model, units)
        check_one_base(model)
        rank_zero_info(f"\n{units}")
        replicated = list(units.replicated.values())
        for parameter in replicated:
            parameter.data = parameter.data.to(self.root_device)
        broadcast_trained(model, self.root_device)
        ignored = {id(p) for p in replicated}
        shapes = {p: p.shape for p in model.parameters() if id(p) not in ignored}
        flatten_inside(model, units, lambda unit: self._flatten(unit, replicated))
        root = vars(model)[_ROOT] = self._flatten(model, replicated)
        annotate_shards(shapes, group, self.root_device)
        return root

    def _flatten(self, module: nn.Module, ignored: list[nn.Parameter]) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(
            module,
            sharding_strategy=self.sharding_strategy,
            mixed_precision=self.mixed_precision_config,
            device_id=self.root_device,
            ignored_states=ignored,
            use_orig_params=True,
        )

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of what is not sharded."""
        super().post_backward(closure_loss)
        average_gradients(self._replicated, torch.distributed.group.WORLD)  # type: ignore[arg-type]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds; of what is sharded, nothing is gathered but what trains."""
        state = flat_states.module_state(self.lightning_module)  # type: ignore[arg-type]
        return flat_states.spread_out(state) if saves_shards(self) else flat_states.gathered(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state as a single process would have it."""
        return flat_states.optimizer_state(torch_optimizer(optimizer), sharded=saves_shards(self))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a file or a folder."""
        if not saves_shards(self) or storage_options is not None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        if self.is_global_zero and path.is_file():
            path.unlink()
        elif self.is_global_zero and path.is_dir():
            shutil.rmtree(path)
        self.barrier()
        write_folder(checkpoint, path)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a file or folder of any number of processes; a file may come from a run without sharding.

        Raises:
            ValueError: Keys are missing or have no place, or shapes differ; nothing was loaded then.
        """
        module: Any = self.lightning_module
        path = Path(self.broadcast(checkpoint_path))
        fits = module.trainer.state.fn == TrainerFn.FITTING
        checkpoint = None if path.is_dir() else torch.load(path, "cpu", mmap=True, weights_only=weights_only)
        flat_states.check_saved(module, saved_tensors(path) if checkpoint is None else checkpoint["state_dict"], path)
        if checkpoint is None:
            checkpoint = read_folder(path, self.root_device, weights_only, fits)
        flat_states.load_module(module, checkpoint.pop("state_dict"))
        states = checkpoint.pop("optimizer_states", None)
        if fits and states is not None:
            for optimizer, state in zip(self.optimizers, states, strict=True):
                optimizer.load_state_dict(own_optimizer_state(optimizer, state))
        return dict(checkpoint)
