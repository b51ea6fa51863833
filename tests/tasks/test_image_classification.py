from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from installed import needs
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy

import lightning_peft as lp
from lightning_peft.cli.trainer import PEFTTrainer
from lightning_peft.tasks import ImageClassification, ImageDataModule

pytestmark = needs("PIL")
VIT = {"model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2,
       "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
KINDS = {
    "vit": VIT,
    "swin": {"model_type": "swin", "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1],
             "num_heads": [1, 2], "window_size": 4},
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "image_size": 16},
    "resnet": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1],
               "layer_type": "basic"},
}  # fmt: skip


@pytest.fixture
def arrays(tmp_path: Path) -> str:
    """24 images: dark ones are cats, bright ones dogs."""
    labels = np.arange(24) % 2
    images = np.random.default_rng(0).integers(0, 100, (24, 16, 16, 3)) + 120 * labels[:, None, None, None]
    np.savez(tmp_path / "x.npz", images=images.astype(np.uint8), labels=labels, classes=np.array(["cat", "dog"]))
    return str(tmp_path / "x.npz")


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **quiet, **settings}
    return Trainer(default_root_dir=folder, accelerator="cpu", callbacks=list(callbacks), **settings)


def test_a_classifier_learns_names_its_classes_and_predicts(arrays: str, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    module = ImageClassification(config=VIT, num_classes=2, learning_rate=1e-2)
    data = ImageDataModule(train=arrays, test=arrays, predict=arrays, batch_size=8, crop_padding=0)
    training = trainer(tmp_path, max_epochs=4)
    training.fit(module, data)
    assert set(training.callback_metrics) == {"train_loss", "val_loss", "val_accuracy", "val_macro_f1"}
    (results,) = trainer(tmp_path).test(module, data, verbose=False)
    assert results["test_accuracy"] == results["test_macro_f1"] == 1
    assert module.network.config.id2label == {0: "cat", 1: "dog"}
    assert module.network.config.label2id == {"cat": 0, "dog": 1}
    first, *_ = trainer(tmp_path).predict(module, data)
    assert first["labels"] == ["cat", "dog"] * 4
    assert torch.allclose(first["probabilities"].sum(1), torch.ones(8))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_loss_are_the_models_own(kind: str) -> None:
    seed_everything(0, verbose=False)
    module = ImageClassification(config=KINDS[kind], num_classes=3).eval()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([2, 0])}
    wanted = module.network(**batch)
    assert torch.equal(module(**batch), wanted.logits)
    assert torch.allclose(cross_entropy(*module.labelled(batch)), wanted.loss)
    assert module(**module.sample_batch(2, 0)).shape == (2, 3)
    half = ImageClassification(config=KINDS[kind], num_classes=3, dtype="bfloat16").eval()
    assert half(**batch).dtype == torch.bfloat16


def test_a_pretrained_classifier_of_other_classes_gets_a_new_last_layer(arrays: str, tmp_path: Path) -> None:
    ImageClassification(config=VIT, num_classes=5).network.save_pretrained(tmp_path / "base")
    module = ImageClassification(model=str(tmp_path / "base"), num_classes=2)
    base = ImageClassification(model=str(tmp_path / "base"), num_classes=5)
    assert module.network.classifier.weight.shape == (2, 16)
    assert torch.equal(module.network.vit.layernorm.weight, base.network.vit.layernorm.weight)
    data = ImageDataModule(train=arrays, batch_size=24, validation_fraction=0)
    strategy = lp.PEFTStrategy(lp.LoRA(targets=["attention.query"]), also_train=["classifier"], show_summary=False)
    trainer(tmp_path, strategy, max_steps=1, limit_val_batches=0).fit(module, data)
    assert data.processor.size["height"] == 16  # the file has no preprocessor_config.json
    with pytest.raises(ValueError, match="num_classes=5, but the data has 2 classes: 'cat', 'dog'. Set num_classes=2"):
        trainer(tmp_path).validate(base, ImageDataModule(train=arrays), verbose=False)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*fork", "ignore:Checkpoint directory", "ignore:The dirpath")
def test_training_goes_on_exactly_inside_an_epoch(workers: int, arrays: str, tmp_path: Path) -> None:
    def run(folder: Path, resumed: Path | None = None) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        seed_everything(3, verbose=False)
        seen: list[torch.Tensor] = []
        module = ImageClassification(config=VIT, num_classes=2, schedule="constant", warmup_fraction=0)
        module.network.register_forward_pre_hook(
            lambda network, args, kwargs: seen.append(kwargs["pixel_values"].clone()), with_kwargs=True
        )
        data = ImageDataModule(train=arrays, batch_size=4, num_workers=workers, validation_fraction=0)
        saving = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=3, filename="{step}")
        strategy = lp.PEFTStrategy(lp.LoRA(targets=["attention.query"]), also_train=["classifier"], show_summary=False)
        trainer(folder, strategy, saving, max_steps=8, limit_val_batches=0).fit(module, data, ckpt_path=resumed)
        return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}, seen

    whole, images = run(tmp_path / "whole")
    resumed, again = run(tmp_path / "resumed", tmp_path / "whole" / "step=3.ckpt")
    assert len(images) == 8
    assert len(again) == 5
    assert all(torch.equal(a, b) for a, b in zip(images[3:], again, strict=True))
    assert len({image.sum().item() for batch in images for image in batch}) > 24  # augmented anew in the second epoch
    assert len(whole) > 3
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_evaluation_images_are_not_augmented(arrays: str, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    module = ImageClassification(config=VIT, num_classes=2)
    module.network.register_forward_pre_hook(
        lambda network, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    data = ImageDataModule(train=arrays, validation=arrays, batch_size=24)
    trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(module, data)
    (plain,) = data.val_dataloader()
    assert torch.equal(seen[-1], plain["pixel_values"])
    assert not torch.equal(seen[0].sort(0).values, plain["pixel_values"].sort(0).values)


def test_a_plan_needs_no_images_and_no_numbers_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    strategy = lp.PEFTStrategy(lp.LoRA(targets=["attention.query"]), also_train=["classifier"])
    module = ImageClassification(config=VIT, num_classes=2)
    PEFTTrainer(accelerator="cpu", logger=False, callbacks=[strategy]).plan(module, batch_size=4, processes=[1])
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert lines[1:3] == [["tokens", "layout"], ["data", "one"]]


def test_fewer_than_two_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="Got num_classes=1, expected 2 or more"):
        ImageClassification(config=VIT, num_classes=1)
