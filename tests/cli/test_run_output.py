"""What a run prints, and what it leaves: known messages of others are left out, all else is seen."""

import logging
import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from cli_models import Net, Numbers
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_peft as lp
from lightning_peft.cli.after_fit import name_values
from lightning_peft.cli.leftovers import remove_empty_run
from lightning_peft.cli.main import main
from lightning_peft.cli.quiet import KnownMessages, hide_known_messages, only_heads_are_new
from lightning_peft.cli.run_report import show_next
from lightning_peft.cli.test_rows import TestRows, wilson

REPORT = "BertForSequenceClassification LOAD REPORT from: folder\nKey | Status | \n----+----+-\n"


@pytest.fixture
def filters():
    """Take the filters away again that a test adds to loggers of this process."""
    with warnings.catch_warnings():
        yield
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.filters = [known for known in logger.filters if not isinstance(known, KnownMessages)]


def test_known_messages_are_left_out_and_others_are_seen(filters, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    hide_known_messages()
    seen = []
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed", "torchao"):
        logger = logging.getLogger(name)
        handler = logging.Handler()
        handler.emit = lambda record: seen.append(record.getMessage())
        logger.addHandler(handler)
        for text in ("GPU available: False, used: False", "Seed set to 1", "Failed to load /x/y.so: no", "Out of disk"):
            logger.warning(text)
        logger.removeHandler(handler)
    assert seen.count("Out of disk") == 3
    assert seen.count("GPU available: False, used: False") == 2
    assert seen.count("Seed set to 1") == 2
    assert seen.count("Failed to load /x/y.so: no") == 2


def test_warnings_are_left_out_by_their_text_alone(filters, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hide_known_messages()
        warnings.warn("Found 135 module(s) in eval mode at the start of training. This may lead to", stacklevel=1)
        warnings.warn("The loss is not a number", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["The loss is not a number"]


def test_a_load_report_is_left_out_only_if_nothing_but_a_head_is_new():
    assert only_heads_are_new(REPORT + "classifier.bias | MISSING | \nclassifier.weight | MISSING | \n")
    assert only_heads_are_new(REPORT + "score.weight | MISSING | \nlm_head.weight | UNEXPECTED | \n")
    assert not only_heads_are_new(REPORT + "classifier.bias | MISSING | \nbert.pooler.dense.bias | MISSING | \n")
    assert not only_heads_are_new(REPORT + "classifier.bias | MISMATCH | sizes differ\n")
    assert not only_heads_are_new("classifier.bias | MISSING | \n")
    assert only_heads_are_new(REPORT + "classifier.bias | \x1b[31mMISSING\x1b[0m | \n")  # as on a terminal


def test_the_margin_of_an_accuracy_is_wilsons():
    low, high = wilson(0.9, 100)
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)
    assert wilson(1.0, 10)[1] == 1.0
    assert round(wilson(1.0, 10)[0], 4) == 0.7225


class Named(Net):
    """Predicts classes that have names."""

    class_names = ["red", "green", "blue"]

    def test_step(self, batch, index):
        self.log("test_accuracy", (self.net(batch["x"]).argmax(1) == batch["labels"]).float().mean())

    def predict_step(self, batch, index):
        probabilities = self.net(batch["x"]).softmax(-1)
        return {"labels": [self.class_names[i] for i in probabilities.argmax(1)], "probabilities": probabilities}


def test_a_test_counts_rows_and_shows_the_first():
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    labels = x[:, :3].argmax(1)
    loader = torch.utils.data.DataLoader([{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)], 8)
    module, rows = Named(), TestRows()
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_checkpointing": False}
    pl.Trainer(**quiet, callbacks=[rows]).test(module, loader, verbose=False)
    assert rows.counts.tolist() == labels.bincount().tolist()
    most = 100 * int(labels.bincount().max()) / 24
    assert rows.accuracy(0.5) == (
        f"50.0 % of 24 rows (95 % interval 31.4 to 68.6); the most frequent class: {most:.1f} %"
    )
    expected = module.net(x[:3]).softmax(-1)
    assert [row["predicted"] for row in rows.first] == [Named.class_names[i] for i in expected.argmax(1)]
    assert [row["label"] for row in rows.first] == [Named.class_names[i] for i in labels[:3]]
    assert rows.first[0]["probability"] == pytest.approx(expected[0].max().item())
    rows.first[0] |= {"predicted": "red", "label": "blue", "probability": 0.75}
    rows.first[1] |= {"predicted": "green", "label": "green"}

    class Table:
        def texts(self, column):
            return [f"{column} {number}" for number in range(24)]

    class Data:
        columns = ["text"]
        splits = type("Splits", (), {"rows": lambda self, split: Table()})()

    lines = rows.examples(Data())
    assert lines[0].split() == ["red", "75%", "wrong:", "blue", "text", "0"]
    assert lines[1].split()[2:] == ["right", "text", "1"]
    assert len(lines) == 3
    assert rows.examples(Numbers()) == []


def test_an_accuracy_without_counted_rows_is_a_share():
    assert TestRows().accuracy(0.125) == "12.5 %"


def test_what_to_do_next_names_the_adapter(tmp_path, capsys):
    show_next(Net(), Numbers(), tmp_path, tmp_path / "adapter", TestRows())
    printed = capsys.readouterr().out
    assert f"lightning_peft.load_adapter(model, '{tmp_path / 'adapter'}')" in printed
    assert "predict" not in printed
    assert "import" not in printed
    show_next(Net(), Numbers(), tmp_path, None, TestRows())
    assert capsys.readouterr().out == ""


def test_what_to_do_next_imports_the_module_of_a_method_of_ones_own(tmp_path, capsys):
    class Own(lp.LoRA):
        pass

    model = lp.inject(Net(), [lp.LoRA(rank=2, targets=["net.0"]), Own(name="own", rank=2, targets=["net.2"])])
    show_next(model, Numbers(), tmp_path, tmp_path / "adapter", TestRows())
    *_, imported, loaded = capsys.readouterr().out.splitlines()
    assert imported == f"  import {__name__}  # defines the method"
    assert loaded == f"  lightning_peft.load_adapter(model, {str(tmp_path / 'adapter')!r})"


def arguments(tmp_path, *more):
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "runs")]
    given = ["--model", "cli_models.Net", "--data", "cli_models.Numbers", "--peft.method", "LoRA"]
    given += ["--optimizer", "SGD", "--optimizer.lr", "0.1"]
    return [
        "fit",
        *given,
        "--peft.method.targets",
        "[net.0]",
        "--peft.method.rank",
        "2",
        *quiet,
        *logger,
        "--seed_everything",
        "3",
        *more,
    ]


