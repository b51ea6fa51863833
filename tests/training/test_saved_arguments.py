"""A checkpoint never causes an import, whatever its saved arguments name."""

import sys

import cli_models
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from trainer_models import Module, data, trainer

import lightning_peft as lp
from lightning_peft.cli.main import PEFTCLI, main
from lightning_peft.training.saved_arguments import check_names

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*LightningCLI's args parameter")
OWN = "lightning.pytorch.cli.instantiate_module"
NAMES = {
    "an instantiator": {"_instantiator": "intruder.build"},
    "an instantiator among older arguments": {"hparams": {"_instantiator": "intruder.build"}},
    "an instantiator that is no text": {"_instantiator": 3},
    "the class of the module": {"_instantiator": OWN, "_class_path": "intruder.Net"},
    "a class below": {"_instantiator": OWN, "model": {"class_path": "intruder.Net", "init_args": {}}},
    "a class in a list": {"_instantiator": OWN, "model": [{"class_path": "intruder.part.Net"}]},
    "a class by its name alone": {"_instantiator": OWN, "place": "intruder.Net"},
    "a part of an imported package": {"_instantiator": OWN, "place": "json.tool"},
    "a class as a key": {"_instantiator": OWN, "place": {"intruder.Net": 1}},
}


@pytest.fixture
def intruder(tmp_path, monkeypatch):
    """A module that notes that it was imported; it must not be."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "intruder.py").write_text("import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()")
    yield
    assert not {"intruder", "json.tool"} & sys.modules.keys()
    assert not (tmp_path / "intruder.ran").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    callbacks = [lp.PEFTStrategy(lp.LoRA(rank=2), show_summary=False), ModelCheckpoint(folder, save_last=True)]
    trainer(*callbacks, epochs=1).fit(Module(), data())
    return folder / "last.ckpt"


@pytest.mark.usefixtures("intruder")
@pytest.mark.parametrize("case", NAMES)
def test_a_checkpoint_that_names_code_is_refused_before_it_runs(case, checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    named = dict(NAMES[case])
    saved |= {key: named.pop(key) for key in list(named) if key == "hparams"}
    saved["hyper_parameters"] |= named
    torch.save(saved, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="a file (must not choose what runs|never causes an import)"):
        lp.load_from_checkpoint(Module, tmp_path / "bad.ckpt")


def test_what_the_program_has_imported_may_be_named(checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    saved["hyper_parameters"] |= {"_instantiator": OWN, "_class_path": "trainer_models.Module"}
    torch.save(saved, tmp_path / "good.ckpt")
    expected = lp.load_from_checkpoint(Module, checkpoint).state_dict()
    found = lp.load_from_checkpoint(Module, tmp_path / "good.ckpt").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.usefixtures("intruder")
def test_names_that_are_no_import_pass():
    check_names(
        {"file": "data.csv", "of": ["a b.c", "1.5", "intruder", "torch.nn.Linear", "json.txt", 3, None, {"x": "v1.2"}]}
    )
    check_names(None)
    assert "intruder" not in sys.modules


@pytest.mark.usefixtures("intruder")
def test_the_command_line_imports_nothing_that_a_checkpoint_names(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    quiet = [f"--trainer.{name}=false" for name in ("enable_progress_bar", "enable_model_summary", "logger")]
    given = ["--data=cli_models.Numbers", "--peft.method=LoRA", "--peft.method.rank=2"]
    given += ["--peft.method.targets=[net.0]", *quiet]
    run = ["--model=cli_models.Net", *given, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    run += [f"--trainer.default_root_dir={tmp_path}", "--seed_everything=3"]
    cli = PEFTCLI(args=["fit", *run, "--optimizer=SGD", "--optimizer.lr=0.1"])
    path = tmp_path / "saved.ckpt"
    cli.trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    saved["hyper_parameters"] = {"_instantiator": OWN, "_class_path": "intruder.Net"}
    torch.save(saved, path)
    with pytest.raises(SystemExit, match="names 'intruder.Net'.*never causes an import"):
        main(["validate", *run, f"--ckpt_path={path}"])
    saved["hyper_parameters"] = {"_instantiator": OWN, "_class_path": f"{cli_models.__name__}.Net", "late": False}
    torch.save(saved, path)
    main(["validate", *run, f"--ckpt_path={path}"])
    assert "val_loss" in capsys.readouterr().out
