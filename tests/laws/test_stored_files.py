"""Adapter folders and checkpoints that an earlier version wrote load, to the bit, and runs go on from them."""

import json
import math

import lightning.pytorch as pl
import pytest
import torch
from models import BEFORE_5
from safetensors.torch import load_file
from stored.cases import CASES
from stored.models import Task
from stored.running import FOLDER, expected, fit, outputs, stored_names, unpack_checkpoint

import lightning_peft as lp

pytestmark = pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMES = list(stored_names())
TRAINED = [name for name in NAMES if CASES[name].trains]
OWN_NAMES = [name for name in NAMES if CASES[name].build is None]  # the others have several groups of adapters


@pytest.fixture(autouse=True)
def _libraries(request):
    name = request.node.callspec.params["name"] if hasattr(request.node, "callspec") else ""
    if CASES.get(name, CASES["lora"]).model in ("bert", "llama", "gpt2", "t5"):
        pytest.importorskip("transformers")
    if BEFORE_5 and CASES.get(name, CASES["lora"]).model == "t5":
        pytest.skip("before transformers 5, T5 has an output layer of its own under the same settings")
    if name == "lora_nf4":
        pytest.importorskip("torchao")


def test_there_are_files_of_every_case():
    assert set(NAMES) == set(CASES)
    assert len(NAMES) >= 60
    assert len(TRAINED) >= 18
    assert {path.parent.name for path in FOLDER.glob("*/checkpoint.ckpt.gz")} == set(TRAINED)


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_folder_loads_and_is_written_again_to_the_bit(name, tmp_path):
    model = lp.load_adapter(Task(CASES[name].model), FOLDER / name)
    lp.save_adapter(model, tmp_path)
    require_equal(load_file(tmp_path / WEIGHTS), load_file(FOLDER / name / WEIGHTS))
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (FOLDER / name, tmp_path))
    pairs = list(zip(before.pop("methods"), after.pop("methods"), strict=True))
    assert all(new == {**new, **old} for old, new in pairs)  # a later version may have more settings
    assert {**before, "sha256": ""} == {**after, "sha256": ""}


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_folder_computes_what_it_did(name):
    model = lp.load_adapter(Task(CASES[name].model), FOLDER / name)
    require_close(outputs(model, CASES[name]), expected(name)["outputs"])


@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_stored_folder_computes_the_same_under_another_name(name):
    model = lp.add_adapter(Task(CASES[name].model), FOLDER / name, "other")
    lp.activate(model, "other")
    require_close(outputs(model, CASES[name]), expected(name)["outputs"])


@pytest.mark.parametrize("name", TRAINED)
def test_a_stored_checkpoint_loads_to_the_bit_and_computes_what_it_did(name, tmp_path):
    path = unpack_checkpoint(name, tmp_path)
    model = lp.load_from_checkpoint(Task, path)
    require_equal(model.state_dict(), torch.load(path, weights_only=True)["state_dict"])
    require_close(outputs(model, CASES[name]), expected(name)["trained"])


class StartOf(pl.Callback):
    """Notes the tensors that a resumed run starts from."""

    def on_train_start(self, trainer, pl_module):
        self.step = trainer.global_step
        self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}
        self.momenta = [s["momentum_buffer"].clone() for s in trainer.optimizers[0].state.values()]


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_goes_on_from_a_stored_checkpoint(name, tmp_path):
    path, start = unpack_checkpoint(name, tmp_path), StartOf()
    model, loss = fit(CASES[name], start, path=path)
    stored = torch.load(path, weights_only=True)
    assert (start.step, model.trainer.global_step) == (2, 3)
    require_equal(start.state, stored["state_dict"])
    momenta = [state["momentum_buffer"] for state in stored["optimizer_states"][0]["state"].values()]
    assert momenta
    assert all(torch.equal(a, b) for a, b in zip(start.momenta, momenta, strict=True))
    assert math.isclose(loss, expected(name)["last_loss"], abs_tol=1e-5)
    require_close(outputs(model, CASES[name]), expected(name)["resumed"], tolerance=1e-4)


def require_equal(found, wanted):
    assert wanted
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if found[key].dtype != wanted[key].dtype] == []
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


def require_close(found, wanted, tolerance=1e-5):
    found, wanted = torch.tensor(found), torch.tensor(wanted)
    assert wanted.numel() >= 6
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < tolerance
