"""DeepSpeed, run on the CPU where it is installed: files hold what trains alone, loading is strict about adapters."""

import functools
import importlib.util
import logging
import os
import warnings

import parallel_laws as laws
import pytest
import torch
from cases import methods_for
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy
from processes import together
from trainer_models import data, module, trainer

import lightning_peft as lp
from lightning_peft.training.distributed.lightning_strategies import prepare_strategy, start_strategy

KINDS = ("LoRA-decompose-all", "IA3", "LastLayers", "PrefixTuning", "PromptTuning")
absent = importlib.util.find_spec("deepspeed") is None


class OnCPU(DeepSpeedStrategy):
    """Lightning's strategy without its question for CUDA, and without DeepSpeed's compiled parts."""

    root_device = torch.device("cpu", 0)

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        from deepspeed import ops

        ops.__compatible_ops__ = dict.fromkeys(ops.__compatible_ops__, False)
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def on_cpu(stage=2):
    return OnCPU(stage=stage, process_group_backend="gloo")


class Keep(laws.Keep):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        from deepspeed.utils import safe_get_full_grad

        found = {n: safe_get_full_grad(p) for n, p in pl_module.named_parameters() if p.requires_grad}
        if all(gradient is not None for gradient in found.values()):
            self.gradients = {name: gradient.clone() for name, gradient in found.items()}


def all_laws(folder, stage):
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo")
    make, found = functools.partial(on_cpu, stage), {}
    for number, case in enumerate(c for c in methods_for("llama") if str(c).removeprefix("llama-") in KINDS):
        keep, place = Keep(), folder / f"{number}"
        trained = laws.fit(case, make, keep, max_steps=1)
        off = laws.difference(keep.gradients, laws.gradients_alone(case))
        resumed = laws.resumed(case, make, place)
        saved = torch.load(place / "epoch=0.ckpt/checkpoint/mp_rank_00_model_states.pt", weights_only=False)
        names = {n for n in saved["module"] if ".peft." not in n} | set(saved.get("frozen_param_fragments") or ())
        trains = {n for n, p in trained.named_parameters() if p.requires_grad}
        found[str(case)] = off, resumed, sorted(names - trains), laws.same_everywhere(laws.state(trained))
    return found


@pytest.mark.slow
@pytest.mark.skipif(absent, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_those_of_one_process_and_files_hold_what_trains(tmp_path, stage):
    os.environ["DS_ACCELERATOR"] = "cpu"
    for found in together(all_laws, tmp_path, stage):
        assert len(found) == len(KINDS)
        for case, (off, resumed, frozen, differ) in found.items():
            assert off < 1e-4, case
            assert resumed == [], case
            assert frozen == [], case
            assert differ == [], case


def life(folder):
    warnings.simplefilter("ignore")
    tuned, other = module(), module()
    peft = functools.partial(lp.PEFTStrategy, lp.LoRA(rank=2), show_summary=False)
    tuner = trainer(peft(), strategy=on_cpu(), devices=2, limit_train_batches=4)
    tuner.fit(tuned, data())
    tuner.save_checkpoint(folder / "last.ckpt")
    expected = tuner.test(tuned, data(), verbose=False)
    fresh = trainer(peft(), strategy=on_cpu(), devices=2)
    tested = fresh.test(other, data(), ckpt_path=folder / "last.ckpt", verbose=False)
    wrong = trainer(
        lp.PEFTStrategy(lp.LoRA(rank=2, targets=["all-linear"]), show_summary=False), strategy=on_cpu(), devices=2
    )
    try:
        wrong.test(module(), data(), ckpt_path=folder / "last.ckpt", verbose=False)
        refused = ""
    except (RuntimeError, ValueError) as error:
        refused = str(error)
    return expected == tested, refused


@pytest.mark.slow
@pytest.mark.skipif(absent, reason="deepspeed is not installed")
def test_a_file_is_tested_and_does_not_fit_other_adapters(tmp_path):
    os.environ["DS_ACCELERATOR"] = "cpu"
    for tested_alike, refused in together(life, tmp_path):
        assert tested_alike
        assert "lora" in refused


class Engineless(DeepSpeedStrategy):
    """Knows its settings without DeepSpeed."""

    def __init__(self, stage):
        self.config, self.exclude_frozen_parameters = {"zero_optimization": {"stage": stage}}, False


def test_deepspeed_leaves_the_base_out_unless_told_otherwise():
    for full in (False, True):
        strategy = Engineless(2)
        prepare_strategy(strategy, full, {})
        assert strategy.exclude_frozen_parameters == (not full)


def test_what_deepspeed_would_lose_is_refused():
    with pytest.raises(ValueError, match="stage 3 .*FSDP2Strategy"):
        prepare_strategy(Engineless(3), False, {})
    with pytest.raises(ValueError, match="'lora' is frozen by a factor of 0"):
        prepare_strategy(Engineless(2), False, {"lora": 0})
    method = lp.AdaLoRA(initial_rank=4, target_rank=2)
    model = lp.inject(module(), method)
    with pytest.raises(ValueError, match="AdaLoRA adds a penalty"):
        start_strategy(Engineless(2), model)
