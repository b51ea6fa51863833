"""A classifier from the command line: from a fit to named predictions, to a merged folder and to an export."""

import csv
import json
import shutil

import pytest
import torch
import yaml

import lightning_peft as lp
from lightning_peft.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")
transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "fine", "awful", "film", "the", "was"]


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-peft"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of a small encoder with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("base")
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, **{"unk_token": "[UNK]"}))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=128, **special).save_pretrained(
        folder
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=128, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def config_of(folder, base, **more):
    labels = {"good": "pos", "fine": "pos", "bad": "neg", "awful": "neg"}
    rows = [{"text": f"the film was {word}", "label": label} for word, label in labels.items()] * 4
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "runs"}}
    run = {
        "seed_everything": 3,
        "model": {"class_path": "TextClassification", "init_args": {"model": str(base), "num_classes": 2}},
        "data": {"class_path": "TextDataModule", "init_args": {"train": str(folder / "train.jsonl")}},
        "peft": {"method": {"class_path": "LoRA", "init_args": {"rank": 2}}, "also_train": ["classifier"]},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "logger": logger, "log_every_n_steps": 1},
        **more,
    }
    run["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(run))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    """The config file and the folder of a run, and a file to predict."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lightning-peft"])
        path = config_of(folder, base)
        main(["fit", "--config", path])
    (folder / "new.csv").write_text("text\nthe film was bad\nfine film\ngood\n")
    return path, folder / "runs/version_0", folder / "new.csv"


def predict(run, tmp_path, *more):
    path, _, new = run
    without_training = ["--data.train", "null", "--data.predict", str(new), "--trainer.logger.save_dir", str(tmp_path)]
    main(["predict", "--config", path, *without_training, *more])


def expected(run, base):
    """What the reloaded model says of the file's rows."""
    net = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    net = lp.load_adapter(net, run[1] / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    batch = tokenizer(["the film was bad", "fine film", "good"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return net(**batch).logits.softmax(1)


@pytest.mark.parametrize("source", ["adapter", pytest.param("checkpoints/*.ckpt", marks=pytest.mark.slow)])
def test_an_adapter_or_a_checkpoint_alone_predicts_by_name(source, run, base, tmp_path, capsys):
    (found,) = run[1].glob(source)
    predict(run, tmp_path, "--ckpt_path", str(found))
    (path,) = tmp_path.rglob("predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert f"predictions: {path} (3 rows)" in capsys.readouterr().out
    assert [row["row"] for row in rows] == [1, 2, 3]
    given = torch.tensor([[row["probabilities"][name] for name in ("neg", "pos")] for row in rows])
    torch.testing.assert_close(given, expected(run, base), atol=1e-6, rtol=0)
    assert [row["label"] for row in rows] == [["neg", "pos"][number] for number in given.argmax(1)]


@pytest.mark.slow
def test_a_table_goes_where_the_option_says_and_a_method_need_not_be_repeated(run, base, tmp_path):
    predict(run, tmp_path, "--ckpt_path", str(run[1] / "adapter"), "--predictions", str(tmp_path / "a/out.csv"))
    checkpoint = str(next(run[1].glob("checkpoints/*.ckpt")))
    predict(run, tmp_path, "--ckpt_path", checkpoint, "--predictions", str(tmp_path / "b.csv"), "--peft.method", "null")
    tables = [list(csv.DictReader((tmp_path / name).read_text().splitlines())) for name in ("a/out.csv", "b.csv")]
    assert tables[0] == tables[1]
    assert [float(row["probability_pos"]) for row in tables[0]] == pytest.approx(expected(run, base)[:, 1].tolist())
    with pytest.raises(SystemExit, match=r"out\.txt', expected a file whose name ends with \.jsonl or \.csv"):
        predict(run, tmp_path, "--ckpt_path", checkpoint, "--predictions", str(tmp_path / "out.txt"))


def test_a_report_has_the_metrics_of_the_validation(run):
    report = json.loads((run[1] / "report.json").read_text())
    checkpoint = torch.load(report["checkpoint"], weights_only=True)
    assert set(report) >= {"val_loss", "val_accuracy", "val_macro_f1"}
    assert not any(name.startswith("train_") for name in report)
    assert {name: report[name] for name in checkpoint["validation_metrics"]} == checkpoint["validation_metrics"]
    with (run[1] / "metrics.csv").open(newline="") as file:
        logged = [float(row["val_loss"]) for row in csv.DictReader(file) if row.get("val_loss")]
    assert report["val_loss"] == pytest.approx(logged[-1], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("by_file", [False, True])
def test_a_merged_folder_classifies_by_name(by_file, run, base, tmp_path):
    path, folder, _ = run
    tools = ["--adapter", str(folder / "adapter"), "--output", str(tmp_path / "merged")]
    main(["merge", "--config", path, *tools, *(["--base", str(base)] if by_file else [])])
    classify = transformers.pipeline("text-classification", model=str(tmp_path / "merged"), top_k=None)
    for text, row in zip(["the film was bad", "fine film", "good"], expected(run, base).tolist(), strict=True):
        found = {entry["label"]: entry["score"] for entry in classify([text])[0]}
        assert found == pytest.approx(dict(zip(["neg", "pos"], row, strict=True)), abs=1e-6)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "merged").label2id == {"neg": 0, "pos": 1}


@pytest.mark.slow
@pytest.mark.parametrize("source", ["adapter", "checkpoints/*.ckpt"])
def test_an_export_has_tokenizer_and_names(source, run, tmp_path):
    (found,) = run[1].glob(source)
    main(["export", "--config", run[0], "--adapter", str(found), "--output", str(tmp_path / "peft")])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "peft")("the film")["input_ids"] == [9, 8]
    assert json.loads((tmp_path / "peft/class_names.json").read_text()) == {"class_names": ["neg", "pos"]}


@pytest.mark.slow
def test_the_tokenizer_of_the_adapter_stands_for_that_of_the_base(run, base, tmp_path):
    shutil.copytree(run[1] / "adapter", tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    main(["merge", "--config", run[0], "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--test_after_fit", "true"], "test_after_fit is true, but the data has test=null. Give the data a test set"),
        pytest.param(
            ["--ckpt_path", "ADAPTER"],
            "folder of an adapter, which has no state of an optimizer",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["test", "adapter"],
)
def test_what_would_fail_after_the_training_is_said_before_it(extra, said, run, base, tmp_path):
    path = config_of(tmp_path, base)
    with pytest.raises(SystemExit, match=said):
        main(["fit", "--config", path, *[str(run[1] / "adapter") if word == "ADAPTER" else word for word in extra]])
    assert not list(tmp_path.rglob("*.ckpt"))