def test_a_run_that_fails_at_its_start_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-peft"])

    def broken(self, batch, index):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Net, "training_step", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        main(arguments(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_a_run_that_wrote_results_keeps_its_folder(tmp_path):
    logger = pl.loggers.CSVLogger(str(tmp_path), name="runs")
    trainer = pl.Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False)

    def run():
        with remove_empty_run(trainer):
            logger.log_metrics({"loss": 1.0}, 0)
            logger.save()
            raise OSError("later")

    with pytest.raises(OSError, match="later"):
        run()
    assert (tmp_path / "runs/version_0/metrics.csv").is_file()


def test_lightnings_own_summary_is_left_to_those_who_ask(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lightning-peft"])
    main(arguments(tmp_path, "--trainer.fast_dev_run", "1"))
    printed = capsys.readouterr().out
    assert printed.count("parameters train") == 1
    assert "Non-trainable params" not in printed
    main(arguments(tmp_path, "--trainer.fast_dev_run", "1", "--trainer.enable_model_summary", "true"))
    assert "Non-trainable params" in capsys.readouterr().out


class Answering(Net):
    def generate(self):
        """Makes it a model that writes texts."""


@pytest.mark.parametrize(("kind", "ending"), [(Net, "csv"), (Answering, "jsonl")])
def test_what_to_do_next_names_files_that_rows_can_be_in(tmp_path, capsys, kind, ending):
    (tmp_path / "config.yaml").touch()
    data = Numbers()
    data.splits = data.predict_dataloader = None
    show_next(kind(), data, tmp_path, tmp_path / "adapter", TestRows())
    assert f"--data.predict FILE.{ending} --predictions predictions.{ending}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("callbacks", "saving", "expected"),
    [
        ([ModelCheckpoint(monitor="val_loss")], True, r"those of the best val_loss, 0\.5000, in best\.ckpt"),
        ([ModelCheckpoint()], True, r"those of the last checkpoint, best\.ckpt; a ModelCheckpoint with monitor"),
        ([], False, "those of the last step, since no checkpoint was saved"),
    ],
)
def test_a_report_says_which_values_were_saved(tmp_path, callbacks, saving, expected):
    for callback in callbacks:
        callback.best_model_path, callback.best_model_score = str(tmp_path / "best.ckpt"), torch.tensor(0.5)
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=saving, callbacks=callbacks)
    assert re.match(expected, name_values(trainer))
