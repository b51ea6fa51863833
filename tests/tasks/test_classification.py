from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything

from lightning_peft.tasks import TextClassification, TextDataModule

Write = Callable[..., str]


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, **{"enable_checkpointing": False, **quiet, **settings})


def test_a_separable_problem_is_learned_and_a_checkpoint_predicts_names(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, reviews: str, write: Write
) -> None:
    seed_everything(3, verbose=False)
    data = TextDataModule(reviews, validation=reviews, test=reviews, tokenizer=encoder_tokenizer)
    module = TextClassification(config=bert, num_classes=2, learning_rate=5e-3)
    training = trainer(tmp_path, max_epochs=24, check_val_every_n_epoch=24)
    training.fit(module, data)
    logged = {"train_loss", "train_padding", "val_loss", "val_accuracy", "val_macro_f1"}
    assert set(training.callback_metrics) == logged
    assert training.callback_metrics["val_accuracy"] == training.callback_metrics["val_macro_f1"] == 1.0
    assert training.callback_metrics["val_loss"] < 0.1
    training.save_checkpoint(tmp_path / "trained.ckpt")

    new = write("new.jsonl", [{"text": "a plot was awful"}, {"text": "the ending was good"}])
    fresh = TextClassification(config=bert, num_classes=2)
    data = TextDataModule(predict=new, test=reviews, tokenizer=encoder_tokenizer)
    (batch,) = trainer(tmp_path).predict(fresh, data, ckpt_path=tmp_path / "trained.ckpt", weights_only=True)
    assert batch["labels"] == ["neg", "pos"]
    assert torch.allclose(batch["probabilities"].sum(dim=1), torch.ones(2))
    (results,) = trainer(tmp_path).test(fresh, data, verbose=False)
    assert results["test_accuracy"] == results["test_macro_f1"] == 1.0


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_two_steps_train_every_kind_of_model_on_pairs_too(
    request: pytest.FixtureRequest, tmp_path: Path, encoder_tokenizer: str, write: Write, architecture: str
) -> None:
    rows = [{"a": "good film", "b": "bad", "label": row % 3} for row in range(12)]
    data = TextDataModule(write("t.jsonl", rows), text=["a", "b"], tokenizer=encoder_tokenizer, batch_size=4)
    module = TextClassification(config=request.getfixturevalue(architecture), num_classes=3)
    before = {name: value.clone() for name, value in module.network.named_parameters()}
    trainer(tmp_path, max_steps=2).fit(module, data)
    after = dict(module.network.named_parameters())
    unchanged = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert not unchanged
    assert module.network.config.pad_token_id == 0


def test_logits_do_not_depend_on_padding_or_labels(bert: dict[str, Any]) -> None:
    module = TextClassification(config=bert, num_classes=5).eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    logits = module(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert logits.shape == (1, 5)
    padded = {"input_ids": torch.tensor([[2, 5, 6, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
    assert torch.allclose(module(**padded, labels=torch.tensor([1])), logits, atol=1e-6)


def test_metrics_are_those_of_all_rows_not_means_of_batches(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, write: Write
) -> None:
    labels = [0, 0, 0, 1, 1]
    files = {"train": write("t.jsonl", [{"text": "good", "label": label} for label in labels])}
    data = TextDataModule(**files, test=files["train"], tokenizer=encoder_tokenizer, batch_size=3)
    module = TextClassification(config=bert, num_classes=2)
    torch.nn.init.zeros_(module.network.classifier.weight)
    module.network.classifier.bias.data = torch.tensor([1.0, 0.0])  # always class 0
    (results,) = trainer(tmp_path).test(module, data, verbose=False)
    assert results["test_accuracy"] == pytest.approx(3 / 5)
    assert results["test_macro_f1"] == pytest.approx((2 * 3 / 8 + 0) / 2)
    losses = torch.tensor([1.0, 0.0]).log_softmax(dim=0)
    assert results["test_loss"] == pytest.approx(-(3 * losses[0] + 2 * losses[1]).item() / 5)


def test_the_number_of_classes_must_be_the_datas(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, reviews: str
) -> None:
    data = TextDataModule(reviews, tokenizer=encoder_tokenizer)
    module = TextClassification(config=bert, num_classes=3)
    with pytest.raises(ValueError, match=r"num_classes=3, but the data has 2 classes: 'neg', 'pos'. Set num_classes=2"):
        trainer(tmp_path, max_steps=1).fit(module, data)
    with pytest.raises(ValueError, match="num_classes=0, expected 2 or more"):
        TextClassification(config=bert, num_classes=0)
    with pytest.raises(ValueError, match="learning_rate=0, expected a number above 0"):
        TextClassification(config=bert, num_classes=2, learning_rate=0)


def test_dropout_is_on_from_the_first_step(tmp_path: Path, bert: dict[str, Any]) -> None:
    TextClassification(config=bert, num_classes=2).network.eval().save_pretrained(tmp_path)
    module = TextClassification(str(tmp_path), num_classes=2)
    assert all(part.training for part in module.modules())
    ids = torch.tensor([[2, 5, 6, 3]])
    assert not torch.equal(module(input_ids=ids), module(input_ids=ids))


def test_labels_without_known_names_are_numbers(bert: dict[str, Any]) -> None:
    module = TextClassification(config=bert, num_classes=2).eval()
    prediction = module.predict_step({"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]])}, 0)
    assert prediction["labels"] == prediction["probabilities"].argmax(dim=1).tolist()
