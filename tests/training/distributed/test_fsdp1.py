"""FSDP1 gives the gradients of one process, resumes to the bit, and gathers nothing of what is frozen."""

import copy
import functools
import os
import warnings

import lightning.pytorch as pl
import parallel_laws as laws
import pytest
import torch
from cases import Case, methods_for
from lightning.pytorch.strategies import FSDPStrategy
from processes import together
from torch import nn
from trainer_models import data, module, trainer

import lightning_peft as lp
from lightning_peft.checkpoints.adapter_state import strip_wrapper_names
from lightning_peft.ops.sharded_tensors import shard_of
from lightning_peft.training.distributed.fsdp1_wrapping import check_flattens
from lightning_peft.training.distributed.sharding_plan import plan_units

KINDS = ("LoRA-decompose-all", "LastLayers", "BitFit", "FullFineTuning", "PrefixTuning", "PromptTuning")


def whole(parameter, tensor):
    shard = shard_of(parameter)
    return tensor.clone() if shard is None else shard.full(torch.zeros_like(parameter) if tensor is None else tensor)


class Keep(laws.Keep):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        trained = [(strip_wrapper_names(n), p) for n, p in pl_module.named_parameters() if p.requires_grad]
        self.gradients = {name: whole(p, p.grad) for name, p in trained}


class KeepClipped(Keep):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pass  # clipping follows

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_before_optimizer_step(trainer, pl_module, None)


def first_gradients(case, strategy, keep=Keep, **settings):
    keep = keep()
    laws.fit(case, strategy, keep, max_steps=1, **settings)
    return keep.gradients


def size(path):
    return sum(os.path.getsize(p) for p in ([path] if path.is_file() else path.rglob("*")))


def all_laws(folder, chosen):
    laws.quiet()
    found = {}
    for number, case in enumerate(c for c in methods_for("llama") if str(c).removeprefix("llama-") in chosen):
        off = [laws.difference(first_gradients(case, lp.FSDP1Strategy), laws.gradients_alone(case))]
        resumed = []
        for kind in ("full", "sharded"):
            place = folder / f"{number}{kind}"
            resumed += laws.resumed(case, functools.partial(lp.FSDP1Strategy, state_dict_type=kind), place)
        found[str(case)] = (*off, resumed, size(folder / f"{number}full" / "epoch=0.ckpt"))
    return found


@pytest.mark.slow
def test_gradients_are_those_of_one_process_and_runs_resume_to_the_bit(tmp_path):
    for found in together(all_laws, tmp_path, KINDS):
        assert len(found) == len(KINDS)
        for case, (off, resumed, _) in found.items():
            assert off < 1e-4, case
            assert resumed == [], case
        sizes = {case: size for case, (_, _, size) in found.items()}
        assert sizes["llama-PromptTuning"] < sizes["llama-FullFineTuning"] / 5  # in a model this small


def modes(folder):
    laws.quiet()
    case = next(c for c in methods_for("llama") if str(c) == "llama-LoRA-decompose-all")
    subset = next(c for c in methods_for("llama") if str(c) == "llama-BitFit")
    alone, found = laws.gradients_alone(case), {}
    kept = functools.partial(lp.FSDP1Strategy, reshard_after_forward=False)
    found["kept"] = laws.difference(first_gradients(case, kept), alone)
    for precision in ("bf16-mixed", "bf16-true"):
        ddp = laws.gradients(case, "ddp", precision=precision)
        found[precision] = laws.difference(first_gradients(case, lp.FSDP1Strategy, precision=precision), ddp)
    for name, one in (("adapters", case), ("base", subset)):
        clipped = first_gradients(one, lp.FSDP1Strategy, KeepClipped, gradient_clip_val=1e-3)
        found[f"clipped {name}"] = sum(g.double().square().sum() for g in clipped.values()).sqrt().item()
    return found


@pytest.mark.slow
def test_other_modes_are_right_as_well(tmp_path):
    for found in together(modes, tmp_path):
        assert found["kept"] < 1e-4
        assert found["bf16-mixed"] == found["bf16-true"] == 0
        assert found["clipped adapters"] == pytest.approx(1e-3, rel=1e-2)
        assert found["clipped base"] == pytest.approx(1e-3, rel=1e-2)


