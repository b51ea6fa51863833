"""Pictures of adapters in the loggers of a run, with the loggers themselves."""

import importlib.util

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from trainer_models import data, module, trainer

import lightning_peft as lp
from lightning_peft.recipes.plot_callback import PlotCallback

PNG = b"\x89PNG\r\n\x1a\n"
GATES_AND_TOKENS = ["gate_map", "prompt_similarity"]
TOKENS = lp.PromptTuning(length=2)  # has one small figure, which is drawn at once


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def run(logger, method=None, epochs=2, **settings):
    """Train two steps in each epoch, with validation after each."""
    method = method or lp.LLaMAAdapter(length=3, layers=2)
    few = {"limit_train_batches": 2, "limit_val_batches": 1, "accumulate_grad_batches": 1, "num_sanity_val_steps": 1}
    made = trainer(
        lp.PEFTStrategy(method, show_summary=False), PlotCallback(**settings), logger=logger, epochs=epochs, **few
    )
    made.fit(module(), data(), data())
    assert made.state.finished


def tensorboard_images(folder):
    """Return the steps of each tag, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    images = {tag: events.Images(tag) for tag in events.Tags()["images"]}
    assert all(image.encoded_image_string.startswith(PNG) for found in images.values() for image in found)
    return {tag: [image.step for image in found] for tag, found in images.items()}


@needs("tensorboard")
@pytest.mark.slow
def test_tensorboard_shows_each_figure_once_for_each_step(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    run(logger)
    assert tensorboard_images(logger.log_dir) == dict.fromkeys(GATES_AND_TOKENS, [2, 4])
    run(TensorBoardLogger(tmp_path), lp.AdaLoRA(initial_rank=4, target_rank=2, interval=1), epochs=3, every_n_epochs=2)
    assert tensorboard_images(tmp_path / "lightning_logs" / "version_1") == {"rank_map": [4, 6]}


@needs("tensorboard")
@pytest.mark.slow
def test_loggers_of_the_other_name_space_show_figures(tmp_path):
    from pytorch_lightning.loggers import TensorBoardLogger as Other

    run(logger := Other(tmp_path), epochs=1)
    assert tensorboard_images(logger.log_dir) == dict.fromkeys(GATES_AND_TOKENS, [2])


@needs("tensorboard")
@pytest.mark.slow
@pytest.mark.parametrize("reason", ["log_figures", "sharded"])
def test_loggers_get_no_figures_where_they_should_not_or_no_rank_has_whole_adapters(reason, tmp_path, monkeypatch):
    if reason == "sharded":
        monkeypatch.setattr("lightning_peft.recipes.plot_callback.SHARDING", (SingleDeviceStrategy,))
    run(logger := TensorBoardLogger(tmp_path), epochs=1, log_figures=reason != "log_figures")
    assert tensorboard_images(logger.log_dir) == {}


def test_a_logger_that_shows_no_figures_is_named_once_with_the_place_of_the_files(tmp_path, caplog):
    logger = CSVLogger(tmp_path)
    with caplog.at_level("INFO"):
        run(logger, TOKENS, epochs=3)
    said = [record.getMessage() for record in caplog.records if "no figures" in record.getMessage()]
    assert said == [f"CSVLogger shows no figures. prompt_similarity.png lies in {logger.log_dir}."]
    assert (tmp_path / "lightning_logs" / "version_0" / "prompt_similarity.png").read_bytes().startswith(PNG)


def test_a_logger_is_not_told_about_where_there_is_nothing_to_show(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(CSVLogger(tmp_path), lp.LoRA(), epochs=1)
    assert "no figures" not in caplog.text


@needs("tensorboard")
def test_a_logger_that_fails_is_warned_of_once_and_the_run_goes_on(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route")

    broken, other = TensorBoardLogger(tmp_path, name="broken"), TensorBoardLogger(tmp_path, name="other")
    monkeypatch.setattr(broken.experiment, "add_figure", fail)
    with pytest.warns(UserWarning, match="gets no more figures") as caught:
        run([broken, other], TOKENS)
    assert [str(warning.message) for warning in caught if "figures" in str(warning.message)] == [
        "TensorBoardLogger gets no more figures, since it did not take prompt_similarity: OSError('no route')"
    ]
    assert tensorboard_images(other.log_dir) == {"prompt_similarity": [2, 4]}
    assert tensorboard_images(broken.log_dir) == {}


@needs("wandb")
@pytest.mark.slow
def test_an_offline_run_of_wandb_keeps_the_figures(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, log_model=False)
    run(logger)
    found = sorted((tmp_path / "wandb").glob("offline-run-*/files/media/images/*.png"))
    wandb.finish()
    assert [path.name.rpartition("_")[0].rpartition("_")[0] for path in found] == sorted(GATES_AND_TOKENS * 2)
    assert all(path.read_bytes().startswith(PNG) for path in found)


@needs("mlflow")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of mlflow's own
def test_mlflow_keeps_the_figures_as_artifacts(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    run(logger)
    found = {name: logger.experiment.list_artifacts(logger.run_id, name) for name in GATES_AND_TOKENS}
    assert {name: [artifact.path for artifact in artifacts] for name, artifacts in found.items()} == {
        name: [f"{name}/step_00000002.png", f"{name}/step_00000004.png"] for name in GATES_AND_TOKENS
    }
    (folder,) = (tmp_path / "mlruns").glob(f"*/{logger.run_id}/artifacts")
    assert all(path.read_bytes().startswith(PNG) for path in folder.rglob("*.png"))
