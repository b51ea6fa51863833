from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_peft.tasks import (
    CausalLM,
    ImageClassification,
    ImageDataModule,
    InstructionDataModule,
    Seq2Seq,
    Seq2SeqDataModule,
    TextClassification,
    TextDataModule,
)
from lightning_peft.tasks.pretrained import build_tokenizer


class LinkedCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.link_arguments("model.model", "data.model")


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    """No arguments of pytest's, lines long enough for any help, and nothing on how Lightning calls jsonargparse."""
    monkeypatch.setattr("sys.argv", ["program"])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def test_a_yaml_file_trains_a_classifier(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, reviews: str
) -> None:
    config = {
        "seed_everything": 1,
        "trainer": {"accelerator": "cpu", "fast_dev_run": True, "enable_progress_bar": False},
        "model": {"config": bert, "num_classes": 2, "schedule": "cosine"},
        "data": {"train": reviews, "text": ["text"], "tokenizer": encoder_tokenizer},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    cli = LightningCLI(TextClassification, TextDataModule, args=["fit", "--config", str(path)])
    assert cli.datamodule.classes == ["neg", "pos"]
    assert cli.trainer.global_step == 1
    assert cli.model.hparams["schedule"] == "cosine"


def test_the_data_can_take_its_tokenizer_from_the_model(
    tmp_path: Path, bert: dict[str, Any], encoder_tokenizer: str, reviews: str
) -> None:
    TextClassification(config=bert, num_classes=2).network.save_pretrained(tmp_path)
    build_tokenizer(encoder_tokenizer).save_pretrained(tmp_path)
    arguments = [f"--model.model={tmp_path}", "--model.num_classes=2", f"--data.train={reviews}"]
    cli = LinkedCLI(TextClassification, TextDataModule, args=arguments, run=False)
    assert cli.datamodule.tokenizer("good")["input_ids"] == [2, 4, 3]


@pytest.mark.parametrize(
    ("module", "data"),
    [
        (TextClassification, TextDataModule),
        (CausalLM, InstructionDataModule),
        (Seq2Seq, Seq2SeqDataModule),
        (ImageClassification, ImageDataModule),
    ],
)
def test_help_explains_every_argument(module: type, data: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        LightningCLI(module, data, args=["--help"], run=False)
    shown = " ".join(capsys.readouterr().out.split())
    for part in (module, data):
        arguments = part.__doc__.partition("Args:")[2].partition("Examples:")[0].strip().splitlines()
        assert len(arguments) >= 8
        for line in arguments:
            name, _, text = line.strip().partition(": ")
            assert text.partition("(")[0].strip() in shown, name