class Types(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.found = {strip_wrapper_names(n): p.dtype for n, p in pl_module.named_parameters()}


def life(folder):
    """A module's life in one Trainer after the other, over a base in bfloat16."""
    laws.quiet()
    types, model = Types(), module()
    model.net.bfloat16()
    start = copy.deepcopy(model)
    strategy = functools.partial(lp.FSDP1Strategy, ["LlamaDecoderLayer"])
    saves = pl.callbacks.ModelCheckpoint(folder, filename="last")
    peft = functools.partial(lp.PEFTStrategy, lp.LoRA(rank=2), show_summary=False)
    tuner = trainer(peft(), saves, types, strategy=strategy(), devices=2, epochs=2, limit_train_batches=2)
    tuner.fit(model, data())
    tuned = tuner.test(model, data(), verbose=False)
    lp.save_adapter(model, folder / "adapter")
    names = [n for n in tuner.strategy.lightning_module_state_dict() if ".peft." not in n]
    other = copy.deepcopy(start)
    again = trainer(peft(), strategy=strategy(state_dict_type="sharded"), devices=2)
    tested = again.test(other, data(), ckpt_path=folder / "last.ckpt", verbose=False)
    plain = lp.load_adapter(start, folder / "adapter")
    values = {n: p.detach() for n, p in plain.named_parameters() if ".peft." in n}
    same = [
        strip_wrapper_names(n)
        for n, p in model.named_parameters()
        if ".peft." in n and not torch.equal(p, values[strip_wrapper_names(n)])
    ]
    return names, tuned == tested, same, {t for n, t in types.found.items() if ".peft." not in n}, saves.best_model_path


@pytest.mark.slow
def test_files_serve_every_other_run_and_the_base_keeps_its_type(tmp_path):
    for names, tested_alike, changed, types, _ in together(life, tmp_path):
        assert names == []
        assert tested_alike
        assert changed == []
        assert types == {torch.bfloat16}
    one = module()
    one.net.bfloat16()
    tuner = trainer(lp.PEFTStrategy(lp.LoRA(rank=2), show_summary=False), epochs=2, limit_train_batches=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint")
        tuner.test(one, data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)  # of one process
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    state = one.state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[key], state[key]) for key in state)


def test_what_cannot_be_flattened_is_refused_by_name():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3).half())).requires_grad_(False)
    with pytest.raises(TypeError, match="FSDP2Strategy"):
        check_flattens(model, plan_units(model, None, 2))
    model = nn.Sequential(nn.Linear(3, 3, device="meta"))
    with pytest.raises(TypeError, match="0.weight is of torch.float32, on meta"):
        check_flattens(model, plan_units(model, None, 2))
    with pytest.raises(ValueError, match="'full' or 'sharded'"):
        lp.FSDP1Strategy(state_dict_type="local")


class Stock(FSDPStrategy):
    """Lightning's own, but for its refusal of the CPU."""


def test_lightnings_own_strategy_is_refused_with_advice():
    tuner = trainer(strategy=Stock(), devices=1)
    with pytest.raises(TypeError, match="FSDP2Strategy"):
        lp.PEFTStrategy(lp.LoRA(rank=2)).setup(tuner, module(), "fit")


class Start(pl.Callback):
    """Keeps what a run starts from."""

    def on_train_start(self, trainer, pl_module):
        self.values = {
            strip_wrapper_names(n): whole(p, p.detach()) for n, p in pl_module.named_parameters() if p.requires_grad
        }
        held = trainer.optimizers[0].state
        self.averages = [whole(p, held[p]["exp_avg"]) for g in trainer.optimizers[0].param_groups for p in g["params"]]


class End(Start):
    def on_train_start(self, trainer, pl_module):
        pass

    def on_train_end(self, trainer, pl_module):
        Start.on_train_start(self, trainer, pl_module)


def from_ddp(folder):
    laws.quiet()
    found = []
    for method in (lp.LoRA(rank=2), lp.LastLayers(count=1)):
        case, start, end = Case("llama", (method,)), Start(), End()
        saves = pl.callbacks.ModelCheckpoint(folder, filename=type(method).__name__)
        laws.fit(case, "ddp", saves, end, max_epochs=1)
        laws.fit(case, lp.FSDP1Strategy, start, path=f"{folder}/{type(method).__name__}.ckpt", max_epochs=2)
        found += [torch.equal(start.values[name], value) for name, value in end.values.items()]
        found += [torch.equal(a, b) for a, b in zip(start.averages, end.averages, strict=True)]
    return found


@pytest.mark.slow
def test_a_file_of_ddp_goes_on_under_fsdp1(tmp_path):
    for equal in together(from_ddp, str(tmp_path)):
        assert len(equal) > 40
        assert all(equal)
