"""Folders are replaced whole, by exchange or one file after the other; leftovers go, and living writers stay."""

import os
from pathlib import Path

import pytest

from lightning_peft.core.adapter_folder import read_files
from lightning_peft.files import atomic_files
from lightning_peft.files.atomic_files import new_folder, replace_file, replace_files
from lightning_peft.files.temporary_paths import partial_paths, temporary_file, temporary_folder

OLD, NEW = {"a": b"old a", "b": b"old b"}, {"a": b"new a", "b": b"new b"}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    replace_files(tmp_path / "folder", OLD)
    return tmp_path / "folder"


def exchanges(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    return atomic_files._exchange(tmp_path / "one", tmp_path / "two")


def test_a_folder_is_exchanged_with_the_new_one_and_keeps_other_files(folder, tmp_path):
    (folder / "notes").write_bytes(b"mine")
    os.symlink("notes", folder / "link")
    before = folder.stat().st_ino
    replace_files(folder, NEW)
    assert content(folder) == {**NEW, "notes": b"mine", "link": b"mine"}
    assert (folder / "link").is_symlink()
    assert (folder.stat().st_ino != before) == exchanges(tmp_path)
    assert partial_paths(folder) == []


@pytest.mark.parametrize("reason", ["folder inside", "working directory", "no exchange"])
def test_where_nothing_can_be_exchanged_files_are_replaced_one_by_one(reason, folder, monkeypatch):
    if reason == "folder inside":
        (folder / "inside").mkdir()
    elif reason == "working directory":
        monkeypatch.chdir(folder)
    else:
        monkeypatch.setattr(atomic_files, "_exchange", lambda *paths: False)
    before = folder.stat().st_ino
    replace_files(folder, NEW)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == NEW
    assert folder.stat().st_ino == before
    assert partial_paths(folder) == []


@pytest.mark.parametrize("broken", OLD)
@pytest.mark.parametrize("exchange", [True, False])
def test_an_error_while_writing_leaves_what_was_there(broken, exchange, folder, monkeypatch):
    def crash(source, target, replace=os.replace):
        if str(target).endswith(broken) and Path(target).parent == folder or exchange:
            raise OSError("disk gone")
        replace(source, target)

    monkeypatch.setattr(atomic_files, "_exchange", lambda *paths: False)
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk gone"):
        replace_files(folder, NEW)
    if broken == "a" or exchange:  # else one of two files is new, which the checksums of an adapter tell
        assert content(folder) == OLD
    assert partial_paths(folder) == []


def test_leftovers_of_dead_writers_are_removed_and_those_of_living_ones_stay(folder):
    left = folder.with_name(".folder.0123abcd.partial")
    left.mkdir()
    (left / "a").write_bytes(b"half")
    (folder / ".a.89abcdef.partial").write_bytes(b"half")
    others = [folder.with_name(".folder.0123abcd"), folder.with_name(".other.0123abcd.partial"), folder / ".a.partial"]
    for path in others:
        path.write_bytes(b"somebody else's")
    with temporary_folder(folder) as living, temporary_file(folder / "a", b"more") as file:
        replace_files(folder, NEW)
        assert living.is_dir()
        assert not left.exists()
    assert not file.exists()
    assert sorted(content(folder)) == [".a.partial", "a", "b"]
    assert [path.exists() for path in others] == [True] * 3


def test_a_new_folder_appears_whole_and_never_over_another(tmp_path):
    target = tmp_path / "new"
    with pytest.raises(FileNotFoundError), new_folder(target) as folder:
        (folder / "a" / "b").write_bytes(b"into no folder")
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    with new_folder(target) as folder:
        (folder / "a").write_bytes(b"whole")
        assert content(target) == {}
    assert content(target) == {"a": b"whole"}
    with pytest.raises(FileExistsError, match="written meanwhile by somebody else"), new_folder(target):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_link_to_a_folder_stays_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    replace_files(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink()
    assert content(folder) == NEW


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    replace_file(tmp_path / "file", b"content")
    with pytest.raises(FileExistsError, match="is a file; give a folder"):
        replace_files(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == b"content"
    assert read_files(tmp_path / "file", ("a",)) == {}
