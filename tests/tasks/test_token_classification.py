"""TokenClassification learns, measures entities, predicts a tag for each word, and is saved with its tags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.tasks import MixedDataModule, TokenClassification, TokenDataModule

Write = Callable[..., str]
TAGS = ["B-x", "I-x", "O"]
ROWS = [
    {"tokens": ["the", "red", "film", "was", "good"], "tags": ["O", "B-x", "I-x", "O", "O"]},
    {"tokens": ["a", "blue", "film"], "tags": ["O", "B-x", "I-x"]},
    {"tokens": ["the", "plot", "was", "red"], "tags": ["O", "O", "O", "B-x"]},
    {"tokens": ["the", "ending"], "tags": ["O", "O"]},
]


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    shared = {"accelerator": "cpu", "enable_checkpointing": False, **quiet}
    return Trainer(default_root_dir=folder, callbacks=[*callbacks], **shared, **settings)


def constant(module: TokenClassification, bias: list[float]) -> TokenClassification:
    torch.nn.init.zeros_(module.network.classifier.weight)
    module.network.classifier.bias.data = torch.tensor(bias)
    return module


@pytest.mark.slow
def test_entities_are_learned_and_a_checkpoint_predicts_their_names(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, write: Write
) -> None:
    seed_everything(3, verbose=False)
    path = write("t.jsonl", ROWS * 4)
    data = TokenDataModule(path, path, path, tokenizer=encoder_tokenizer, batch_size=4)
    module = TokenClassification(config=bert, num_classes=3, learning_rate=5e-3)
    training = trainer(tmp_path, max_epochs=40, check_val_every_n_epoch=40)
    training.fit(module, data)
    names = ("f1", "precision", "recall", "accuracy")
    assert [training.callback_metrics[f"val_{name}"].item() for name in names] == [1, 1, 1, 1]
    training.save_checkpoint(tmp_path / "trained.ckpt")
    new = write("new.jsonl", [{"tokens": ["a", "red", "film"]}, {"tokens": ["the", "ending"]}])
    fresh = TokenClassification(config=bert, num_classes=3)
    predicting = TokenDataModule(predict=new, test=path, tokenizer=encoder_tokenizer)
    (batch,) = trainer(tmp_path).predict(fresh, predicting, ckpt_path=tmp_path / "trained.ckpt", weights_only=True)
    assert batch["tags"] == [["O", "B-x", "I-x"], ["O", "O"]]
    (results,) = trainer(tmp_path).test(fresh, predicting, verbose=False)
    assert results["test_f1"] == results["test_f1/x"] == 1


def test_metrics_are_those_of_all_rows(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, write: Write
) -> None:
    path = write("t.jsonl", ROWS)
    data = TokenDataModule(path, test=path, tokenizer=encoder_tokenizer, batch_size=3)
    module = constant(TokenClassification(config=bert, num_classes=3), [1.0, 0.0, 0.0])  # B-x for each word
    (results,) = trainer(tmp_path).test(module, data, verbose=False)
    words, entities, right = 14, 3, 1  # of the three entities one has one word
    assert results["test_accuracy"] == pytest.approx(3 / words)
    assert results["test_precision"] == pytest.approx(right / words)
    assert results["test_recall"] == pytest.approx(right / entities)
    assert results["test_f1"] == results["test_f1/x"] == pytest.approx(2 * right / (words + entities))
    log = torch.tensor([1.0, 0.0, 0.0]).log_softmax(0)
    expected = -(3 * log[0] + 11 * log[1]) / words  # the mean over words, not over batches
    assert results["test_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert module.network.config.id2label == {0: "B-x", 1: "I-x", 2: "O"}
    assert module.network.config.label2id == {"B-x": 0, "I-x": 1, "O": 2}


@pytest.mark.filterwarnings("ignore:.*words in 2 rows")
def test_words_that_were_cut_off_have_no_tag(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, write: Write
) -> None:
    data = TokenDataModule(predict=write("p.jsonl", ROWS[:2]), tokenizer=encoder_tokenizer, max_length=5)
    module = constant(TokenClassification(config=bert, num_classes=3), [0.0, 1.0, 0.0])
    (batch,) = trainer(tmp_path).predict(module, data)
    assert batch["tags"] == [[1, 1, 1, None, None], [1, 1, 1]]
    module.network.config.id2label = dict(enumerate(TAGS))
    (batch,) = trainer(tmp_path).predict(module, data)
    assert batch["tags"] == [["I-x", "I-x", "I-x", None, None], ["I-x", "I-x", "I-x"]]


def test_batches_without_words_have_a_tag_for_each_token(bert: dict[str, Any]) -> None:
    module = constant(TokenClassification(config=bert, num_classes=3).eval(), [0.0, 1.0, 0.0])
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    assert module.predict_step(batch, 0)["tags"] == [[1, 1, 1], [1, 1]]


@pytest.mark.parametrize("architecture", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_adapters_train_and_travel_with_the_tags(
    request: pytest.FixtureRequest, tmp_path: Path, encoder_tokenizer: str, write: Write, architecture: str
) -> None:
    path = write("t.jsonl", ROWS)
    data = TokenDataModule(path, path, tokenizer=encoder_tokenizer, batch_size=2)
    module = TokenClassification(config=request.getfixturevalue(architecture), num_classes=3)
    strategy = lp.PEFTStrategy(lp.LoRA(rank=2, alpha=4), also_train=["head"], show_summary=False)
    trainer(tmp_path, strategy, max_steps=2).fit(module, data)
    moved = [adapter.b.abs().max() for *_, adapter in lp.adapters(module)]
    assert len(moved) == 4
    assert min(moved) > 0
    lp.merge(module.network).save_pretrained(tmp_path / "merged")
    loaded = TokenClassification(str(tmp_path / "merged"), num_classes=3).eval()
    assert loaded.network.config.id2label == dict(enumerate(TAGS))
    batch = next(iter(data.val_dataloader()))
    torch.testing.assert_close(loaded(**batch), module.eval()(**batch), atol=1e-5, rtol=1e-5)


def test_the_number_of_tags_must_be_the_datas(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, write: Write
) -> None:
    data = TokenDataModule(write("t.jsonl", ROWS), tokenizer=encoder_tokenizer)
    module = TokenClassification(config=bert, num_classes=4)
    with pytest.raises(
        ValueError, match=r"num_classes=4, but the data has 3 classes: 'B-x', 'I-x', 'O'. Set num_classes=3"
    ):
        trainer(tmp_path, max_steps=1).fit(module, data)
    with pytest.raises(ValueError, match="num_classes=1, expected 2 or more, one for each tag"):
        TokenClassification(config=bert, num_classes=1)


def test_entities_need_names_of_tags(tmp_path: Path, bert: dict[str, Any]) -> None:
    row = {"input_ids": torch.tensor([2, 5, 3]), "attention_mask": torch.ones(3, dtype=torch.long)}
    rows = DataLoader([row | {"labels": torch.tensor([-100, 0, -100])}])
    module = TokenClassification(config=bert, num_classes=3)
    with pytest.raises(
        ValueError, match="Entities cannot be told, since tags have no names here. Give a DataModule with"
    ):
        trainer(tmp_path).test(module, rows, verbose=False)
    module.network.config.id2label = dict(enumerate(TAGS))  # as a model has that was trained before
    (results,) = trainer(tmp_path).test(constant(module, [1.0, 0.0, 0.0]), rows, verbose=False)
    assert results["test_f1"] == 1


def test_each_task_of_a_mixture_has_its_own_metrics(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, write: Write
) -> None:
    files = {"one": write("a.jsonl", ROWS), "other": write("b.jsonl", [ROWS[1], ROWS[2]] * 2)}
    tasks = {name: TokenDataModule(path, path, path, tokenizer=encoder_tokenizer) for name, path in files.items()}
    module = constant(TokenClassification(config=bert, num_classes=3), [1.0, 0.0, 0.0])
    (results,) = trainer(tmp_path).test(module, MixedDataModule(tasks), verbose=False)
    assert results["test_recall/one"] == pytest.approx(1 / 3)
    assert results["test_recall/other"] == pytest.approx(2 / 4)
    assert results["test_recall"] == pytest.approx(3 / 7)


def test_sample_batches_label_each_token(bert: dict[str, Any]) -> None:
    module = TokenClassification(config=bert, num_classes=3)
    logits, labels = module.labelled(module.sample_batch(2, 5))
    assert logits.shape == (10, 3)
    assert labels.tolist() == [0] * 10
