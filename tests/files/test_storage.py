"""Addresses that fsspec opens, as Lightning's checkpoints are opened: written, read and refused."""

from pathlib import Path

import fsspec
import pytest
import torch
from adapter_edits import stir
from models import MODELS, logits
from safetensors.torch import save_file
from trainer_models import Module, data, trainer

import lightning_peft as lp
from lightning_peft.files.storage import is_remote, is_taken, local_path


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.fixture
def net():
    net = lp.inject(MODELS["llama"](), lp.LoRA(rank=2))
    stir(net, 0)
    return net.eval()


def output(net):
    return logits(net.eval()(**MODELS["llama"].inputs()))


def test_addresses_are_told_from_paths(tmp_path):
    assert [is_remote(path) for path in ("memory://a", "s3://a/b", "simplecache::s3://a")] == [True] * 3
    assert [is_remote(path) for path in ("a/b", tmp_path, "C:/a", "file:///a", "a:b", "./memory:")] == [False] * 6
    assert str(local_path("file:///a/b")) == "/a/b"


def test_adapters_go_to_addresses_and_come_back(memory, net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lp.save_adapter(net, "memory://some/adapter") == "memory://some/adapter"
    assert sorted(memory.find("/some")) == [
        "/some/adapter/adapter_config.json",
        "/some/adapter/adapter_model.safetensors",
    ]
    for load, name in ((lp.load_adapter, "lora"), (lp.add_adapter, "adapter")):  # which is the folder's name
        back = load(MODELS["llama"](), "memory://some/adapter")
        lp.activate(back, name)
        assert torch.equal(output(back), output(net))
    assert lp.inspect_adapter("memory://some/adapter")["methods"][0]["method"] == "LoRA"
    assert is_taken("memory://some/adapter")
    assert not is_taken("memory://other")
    assert list(tmp_path.iterdir()) == []


def test_exports_go_to_addresses_and_come_back(memory, net):
    assert lp.export_peft(net, "memory://exported") == "memory://exported"
    back = lp.import_peft(MODELS["llama"](), "memory://exported")
    assert torch.equal(output(back), output(net))
    assert lp.vllm_problems("memory://exported") == []
    memory.pipe_file("/exported/README.md", b"mine")
    with pytest.raises(FileExistsError, match="memory://exported/README.md was written or edited by somebody else"):
        lp.export_peft(net, "memory://exported")
    torch.save({"model.layers.0.self_attn.q_proj.lora_A": torch.ones(2, 32)}, memory.open("/loralib.bin", "wb"))
    with pytest.raises(ValueError, match="memory://loralib.bin"):
        lp.import_loralib(MODELS["llama"](), "memory://loralib.bin", 8)


def test_checkpoints_at_addresses_are_read(memory, tmp_path):
    module = Module()
    runs = trainer(lp.PEFTStrategy(lp.LoRA(rank=2)), max_steps=1)
    runs.fit(module, data())
    runs.save_checkpoint("memory://run/last.ckpt")
    back = lp.load_from_checkpoint(Module, "memory://run/last.ckpt")
    assert torch.equal(output(back.net), output(module.net))
    (tmp_path / "base").mkdir()
    save_file(MODELS["llama"]().state_dict(), tmp_path / "base/model.safetensors")
    with lp.without_values():
        empty = MODELS["llama"]()
    merged = lp.merge_files(empty, tmp_path / "base", "memory://run/last.ckpt", tmp_path / "out")
    assert (merged / "model.safetensors").is_file()


def test_what_cannot_be_at_an_address_is_refused_in_a_sentence(memory, net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with lp.without_values():
        empty = MODELS["llama"]()
    for base, out in (("memory://base", "out"), ("base", "memory://out")):
        with pytest.raises(ValueError, match=r"memory://\w+ is an address, and .* in place"):
            lp.merge_files(empty, base, tmp_path, out)
    with pytest.raises(ValueError, match="memory:/a lost a slash of its address; give it as a text"):
        lp.save_adapter(net, Path("memory://a"))
    with pytest.raises(ValueError, match="nowhere://a cannot be opened"):
        lp.save_adapter(net, "nowhere://a")
    with pytest.raises(FileNotFoundError, match="memory://none is no adapter folder"):
        lp.load_adapter(MODELS["llama"](), "memory://none")
    assert list(tmp_path.iterdir()) == []
