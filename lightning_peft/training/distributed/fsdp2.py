"""``FSDP2Strategy``: ``fully_shard`` for a frozen base with adapters, set in the Trainer alone."""

from __future__ import annotations

import types
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ...checkpoints.adapter_state import check_state
from ...checkpoints.base_weight_files import BaseWeightFiles
from ...core.injection_record import get_record
from ...structure.base_model import base_parameters
from ..lightning_api import saves_shards, tensor_parallel_size, torch_optimizer
from .base_consistency import check_one_base
from .base_weights import find_base_weights, read_into, start_adapters
from .replicated import average_gradients, broadcast_trained
from .sharded_state import own_optimizer_state, own_state, saved_tensors, whole_optimizer_state
from .sharding_plan import plan_units
from .tensor_parallel import parallelize

DataType = Literal["bfloat16", "float16", "float32"]


class FSDP2Strategy(ModelParallelStrategy):
    """Shards a model by FSDP2 once its adapters are there; the LightningModule needs no line for it.

    What is frozen is sharded. Beside adapters, all that trains stays whole on each process, as under DDP: it starts
    from the first process's values, and its gradients are averaged after each backward pass. Without adapters (full
    fine-tuning, last layers, biases), what trains is sharded as well. A module that its own ``configure_model`` has
    sharded stays as it is.

    Args:
        wrap_modules: What is gathered at once: class names such as ``LlamaDecoderLayer``, or globs on the end of
            dotted names; by default the model's repeated blocks.
        base_weights: Safetensors file of the base model, or folder of such files, for networks that were built in the
            context ``without_values``: each process reads one unit after the other and keeps its part. The command
            line builds the network so where this is given. "auto" is what the module's ``base_weights`` says.
        save_distributed_checkpoint: Whether a checkpoint is a folder, to which each process writes its part, and not
            one file. Either holds adapter state only.
        reshard_after_forward: Whether blocks are freed after the forward pass and gathered again for the backward pass.
        param_dtype: Type that sharded parameters are gathered and computed in; by default their own.
        tensor_parallel_size: Over how many processes the layers of a Llama-like model are split, with their adapters,
            in place of sharding: all, which share each batch, or 1. See ``parallelize``.
        process_group_backend: Backend of ``torch.distributed``; by default the device's.
        timeout: How long a process waits for the others before it ends with an error.

    Raises:
        ValueError: A pattern matches nothing.

    Examples:
        >>> strategy = lp.FSDP2Strategy(wrap_modules=["LlamaDecoderLayer"])
        >>> trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=2, callbacks=[lp.PEFTStrategy(lp.LoRA())])
        >>> trainer.world_size
        2
    """

    def __init__(
        self,
        wrap_modules: list[str] | None = None,
        base_weights: str | None = None,
        save_distributed_checkpoint: bool = False,
        reshard_after_forward: bool = True,
        param_dtype: DataType | None = None,
        tensor_parallel_size: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__("auto", tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout)
        self.wrap_modules, self.base_weights = wrap_modules, base_weights
        self.reshard_after_forward, self.param_dtype = reshard_after_forward, param_dtype
        self._replicated: list[nn.Parameter] = []

    def setup_environment(self) -> None:
        """Take all processes as one group.

        Raises:
            ValueError: Layers would be split over some of the processes, and sharded over others.
        """
        processes, split = self.num_nodes * self.num_processes, tensor_parallel_size(self)
        if split not in (1, processes):
            raise ValueError(f"tensor_parallel_size={split} with {processes} processes; expected {processes}, or 1.")
        self._data_parallel_size = processes // split
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the model, then build the optimizers."""
        module: Any = self.lightning_module
        if tensor_parallel_size(self) != 1:
            parallelize(module, self.device_mesh["tensor_parallel"])
        elif not any(isinstance(part, FSDPModule) for part in module.modules()):
            self._shard(module)
        self._replicated = [p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        builds = is_overridden("configure_model", module)
        if not builds:  # Lightning insists on a hook in which its user shards
            module.__dict__["configure_model"] = types.MethodType(_noop_hook, module)
        try:
            super().setup(trainer)
        finally:
            if not builds:
                del module.__dict__["configure_model"]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state for a folder as Lightning does, for a file as one process would save it."""
        if saves_shards(self):
            return super().optimizer_state(optimizer)
        state = whole_optimizer_state(torch_optimizer(optimizer))
        return state if self.global_rank == 0 else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder of any number of processes, or a file of any strategy.

        Raises:
            ValueError: Keys are missing or have no place, or shapes differ; nothing was loaded then.
        """
        module: Any = self.lightning_module
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = None if path.is_dir() else torch.load(path, "cpu", mmap=True, weights_only=weights_only)
        state = saved_tensors(path) if checkpoint is None else checkpoint.pop("state_dict")
        if get_record(module) is not None:
            check_state(module, state, str(path))
        if checkpoint is None:
            return super().load_checkpoint(path, weights_only)
        module.load_state_dict(own_state(module, state), strict=module.strict_loading)
        for optimizer, saved in zip(self.optimizers, checkpoint.pop("optimizer_states", []), strict=False):
            optimizer.load_state_dict(own_optimizer_state(optimizer, saved))
        return dict(checkpoint)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of what is not sharded."""
        super().post_backward(closure_loss)
        average_gradients(self._replicated, self.device_mesh["data_parallel"].get_group())

    def _shard(self, module: pl.LightningModule) -> None:
        mesh: Any = self.device_mesh["data_parallel"]
        self.precision_plugin.convert_module(module)  # so that units are read and sharded in the type that they have
        units = plan_units(module, self.wrap_modules, mesh.size())
        weights = self._base_weights(module)
        check_one_base(module)
        rank_zero_info(f"\n{units}")
        policy = MixedPrecisionPolicy()
        if self.param_dtype is not None:
            policy = MixedPrecisionPolicy(param_dtype=getattr(torch, self.param_dtype), reduce_dtype=torch.float32)
        start_adapters(module, self.root_device)
        replicated = list(units.replicated.values())
        for name, unit in units.modules.items():
            if weights is not None:
                read_into(unit, name, weights, self.root_device)
            broadcast_trained(unit, self.root_device, without=replicated)
            fully_shard(
                unit,
                mesh=mesh,
                reshard_after_forward=None if self.reshard_after_forward else False,  # what is around blocks stays
                mp_policy=policy,
                ignored_params=set(replicated),
            )
        broadcast_trained(module, self.root_device)

    def _base_weights(self, module: nn.Module) -> BaseWeightFiles | None:
        """Return the files that parameters on the meta device are read from; None if there are no such parameters.

        Raises:
            ValueError: No files were given; the base would be random.
        """
        empty = [name for name, p in base_parameters(module).items() if p.is_meta]
        if not empty:
            return None
        path = getattr(module, "base_weights", None) if self.base_weights == "auto" else self.base_weights
        if path is None:
            raise ValueError(f"{empty[0]} has no values (meta device); give FSDP2Strategy(base_weights=FOLDER).")
        return find_base_weights(module, path)


def _noop_hook(module: pl.LightningModule) -> None:
    """Do nothing; Lightning only asks whether the hook is there."""


for _name in ("fsdp2", "fsdp2strategy", "lightning_peft.fsdp2strategy"):  # Lightning reads a bare class path as a name
    StrategyRegistry.register(_name, FSDP2Strategy, "Shards a frozen base by FSDP2 once its adapters are there.")
