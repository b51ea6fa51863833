"""Pushing an adapter: what is uploaded, by a stand-in, and what is said where nothing can be."""

import importlib.util

import pytest
from models import MODELS

import lightning_peft as lp

hub = pytest.importorskip("huggingface_hub")


class Recorder:
    """Stands in for huggingface_hub's HfApi."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def create_repo(self, repo_id, **settings):
        if self.error:
            raise self.error
        self.calls.append(("create", repo_id, settings))
        return f"https://hub.invalid/{repo_id}"

    def upload_folder(self, **settings):
        self.calls.append(("upload", settings))


@pytest.fixture
def folder(tmp_path):
    model = lp.inject(MODELS["llama"](), lp.LoRA(rank=2))
    return lp.export_peft(model, tmp_path / "adapter")


@pytest.mark.parametrize("private", [None, True, False])
def test_tensors_settings_and_card_are_uploaded_and_nothing_else(folder, private):
    (folder / "notes.txt").write_text("private")
    api = Recorder()
    assert lp.push_adapter(folder, "me/small", private, api) == "https://hub.invalid/me/small"
    created, (_, uploaded) = api.calls
    assert created == ("create", "me/small", {"private": private, "exist_ok": True})
    assert uploaded["folder_path"] == folder
    assert uploaded["repo_id"] == "me/small"
    names = {path.name for path in folder.iterdir()}
    kept = set(hub.utils.filter_repo_objects(names, allow_patterns=uploaded["allow_patterns"]))
    assert kept == names - {"notes.txt"} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "token" not in uploaded


def test_offline_says_what_to_do(folder):
    assert hub.constants.HF_HUB_OFFLINE
    with pytest.raises(RuntimeError, match=r"'me/small' could not be written \(OfflineModeIsEnabled: .* not set\)"):
        lp.push_adapter(folder, "me/small")


@pytest.mark.parametrize("kind", [ConnectionError, PermissionError])
def test_a_refusal_of_the_hub_names_the_repository_and_the_log_in(folder, kind):
    with pytest.raises(RuntimeError, match=rf"'me/small' .*{kind.__name__}: no such luck.*hf auth login"):
        lp.push_adapter(folder, "me/small", api=Recorder(kind("no such luck")))


def test_without_the_package_the_extra_is_named(folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "huggingface_hub" else found(name))
    with pytest.raises(ImportError, match=r'needs huggingface_hub, .* pip install "lightning-peft\[hub\]"'):
        lp.push_adapter(folder, "me/small")


@pytest.mark.parametrize("name", ["a/b/c", "", "me/two--dashes", "me/x.git"])
def test_a_name_that_no_repository_has_is_refused(folder, name):
    api = Recorder()
    with pytest.raises(ValueError, match="names no repository; expected user/name"):
        lp.push_adapter(folder, name, api=api)
    assert not api.calls


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        lp.push_adapter(tmp_path, "me/small")
