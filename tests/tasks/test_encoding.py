"""Encoded rows are kept for the next run, and for no run in which anything that they depend on is another."""

import importlib
import inspect
import json
import logging
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from data_cases import DATA, WORDS, prepare, save_rows, save_tokenizer
from documents import blocks, execute
from processes import together
from transformers import AutoTokenizer

import lightning_peft
from lightning_peft.tasks.data.cloze_data import ClozeDataModule
from lightning_peft.tasks.data.instructions import InstructionDataModule
from lightning_peft.tasks.data.text_data import TextDataModule

CACHED = [name for name in DATA if name != "mixed" and "streamed" not in name]
OTHER = {  # than the default, for each setting that encoded rows may depend on
    "text": {"text": "instruction"},
    "label": {"label": "answer"},
    "problem_type": {"problem_type": "regression", "label": "number"},
    "label_separator": {"problem_type": "multi_label_classification", "label": "text", "label_separator": " "},
    "tokens": {"tokens": "more_tokens", "tags": "more_tags"},
    "tags": {"tags": "more_tags"},
    "names": {"names": ["O", "B", "I"]},
    "source": {"source": "instruction"},
    "target": {"target": "answer"},
    "prefix": {"prefix": "the"},
    "max_source_length": {"max_source_length": 63},
    "max_target_length": {"max_target_length": 15},
    "model": {"model": "another"},
    "max_length": {"max_length": 63},
    "instruction": {"instruction": "answer"},
    "input": {"input": "answer"},
    "output": {"output": "answer"},
    "prompt_style": {"prompt_style": "alpaca"},
    "template": {"template": "the {text} {mask}"},
    "answer": {"answer": "label", "long_answers": "drop"},
    "candidates": {"candidates": WORDS},
    "words": {"words": {word: word for word in WORDS}},
    "long_rows": {"long_rows": "cut"},
    "choices": {"choices": "choices", "answers": None, "label": "number"},
    "long_answers": {"long_answers": "drop"},
    "shorten": {"shorten": "text"},
    "placeholder": {"placeholder": 9},
    "templates": {"templates": {"a": "{text}"}},
    "answers": {"answers": {"neg": "bad film", "pos": "good film"}},
    "other_answers": {"other_answers": {"b": {"neg": "red", "pos": "blue"}}},
    "evaluate_with": {"evaluate_with": "b"},
    "decoder_only": {"decoder_only": True},
}
UNTRIED = {"src_lang", "tgt_lang"}  # which a tokenizer of words does not have
OTHER_FOR = {
    ("choices", "label"): {"label": "answer", "answers": {word: word for word in WORDS}},
    ("scores", "label"): {"label": "half"},
    ("scores", "problem_type"): {"problem_type": "single_label_classification"},
}


@pytest.fixture
def folder(tmp_path):
    prepare(tmp_path)
    return tmp_path


@pytest.fixture
def encoded(monkeypatch):
    """Counts how often each kind of data was asked to encode."""
    counts = []
    for kind in {type(DATA[name]("x")) for name in CACHED}:
        original = kind.encode

        def encode(self, split, table, original=original):
            counts.append(split)
            return original(self, split, table)

        monkeypatch.setattr(kind, "encode", encode)
    return counts


def rows(data, split="train"):
    """Encode rows, by a module of its own."""
    return list(data.examples(split))


@pytest.mark.parametrize("name", CACHED)
def test_rows_are_encoded_again_after_a_change_of_any_setting_and_of_nothing_else(name, folder, encoded):
    data = DATA[name](folder)
    first = rows(data)
    again = DATA[name](folder)
    assert rows(again) == first
    assert again.state_dict() == data.state_dict()
    assert encoded == ["train"]
    settings = set(inspect.signature(type(data)).parameters) - data.batching_settings - UNTRIED
    assert len(settings) >= 4
    for count, setting in enumerate(sorted(settings), start=2):
        change = OTHER_FOR.get((name, setting), OTHER[setting])
        rows(DATA[name](folder, **change))
        assert len(encoded) == count, setting
    assert rows(DATA[name](folder, batch_size=2)) == first
    assert len(encoded) == count


def test_validation_rows_are_kept_whether_or_not_train_rows_were_encoded_before(folder, encoded):
    both = DATA["text"](folder, validation="other.jsonl")
    rows(both)
    kept = rows(both, "validation")
    assert rows(DATA["text"](folder, validation="other.jsonl"), "validation") == kept
    assert encoded == ["train", "validation"]


def rewrite(path):
    """Change a file's content, and neither its size nor its time."""
    stat, text = path.stat(), path.read_text()
    assert text != text.replace("film", "plot")
    path.write_text(text.replace("film", "plot"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def test_a_change_that_leaves_size_and_time_of_a_file_is_noticed(folder, encoded):
    first = rows(DATA["cloze"](folder))
    rewrite(folder / "train.jsonl")
    assert rows(DATA["cloze"](folder)) != first
    assert len(encoded) == 2


def with_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder / "tokenizer")


def with_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["film plot"])
    tokenizer.save_pretrained(folder / "tokenizer")


def with_words(folder):
    save_tokenizer(folder / "tokenizer", list(reversed(WORDS)))


def with_side(folder):
    save_tokenizer(folder / "tokenizer", truncation_side="left")


@pytest.mark.parametrize("change", [with_template, with_token, with_words, with_side])
def test_another_tokenizer_of_the_same_name_is_noticed(change, folder, encoded):
    rows(DATA["text"](folder))
    change(folder)
    rows(DATA["text"](folder))
    assert len(encoded) == 2


