"""Pictures of a run, written by a callback that knows no method."""

import struct

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from trainer_models import data, module, trainer

import lightning_peft as lp
from lightning_peft import plots
from lightning_peft.recipes.plot_callback import PlotCallback


def names(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def run(tmp_path, method, pictures, base="llama", **settings):
    logger = CSVLogger(tmp_path, name="run", flush_logs_every_n_steps=1000)  # nothing is written before the end
    few = {"limit_train_batches": 4, "limit_val_batches": 1, "accumulate_grad_batches": 1}
    made = trainer(lp.PEFTStrategy(method, show_summary=False), pictures, logger=logger, **few, **settings)
    trained = module(base)
    made.fit(trained, data(), data())
    return trained, tmp_path / "run" / "version_0"


@pytest.mark.parametrize(
    ("method", "base", "expected"),
    [
        (lp.AdaLoRA(initial_rank=4, target_rank=2, interval=1), "llama", ["rank_map.png"]),
        (lp.LLaMAAdapter(length=3, layers=2), "llama", ["gate_map.png", "prompt_similarity.png"]),
        (lp.PromptTuning(length=4), "bert", ["prompt_similarity.png"]),
        (lp.LoRA(), "llama", []),
    ],
    ids=["AdaLoRA", "LLaMAAdapter", "PromptTuning", "LoRA"],
)
def test_each_method_gets_the_pictures_that_fit(method, base, expected, tmp_path):
    _, folder = run(tmp_path, method, PlotCallback(), base)
    assert names(folder) == sorted(["curves_val_loss.png", *expected])
    for name in names(folder):
        content = (folder / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", content[16:24])) > 100


def test_the_last_pictures_show_the_trained_adapters(tmp_path):
    trained, folder = run(tmp_path, lp.LLaMAAdapter(length=3, layers=2), PlotCallback(every_n_epochs=5), epochs=2)
    again = plots.save(plots.gate_map(trained), tmp_path / "again.png")
    assert (folder / "gate_map.png").read_bytes() == again.read_bytes()


def test_pictures_come_every_n_epochs_and_at_the_end(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(PlotCallback, "_adapters", lambda self, trainer, module: drawn.append(trainer.current_epoch))
    run(tmp_path, lp.LoRA(), PlotCallback(every_n_epochs=2), epochs=5, num_sanity_val_steps=1)
    assert drawn == [1, 3, 5]  # after the second and the fourth epoch; none while checking


def test_a_trial_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = trainer(
        lp.PEFTStrategy(lp.LLaMAAdapter(), show_summary=False), PlotCallback(), fast_dev_run=True, logger=None
    )
    made.fit(module(), data(), data())
    assert not list(tmp_path.rglob("*.png"))


def test_without_a_logger_the_adapters_are_drawn_all_the_same(tmp_path):
    strategy = lp.PEFTStrategy(lp.LLaMAAdapter(), show_summary=False)
    trainer(strategy, PlotCallback(), default_root_dir=tmp_path).fit(module(), data())  # and without validation
    assert names(tmp_path) == ["gate_map.png", "prompt_similarity.png"]


def test_where_parameters_are_sharded_curves_are_drawn_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lightning_peft.recipes.plot_callback.SHARDING", (SingleDeviceStrategy,))
    with caplog.at_level("INFO"):
        _, folder = run(tmp_path, lp.LLaMAAdapter(length=3), PlotCallback())
    assert names(folder) == ["curves_val_loss.png"]
    assert "Adapters are sharded, and not drawn" in caplog.text


def test_settings_are_checked():
    for value in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"every_n_epochs must be a positive whole number, got {value}"):
            PlotCallback(every_n_epochs=value)
