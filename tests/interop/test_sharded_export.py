"""Exports of models that FSDP has sharded: what another process would have written, or a refusal."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import MODELS
from parallel_laws import quiet
from processes import together
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore
from trainer_models import data, module, trainer

import lightning_peft as lp

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of FSDP1
FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")


@pytest.fixture
def group():
    """Return a function that pretends that there are so many processes, none of which sends anything."""

    def pretend(count):
        backend, store = ("gloo", dist.HashStore()) if count == 1 else ("fake", FakeStore())
        dist.init_process_group(backend, store=store, rank=0, world_size=count)

    yield pretend
    dist.destroy_process_group()


def adapted(name="llama", also_train=()):
    model = lp.inject(MODELS[name](), lp.LoRA(rank=2), also_train)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def wrapped(model, **settings):
    block = type(model.get_submodule("model.layers.0" if hasattr(model, "model") else "bert.encoder.layer.0"))
    policy = ModuleWrapPolicy([block, nn.Embedding])
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **{"use_orig_params": True, **settings}
    )


@pytest.mark.parametrize(("name", "also_train"), [("llama", []), ("bert", ["classifier"])])
def test_names_of_wrappers_stay_out_of_the_files(name, also_train, group, tmp_path):
    lp.export_peft(adapted(name, also_train), tmp_path / "plain")
    group(1)
    model = adapted(name, also_train)
    wrapped(model)
    assert any("_fsdp_wrapped_module" in module_name for module_name, _ in model.named_modules())
    lp.export_peft(model, tmp_path / "wrapped")
    for file in FILES:
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


@pytest.mark.parametrize("write", [lp.export_peft, lp.save_adapter])
@pytest.mark.parametrize(("count", "keeps_parameters"), [(2, True), (1, False)])
def test_parameters_flattened_by_other_hands_are_refused(write, count, keeps_parameters, group, tmp_path):
    group(count)
    model = adapted()
    if not keeps_parameters:
        model.requires_grad_()  # all alike, as torch asks for
    wrapped(model, use_orig_params=keeps_parameters)
    with pytest.raises(
        TypeError, match=r"FullyShardedDataParallel by other code.*strategy of lightning_peft, or .*fully_shard"
    ):
        write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def exported(folder, strategy):
    quiet()
    model = module("bert")
    peft = lp.PEFTStrategy(lp.LoRA(rank=2), also_train=["classifier"], show_summary=False)
    trainer(peft, strategy=strategy(), devices=2, limit_train_batches=2).fit(model, data())
    lp.save_adapter(model, folder / "ours")
    lp.export_peft(model, folder / "peft")
    kinds = (FullyShardedDataParallel, FSDPModule)
    return any(isinstance(part, kinds) for part in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [lp.FSDP1Strategy, lp.FSDP2Strategy])
def test_two_processes_write_what_one_would(strategy, tmp_path):
    assert together(exported, Path(tmp_path), strategy) == [True, True]
    lp.export_peft(lp.load_adapter(module("bert"), tmp_path / "ours"), tmp_path / "one")
    for file in FILES:
        assert (tmp_path / "peft" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
