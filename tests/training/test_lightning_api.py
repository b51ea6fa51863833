"""What is trusted of Lightning beyond its public interface holds in the installed release."""

import inspect

import lightning.pytorch as pl
import torch
from lightning.pytorch.core import saving
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.compile import from_compiled
from trainer_models import Module, trainer

import lightning_peft as lp
from lightning_peft.cli.main import PEFTCLI
from lightning_peft.training import lightning_api as api


def test_a_strategy_that_spawns_is_known():
    """Else adapters that are injected in a spawned process are lost without a word."""
    assert api.spawns_processes(pl.Trainer(strategy="ddp_spawn", devices=2, accelerator="cpu", logger=False))
    assert not api.spawns_processes(pl.Trainer(strategy="ddp", devices=2, accelerator="cpu", logger=False))
    assert not api.spawns_processes(trainer())


def test_a_module_knows_its_trainer_and_whether_it_is_compiled():
    """Else what trains is not widened under mixed precision, and compiled modules are cut into parts."""
    module, own = Module(), trainer()
    assert api.trainer_of(module) is None
    module.trainer = own
    assert api.trainer_of(module) is own
    assert not api.is_compiled(module)
    assert api.is_compiled(from_compiled(torch.compile(Module())))  # as a Trainer takes it


def test_an_optimizer_comes_out_of_its_wrapper():
    """Else sharded checkpoints hold the state of a wrapper, which is none."""
    optimizer = torch.optim.SGD(Module().parameters(), lr=0.1)
    assert api.torch_optimizer(LightningOptimizer(optimizer)) is optimizer
    assert api.torch_optimizer(optimizer) is optimizer


def test_sharding_strategies_say_what_they_save_and_split():
    """Else a folder is written where a file was asked for."""
    assert [api.saves_shards(FSDPStrategy(state_dict_type=kind)) for kind in ("sharded", "full")] == [True, False]
    assert [api.saves_shards(ModelParallelStrategy(save_distributed_checkpoint=kind)) for kind in (1, 0)] == [1, 0]
    assert api.saves_shards(lp.FSDP2Strategy(save_distributed_checkpoint=False)) is False
    assert api.tensor_parallel_size(lp.FSDP2Strategy(tensor_parallel_size=2)) == 2


def test_saved_arguments_stand_where_they_are_looked_for():
    """Else a checkpoint that names code is not refused before Lightning sees it."""
    assert api.SAVED_ARGUMENTS == ("hparams", "module_arguments", "hyper_parameters")
    source = inspect.getsource(saving._load_state)
    assert f'pop("{api.INSTANTIATOR}", None)' in source, "Lightning looks for what builds a module under another key"
    assert callable(PEFTCLI.__mro__[1]._parse_ckpt_path), "LightningCLI reads arguments of checkpoints elsewhere"
    assert callable(PEFTCLI.__mro__[1]._prepare_subcommand_parser), (
        "LightningCLI adds arguments of subcommands elsewhere"
    )