def test_another_version_and_other_classes_are_noticed(folder, encoded, monkeypatch):
    first = rows(DATA["text"](folder))
    monkeypatch.setattr(lightning_peft, "__version__", "0.2")
    assert rows(DATA["text"](folder)) == first
    assert len(encoded) == 2
    for count, classes in ((3, ["neg", "pos"]), (4, ["bad", "neg", "pos"])):
        data = TextDataModule(
            validation=f"{folder}/other.jsonl", tokenizer=f"{folder}/tokenizer", max_length=64, validation_fraction=0
        )
        data.load_state_dict({"classes": classes})
        assert {row["labels"] for row in rows(data, "validation")} == {count - 3, count - 2}
        assert len(encoded) == count


def test_an_attribute_that_is_set_later_is_noticed(folder, encoded):
    rows(DATA["text"](folder))
    data = DATA["text"](folder)
    data.max_length = 8
    assert max(len(row["input_ids"]) for row in rows(data)) == 8
    assert len(encoded) == 2


OWN = """
from own_words import ADDED
from lightning_peft.tasks.data.text_data import TextDataModule

class Own(TextDataModule):
    def encode(self, split, table):
        return [{**row, "added": [ADDED]} for row in super().encode(split, table)]
"""


def test_a_change_in_the_code_of_a_subclass_or_in_what_it_imports_is_noticed(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def added(name, source):
        (folder / name).write_text(source)
        for module in ("own_words", "own_data"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        own = importlib.import_module("own_data").Own
        return rows(own(f"{folder}/train.jsonl", tokenizer=f"{folder}/tokenizer"))[0]["added"]

    (folder / "own_data.py").write_text(OWN)
    assert added("own_words.py", "ADDED = 1\n") == [1]
    assert added("own_words.py", "ADDED = 22\n") == [22]
    assert added("own_data.py", OWN.replace("[ADDED]", "[ADDED, 3]")) == [22, 3]


def test_data_without_known_settings_are_encoded_anew(folder, encoded):
    for count in (1, 2):
        data = DATA["text"](folder)
        data.hparams.clear()
        rows(data)
        assert len(encoded) == count


def test_rows_that_are_left_out_at_the_start_of_a_table_do_not_matter(folder):
    long, short = {"instruction": "film " * 99, "output": "good"}, {"instruction": "film", "output": "good"}
    (folder / "long.jsonl").write_text((json.dumps(long) + "\n") * 1500 + (json.dumps(short) + "\n") * 700)
    settings = {"train": "long.jsonl"}
    with pytest.warns(UserWarning, match="1500 of 2200 rows"):
        one = rows(DATA["instructions"](folder, **settings))
    assert [len(row["input_ids"]) for row in one] == [5] * 700
    with pytest.warns(UserWarning, match="1500 of 2200 rows"):  # said again
        assert rows(DATA["instructions"](folder, **settings)) == one


def test_examples_go_to_workers_as_a_reference(folder):
    save_rows(folder / "train.jsonl", 3000)
    examples = DATA["text"](folder).examples("train")
    assert len(pickle.dumps(examples)) < 5000
    assert list(pickle.loads(pickle.dumps(examples))) == list(examples)


@pytest.mark.slow
def test_worker_processes_encode_the_same_rows_and_their_errors_name_the_row(folder):
    save_rows(folder / "train.jsonl", 3000)
    alone = rows(DATA["instructions"](folder))
    (folder / "copy.jsonl").write_text((folder / "train.jsonl").read_text())
    assert rows(DATA["instructions"](folder, train="copy.jsonl", num_workers=2)) == alone
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "copy.jsonl").write_text("".join([*lines[:2500], '{"instruction": 3}\n', *lines[2500:]]))
    with pytest.raises(ValueError, match=r"'instruction' of .*copy.jsonl' holds something else than text in row 2501"):
        rows(DATA["instructions"](folder, train="copy.jsonl", num_workers=2))


class Counting(TextDataModule):
    def encode(self, split, table):
        with Path(self.label_file).open("a") as file:
            file.write(f"{os.getpid()}\n")
        if Path(self.label_file).name == "fails":
            raise ValueError("row 3 is wrong")
        return super().encode(split, table)


def encode_in_each(folder, name):
    """Encode in one of two processes; return what became of it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = Counting(f"{folder}/train.jsonl", tokenizer=f"{folder}/tokenizer")
    data.label_file = f"{folder}/{name}"
    try:
        return len(data.examples("train"))
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_of_processes_one_encodes_and_each_has_an_error(folder):
    assert together(encode_in_each, str(folder), "works") == [43, 43]
    assert encode_in_each(str(folder), "works") == 43  # in a third process, later
    assert len((folder / "works").read_text().splitlines()) == 1
    assert together(encode_in_each, str(folder), "fails", seconds=100) == ["row 3 is wrong"] * 2


def test_a_data_module_of_the_documentation_works(folder):
    (text,) = blocks("docs/data.md", "python")
    data = execute(text, "own_lines").Lines(f"{folder}/train.jsonl", f"{folder}/tokenizer")
    batches = list(data.train_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [8] * 6
    assert all(torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0) for batch in batches)


def test_kinds_of_data_that_are_cached_are_those_that_have_cases():
    kinds = {type(DATA[name]("x")) for name in CACHED}
    assert {ClozeDataModule, InstructionDataModule, TextDataModule} < kinds
