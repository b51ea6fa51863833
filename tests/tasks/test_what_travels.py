"""Names of classes and tokenizers travel with adapters: in folders, checkpoints and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from transformers import AutoTokenizer

import lightning_peft as lp
from lightning_peft.checkpoints.companion_files import COMPANIONS
from lightning_peft.tasks import Choices, TextClassification, TextDataModule

NEW = [{"text": "a plot was awful"}, {"text": "the ending was good"}, {"text": "fine"}]


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **settings})


def strategy(method: Any = None) -> lp.PEFTStrategy:
    return lp.PEFTStrategy(method or lp.LoRA(rank=2), also_train=["classifier"], show_summary=False)


@pytest.fixture
def module(bert: dict[str, Any]) -> Any:
    """Builds the module over the same base each time."""

    def build() -> TextClassification:
        torch.manual_seed(0)
        return TextClassification(config=bert, num_classes=2)

    return build


@pytest.fixture
def trained(tmp_path: Path, module: Any, encoder_tokenizer: str, reviews: str) -> TextClassification:
    fitted: TextClassification = module()
    training = trainer(tmp_path, strategy(), max_steps=1, limit_val_batches=0)
    training.fit(fitted, TextDataModule(reviews, tokenizer=encoder_tokenizer))
    training.save_checkpoint(tmp_path / "trained.ckpt")
    return fitted


def predictions(folder: Path, fresh: Any, data: Any, **settings: Any) -> list[dict[str, Any]]:
    predicting = trainer(folder, strategy(), lp.PredictionWriter(folder / "out.jsonl"))
    predicting.predict(fresh, data, return_predictions=False, **settings)
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("source", ["folder", "checkpoint"])
def test_an_adapter_alone_predicts_by_name(
    source: str, tmp_path: Path, module: Any, trained: TextClassification, encoder_tokenizer: str, write: Any
) -> None:
    data: Any = TextDataModule(predict=write("new.jsonl", NEW), tokenizer=encoder_tokenizer)
    fresh, settings = module(), {}
    if source == "folder":
        lp.load_adapter(fresh, lp.save_adapter(trained, tmp_path / "adapter"))
    else:
        data.setup("predict")
        data, settings = data.predict_dataloader(), {"ckpt_path": tmp_path / "trained.ckpt"}
    rows = predictions(tmp_path, fresh, data, **settings)
    expected = trained.eval().network(**AutoTokenizer.from_pretrained(encoder_tokenizer)("fine", return_tensors="pt"))
    assert fresh.network.config.label2id == {"neg": 0, "pos": 1}
    assert [row["row"] for row in rows] == [1, 2, 3]
    assert list(rows[2]["probabilities"].values()) == pytest.approx(expected.logits.softmax(1)[0].tolist(), abs=1e-5)
    assert all(row["label"] == max(row["probabilities"], key=row["probabilities"].get) for row in rows)
    assert set(rows[0]["probabilities"]) == {"neg", "pos"}


def test_the_tokenizer_lies_beside_the_adapter(
    tmp_path: Path, trained: TextClassification, encoder_tokenizer: str
) -> None:
    trained.tokenizer.chat_template = "{{ messages }}"
    folder = Path(lp.save_adapter(trained, tmp_path / "adapter"))
    found = AutoTokenizer.from_pretrained(folder)
    assert found("the plot")["input_ids"] == AutoTokenizer.from_pretrained(encoder_tokenizer)("the plot")["input_ids"]
    assert found.chat_template == "{{ messages }}"
    assert json.loads((folder / "adapter_config.json").read_text())["class_names"] == ["neg", "pos"]
    own = lp.inject(torch.nn.Sequential(torch.nn.Linear(2, 2)), lp.LoRA(rank=1, targets=["0"]))
    plain = Path(lp.save_adapter(own, tmp_path / "plain"))
    assert sorted(path.name for path in plain.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(TypeError, match="tokenizer must have save_pretrained.*got a str"):
        lp.save_adapter(trained, tmp_path / "other", tokenizer=encoder_tokenizer)
    assert not (tmp_path / "other").exists()


def test_an_adapter_is_not_evaluated_on_classes_of_other_names(
    tmp_path: Path, module: Any, trained: TextClassification, encoder_tokenizer: str, write: Any
) -> None:
    folder = lp.save_adapter(trained, tmp_path / "adapter")
    rows = [{"text": "good", "label": label} for label in ("bad", "good")]
    other = TextDataModule(write("train.jsonl", rows), test=write("test.jsonl", rows), tokenizer=encoder_tokenizer)
    fresh = lp.load_adapter(module(), folder)
    with pytest.raises(ValueError, match="trained on the classes 'neg', 'pos', and the data has 'bad', 'good'"):
        trainer(tmp_path, strategy()).test(fresh, other)
    again = lp.load_adapter(module(), folder)
    trainer(tmp_path, strategy(), max_steps=1, limit_val_batches=0).fit(
        again, other
    )  # which goes on with other classes
    assert again.class_names == ["bad", "good"]


def test_an_export_has_the_tokenizer_and_the_names(tmp_path: Path, module: Any, trained: TextClassification) -> None:
    folder = Path(lp.export_peft(trained, tmp_path / "peft", metrics={"accuracy": 0.5}))
    assert AutoTokenizer.from_pretrained(folder)("the plot")["input_ids"] == trained.tokenizer("the plot")["input_ids"]
    assert 'from_pretrained("path/to/base", id2label={0: "neg", 1: "pos"})' in (folder / "README.md").read_text()
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", *COMPANIONS}
    assert {path.name for path in folder.iterdir()} <= names
    fresh = lp.import_peft(module(), folder)
    assert fresh.class_names == ["neg", "pos"]
    (folder / "class_names.json").write_text('{"class_names": "neg"}')
    with pytest.raises(ValueError, match=r"class_names\.json has no list of names"):
        lp.import_peft(module(), folder)


def test_names_of_classes_in_damaged_settings_are_refused(tmp_path: Path, trained: TextClassification) -> None:
    training = torch.load(tmp_path / "trained.ckpt", weights_only=True)
    assert training["lightning_peft"]["class_names"] == ["neg", "pos"]
    training["lightning_peft"]["class_names"] = [1, 2]
    torch.save(training, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match="its settings lack names of classes"):
        lp.load_from_checkpoint(TextClassification, tmp_path / "damaged.ckpt")


def test_choices_have_names_where_there_is_one_task(t5: dict[str, Any]) -> None:
    module = Choices(config=t5)
    assert module.class_names is None
    module.names = [["no", "yes"]]
    assert module.class_names == ["no", "yes"]
    module.names = [["no", "yes"], ["a", "b"]]
    assert module.class_names is None
