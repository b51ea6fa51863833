"""How often the training step of each task waits for its device, and why; see docs/performance.md."""

from collections import Counter
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from device_waits import DeviceWaits
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from trainer_models import Module, data, trainer

import lightning_peft as lp
from lightning_peft import tasks
from lightning_peft.ops import value_checks

SIDES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50}
LLAMA = {"model_type": "llama", "num_key_value_heads": 2, **SIDES}
BERT = {"model_type": "bert", **SIDES}
VIT = {"model_type": "vit", "image_size": 8, "patch_size": 4, **{k: v for k, v in SIDES.items() if k != "vocab_size"}}
T5 = {
    "model_type": "t5", "vocab_size": 50, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "d_kv": 8,
    "pad_token_id": 0,
}  # fmt: skip
# How many places have a label decides how many logits there are: one wait, for their numbers.
LABELS = ("nonzero", "lightning_peft/losses/places.py:of")
TASKS = {
    "TextClassification": (lambda: tasks.TextClassification(config=BERT, num_classes=3), {}),
    "TokenClassification": (lambda: tasks.TokenClassification(config=BERT, num_classes=3), {}),
    "ImageClassification": (lambda: tasks.ImageClassification(config=VIT, num_classes=3), {}),
    "Cloze": (lambda: tasks.Cloze(config=BERT), {}),
    "CausalLM": (lambda: tasks.CausalLM(config=LLAMA), {LABELS: 1}),
    "Seq2Seq": (lambda: tasks.Seq2Seq(config=T5), {LABELS: 1}),
    # How many choices there are decides how many rows the model is called with.
    "Choices": (lambda: tasks.Choices(config=LLAMA), {LABELS: 2}),
}


@pytest.fixture(autouse=True)
def _reading_costs(monkeypatch):
    monkeypatch.setattr(value_checks, "_FREE", ())
    monkeypatch.setattr(value_checks, "_ASSERTING", ("cpu", "cuda", "meta"))


@pytest.mark.parametrize("name", TASKS)
def test_a_training_step_waits_as_often_as_the_table_says(name):
    make, expected = TASKS[name]
    module = make()
    lp.inject(module, lp.LoRA(rank=2))
    module.log = module.log_dict = lambda *args, **kwargs: None
    if name == "Cloze":
        module.tokenizer = SimpleNamespace(mask_token_id=1)
    batch = module.sample_batch(2, 16)
    with DeviceWaits("cpu") as waits:
        module.training_step(batch, 0).backward()
    assert waits.outside_of("transformers") == Counter(expected)


class Watch(pl.Callback):
    """Records the waits of the last epoch's steps."""

    def __init__(self, device):
        self.waits = DeviceWaits(device)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self.waits.found.clear()
            self.waits.without_wait.clear()
            self.waits.__enter__()

    def on_train_epoch_end(self, trainer, module):
        self.waits.__exit__(None, None, None)


class MetaAccelerator(CPUAccelerator):
    def setup_device(self, device):
        pass


class OnMeta(SingleDeviceStrategy):
    """Trains on the meta device."""

    def __init__(self):
        super().__init__(torch.device("meta"), MetaAccelerator())

    def reduce(self, tensor, *args, **kwargs):
        return torch.ones(()) if tensor.is_meta and not tensor.is_floating_point() else tensor

    def teardown(self):
        pass


METHODS = [lp.AdaLoRA(initial_rank=4, target_rank=2, interval=2), lp.LLaMAAdapter(length=2)]


def fit(device, methods=METHODS, module=None, cache_frozen=False, **settings):
    """Return the waits of eight steps of a Trainer."""
    strategy, watch = lp.PEFTStrategy(methods, show_summary=False, cache_frozen=cache_frozen), Watch(device)
    defaults = {"accumulate_grad_batches": 1, "gradient_clip_val": 1.0, "log_every_n_steps": 100}
    tuner = trainer(watch, strategy, **defaults | settings)
    tuner.fit(module or Module("plain"), data())
    assert tuner.global_step % 8 == 0
    return watch.waits


def of_package(waits):
    return Counter({key: count for key, count in waits.found.items() if key[1].startswith("lightning_peft/")})


@pytest.mark.slow
def test_steps_of_a_trainer_on_a_device_wait_for_nothing(monkeypatch):
    monkeypatch.setattr(_ResultCollection, "cpu", lambda self: self)  # at the end of a run, Lightning copies
    monkeypatch.setattr(_LoggerConnector, "teardown", lambda self: None)  # what was logged to the CPU
    waits = fit("meta", accelerator="auto", strategy=OnMeta())
    assert waits.found == Counter()
    assert {place for _, place in waits.without_wait} == {"lightning/fabric/utilities/apply_func.py:batch_to"}


@pytest.mark.slow
def test_what_is_logged_is_read_by_lightning_alone():
    assert of_package(fit("cpu", log_every_n_steps=1)) == Counter()


class Fused(Module):
    fused = True

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01, fused=self.fused)


class NotFused(Fused):
    fused = False


@pytest.mark.slow
@pytest.mark.parametrize(("module", "count"), [(Fused, 8), (NotFused, 0)])
def test_after_a_gradient_scaler_the_package_reads_once_whether_the_step_was_skipped(module, count):
    """Of other optimizers than fused ones, the scaler itself reads it."""
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    place = ("_local_scalar_dense", "lightning_peft/training/optimizer_steps.py:_after_step")
    waits = fit("cpu", module=module("plain"), plugins=[precision], gradient_clip_val=None)
    assert of_package(waits) == +Counter({place: count})


@pytest.mark.slow
def test_a_cache_of_the_frozen_trunk_reads_what_a_batch_holds_to_find_its_rows():
    """Ids and types of tokens, once each; the steps of the last epoch skip the trunk."""
    waits = fit("cpu", [lp.LastLayers(count=1)], Module("bert"), cache_frozen=True, epochs=3)
    assert waits.found["cpu", "lightning_peft/training/frozen_cache/row_store.py:row_keys"] == 2 * 8
