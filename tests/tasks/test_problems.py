"""TextClassification on scores and on several labels a text: losses, metrics and predictions beside their formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything

import lightning_peft as lp
from lightning_peft.tasks import TextClassification, TextDataModule

Write = Callable[..., str]
SEVERAL = {"problem_type": "multi_label_classification"}
SCORES = {"problem_type": "regression"}
CONSTANT = pytest.mark.filterwarnings("ignore:The variance of predictions")  # of a network that is not trained yet


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[*callbacks],
        enable_checkpointing=False,
        **quiet,
        **settings,
    )


def constant(module: TextClassification, bias: list[float]) -> TextClassification:
    """Return a module whose logits are its bias."""
    torch.nn.init.zeros_(module.network.classifier.weight)
    module.network.classifier.bias.data = torch.tensor(bias)
    return module


@pytest.mark.slow
@CONSTANT
def test_scores_are_learned_measured_and_predicted(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, write: Write
) -> None:
    seed_everything(1, verbose=False)
    values = {"good": 1.5, "bad": -1.0, "fine": 0.75, "awful": -2.25}
    path = write("t.jsonl", [{"text": f"the film was {word}", "label": value} for word, value in values.items()] * 4)
    data = TextDataModule(path, path, path, path, **SCORES, tokenizer=encoder_tokenizer, batch_size=4)
    module = TextClassification(config=bert, num_classes=1, learning_rate=5e-3)
    training = trainer(tmp_path, max_epochs=30, check_val_every_n_epoch=30)
    training.fit(module, data)
    assert set(training.callback_metrics) >= {"train_loss", "val_loss", "val_mse", "val_pearson", "val_spearman"}
    found = torch.cat([batch["scores"] for batch in trainer(tmp_path).predict(module, data)])
    x, y = found.double(), torch.tensor(list(values.values()) * 4).double()
    (metrics,) = trainer(tmp_path).test(module, data, verbose=False)
    assert metrics["test_mse"] == pytest.approx(((x - y) ** 2).mean().item(), rel=1e-4)
    assert metrics["test_loss"] == pytest.approx(metrics["test_mse"], rel=1e-4)
    deviations = [v - v.mean() for v in (x, y)]
    pearson = (deviations[0] * deviations[1]).sum() / (deviations[0].norm() * deviations[1].norm())
    assert metrics["test_pearson"] == pytest.approx(pearson.item(), rel=1e-4)
    assert metrics["test_pearson"] > 0.9
    assert metrics["test_spearman"] == pytest.approx(1.0, abs=0.05)
    assert module.network.config.problem_type == "regression"
    assert module.network.config.num_labels == 1


def test_several_labels_are_measured_as_their_formulas(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, write: Write
) -> None:
    rows = [["a", "b"], ["a"], [], ["c"], ["a", "b"]]
    path = write("t.jsonl", [{"text": "good", "label": row} for row in rows])
    data = TextDataModule(path, test=path, predict=path, **SEVERAL, tokenizer=encoder_tokenizer, batch_size=2)
    module = constant(TextClassification(config=bert, num_classes=3, multi_label=True), [0.9, 0.2, -0.5])
    (metrics,) = trainer(tmp_path).test(module, data, verbose=False)  # predicts a and b; all logits below 1
    right, wrong, missing = 5, 5, 1  # of ten decisions a or b: three a and two b are right; c is missing once
    assert metrics["test_micro_f1"] == pytest.approx(2 * right / (2 * right + wrong + missing))
    assert metrics["test_macro_f1"] == pytest.approx((2 * 3 / (2 * 3 + 2) + 2 * 2 / (2 * 2 + 3) + 0) / 3)
    assert metrics["test_exact_match"] == pytest.approx(2 / 5)
    p = torch.tensor([0.9, 0.2, -0.5]).sigmoid()
    y = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1], [1, 1, 0]])
    assert metrics["test_loss"] == pytest.approx(-(y * p.log() + (1 - y) * (1 - p).log()).mean().item(), rel=1e-4)
    predictions = trainer(tmp_path).predict(module, data)
    assert [row for batch in predictions for row in batch["labels"]] == [["a", "b"]] * 5
    assert torch.allclose(predictions[0]["probabilities"], p.expand(2, 3))
    assert module.network.config.problem_type == "multi_label_classification"


def test_the_threshold_decides(bert: dict[str, Any]) -> None:
    module = TextClassification(config=bert, num_classes=3, multi_label=True, threshold=0.7).eval()
    constant(module, [0.9, 0.8, -9.0])  # .711, .690
    batch = {"input_ids": torch.tensor([[2, 5, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert module.predict_step(batch, 0)["labels"] == [[0]]
    logits, labels = module.problem.measured(torch.tensor([[0.9, 0.8, -9.0]]), torch.tensor([[1.0, 0, 0]]))
    module.val_metrics.update(logits, labels)
    assert module.val_metrics.compute()["val_exact_match"] == 1


@pytest.mark.parametrize(
    ("settings", "labels", "kind", "message"),
    [
        ({"num_classes": 1}, [1, 2], {}, "'single_label_classification', but num_classes=1 .*'regression'. Set probl"),
        ({"num_classes": 1}, [1, 2], {}, "Set problem_type: regression in the data, or num_classes: 2, and leave mu"),
        ({"num_classes": 2}, [0.5, 2], SCORES, "'regression', but num_classes=2 .* or num_classes: 1, and leave"),
        ({"num_classes": 2}, [["a"], ["b"]], SEVERAL, "or num_classes: 2 and multi_label: true in TextClassification"),
        ({"num_classes": 2, "multi_label": True}, ["a", "b"], {}, "mean 'multi_label_classification'. Set probl"),
        ({"num_classes": 3, "multi_label": True}, [["a"], ["b"]], SEVERAL, "the data has 2 classes: 'a', 'b'. Set num"),
    ],
)  # fmt: skip
def test_data_of_another_problem_is_refused_both_ways(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, write: Write,
    settings: dict[str, Any], labels: list[Any], kind: dict[str, Any], message: str,
) -> None:  # fmt: skip
    path = write("t.jsonl", [{"text": "good", "label": label} for label in labels])
    data = TextDataModule(path, path, **kind, tokenizer=encoder_tokenizer)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1).fit(TextClassification(config=bert, **settings), data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes=0, expected 2 or more for classes, or 1 for a score"),
        ({"num_classes": 1, "multi_label": True}, "num_classes=1, expected 2 or more for several labels a text"),
        ({"num_classes": 3, "multi_label": True, "threshold": 1.0}, "threshold=1.0, expected a probability between"),
        ({"num_classes": 3, "threshold": 0.3}, "threshold=0.3, which only multi_label=True asks for"),
    ],
)
def test_settings_that_mean_no_problem_are_refused(
    bert: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TextClassification(config=bert, **settings)


@pytest.mark.parametrize("kind", [SCORES, SEVERAL], ids=["scores", "several"])
@pytest.mark.parametrize("architecture", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
@CONSTANT
def test_adapters_train_and_are_saved_with_the_problem(
    request: pytest.FixtureRequest, tmp_path: Path, encoder_tokenizer: str, write: Write,
    kind: dict[str, str], architecture: str,
) -> None:  # fmt: skip
    labels = [0.5, 2.0] if kind is SCORES else [["a"], ["a", "b"]]
    path = write("t.jsonl", [{"text": "good film", "label": label} for label in labels] * 4)
    data = TextDataModule(path, path, **kind, tokenizer=encoder_tokenizer, batch_size=4)
    config = request.getfixturevalue(architecture)
    module = TextClassification(config=config, num_classes=1 if kind is SCORES else 2, multi_label=kind is SEVERAL)
    strategy = lp.PEFTStrategy(lp.LoRA(rank=2, alpha=4), also_train=["head"], show_summary=False)
    trainer(tmp_path, strategy, max_steps=2).fit(module, data)
    moved = [adapter.b.abs().max() for *_, adapter in lp.adapters(module)]
    assert len(moved) == 4
    assert min(moved) > 0
    assert module.network.config.pad_token_id == 0
    lp.merge(module.network).save_pretrained(tmp_path / "merged")
    saved = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert saved["problem_type"] == kind["problem_type"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SCORES, SEVERAL], ids=["scores", "several"])
def test_a_frozen_trunk_can_be_cached(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, write: Write, kind: dict[str, str]
) -> None:
    words = ["good", "bad", "fine", "awful"]
    labels = [0.5, 2.0, -1, 3] if kind is SCORES else [["a"], ["a", "b"], [], ["b"]]
    path = write("t.jsonl", [{"text": word, "label": label} for word, label in zip(words, labels, strict=True)])
    found = []
    for cache in (False, True):
        seed_everything(1, verbose=False)
        data = TextDataModule(path, path, **kind, tokenizer=encoder_tokenizer, padding="max_length", max_length=8)
        module = TextClassification(config=bert, num_classes=1 if kind is SCORES else 2, multi_label=kind is SEVERAL)
        strategy = lp.PEFTStrategy(lp.OutputLayers(), cache_frozen=cache, show_summary=False)
        training = trainer(tmp_path, strategy, max_epochs=2)
        training.fit(module, data)
        found.append(training.callback_metrics["val_loss"].item())
    assert found[0] == found[1]


@pytest.mark.parametrize("settings", [{"num_classes": 1}, {"num_classes": 3, "multi_label": True}])
def test_sample_batches_have_labels_of_the_problem(bert: dict[str, Any], settings: dict[str, Any]) -> None:
    module = TextClassification(config=bert, **settings)
    batch = module.sample_batch(2, 5)
    assert batch["labels"].dtype == torch.float32
    assert module.problem.loss(*module.labelled(batch)).isfinite()
