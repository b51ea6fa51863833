from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_peft.tasks import InstructionDataModule
from lightning_peft.tasks.data.instructions import prompt
from lightning_peft.tasks.pretrained import build_tokenizer

Write = Callable[..., str]

WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Name {it}.

### Input:
red

### Response:"""
WITHOUT_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
Name {it}.

### Response:"""
ALPACA = Path(__file__).parents[2].parent / "shared" / "data" / "alpaca_5k"
STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K"


def test_prompts_are_those_of_alpaca() -> None:
    assert prompt("Name {it}.", "red") == WITH_INPUT
    for nothing in ("", " ", "No input", "no input", "<noinput>", "<noInput> "):
        assert prompt("Name {it}.", nothing) == WITHOUT_INPUT
    assert prompt("Name {it}.", "red", "plain") == "Name {it}.\nred\n"
    assert prompt("Name {it}.", "<noinput>", "plain") == "Name {it}.\n"


def rows(*outputs: str) -> list[dict[str, str]]:
    return [{"instruction": "name a", "input": "film", "output": output} for output in outputs]


def test_only_the_response_and_the_end_carry_labels(decoder_tokenizer: str, write: Write) -> None:
    files = {"train": write("t.jsonl", rows("good")), "validation": write("v.jsonl", rows("good plot", "bad"))}
    data = InstructionDataModule(**files, tokenizer=decoder_tokenizer, prompt_style="plain", max_length=99)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    # <s> name a film, good plot </s>; the padding is the end token too, hidden by mask and labels
    assert batch["input_ids"].tolist() == [[1, 13, 11, 7, 3, 8, 2], [1, 13, 11, 7, 4, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100] * 4 + [3, 8, 2], [-100] * 4 + [4, 2, -100]]


def test_a_tokenizer_without_an_end_is_refused(encoder_tokenizer: str, write: Write) -> None:
    data = InstructionDataModule(test=write("t.jsonl", rows("good")), tokenizer=encoder_tokenizer, max_length=99)
    with pytest.raises(ValueError, match="The tokenizer has no end token"):
        data.setup("test")


def test_an_empty_response_is_the_end_alone(decoder_tokenizer: str, write: Write) -> None:
    data = InstructionDataModule(test=write("t.jsonl", rows("")), tokenizer=decoder_tokenizer, max_length=99)
    data.setup("test")
    assert data.examples("test")[0]["labels"][-2:] == [-100, 2]


def test_rows_that_do_not_fit_are_left_out_or_cut_with_the_end_token_and_counted(
    decoder_tokenizer: str, write: Write
) -> None:
    long = [{"instruction": "one two " * 4, "output": "good"}] * 2
    path = write("t.jsonl", [*rows("good plot", "good", "the film was good"), *long])
    settings = {"tokenizer": decoder_tokenizer, "prompt_style": "plain", "validation_fraction": 0}
    data = InstructionDataModule(path, max_length=6, **settings)
    with pytest.warns(UserWarning, match=r"4 of 5 rows of '.*t.jsonl' do not fit max_length=6 .*long_rows=cut"):
        data.setup("fit")
    assert [row["labels"] for row in data.examples("train")] == [[-100] * 4 + [3, 2]]
    data = InstructionDataModule(path, max_length=6, long_rows="cut", **settings)
    with pytest.warns(UserWarning, match="rows of") as caught:
        data.setup("fit")
    said = [str(warning.message) for warning in caught]
    assert len(said) == 2
    assert "2 of 5 rows of" in said[0]
    assert "do not fit max_length=6 and are left out" in said[0]
    assert "The responses of 2 of 5 rows of" in said[1]
    assert "are cut at max_length=6" in said[1]
    assert [row["labels"] for row in data.examples("train")] == [[-100] * 4 + [t, 2] for t in (3, 3, 10)]
    assert [row["input_ids"][-2:] for row in data.examples("train")] == [[3, 2], [3, 2], [10, 2]]
    data = InstructionDataModule(path, max_length=4, **settings)
    with pytest.raises(ValueError, match=r"5 of 5 rows .* no row is left. Raise max_length, or set long_rows=cut"):
        data.setup("fit")
    with pytest.raises(ValueError, match="Got long_rows='pad', expected 'drop' or 'cut'"):
        InstructionDataModule(path, long_rows="pad", **settings)


def test_held_out_rows_that_are_all_too_long_are_called_so(decoder_tokenizer: str, write: Write) -> None:
    short, long = {"instruction": "name", "output": "good"}, {"instruction": "name", "output": "good " * 50}
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    path = write("long.jsonl", [long if row in order[:2] else short for row in range(40)])
    data = InstructionDataModule(path, tokenizer=decoder_tokenizer, input=None, prompt_style="plain", max_length=20)
    message = "2 of 2 rows of '.*long.jsonl' that are held out for validation do not fit max_length=20: no row is left"
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_prompts_to_continue_have_no_response(decoder_tokenizer: str, write: Write) -> None:
    path = write("p.jsonl", [{"ask": "name a"}, {"ask": "one two a"}])
    data = InstructionDataModule(
        predict=path, tokenizer=decoder_tokenizer, instruction="ask", input=None, prompt_style="plain", max_length=99
    )
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert batch["input_ids"].tolist() == [[1, 13, 11, 2], [1, 14, 15, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    data = InstructionDataModule(
        predict=path, tokenizer=decoder_tokenizer, instruction="ask", input=None, prompt_style="plain", max_length=4
    )
    with pytest.raises(ValueError, match="1 of 2 rows of .* fill max_length=4: row 2. Raise max_length"):
        data.setup("predict")


def test_a_json_list_and_gzipped_jsonl_give_the_same_rows_and_limits_hold(
    decoder_tokenizer: str, tmp_path: Path, write: Write
) -> None:
    table = rows("good", "bad", "fine", "awful")
    (tmp_path / "t.json").write_text(json.dumps(table))
    packed = tmp_path / "t.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(write("t.jsonl", table)).read_bytes()))
    for path in (tmp_path / "t.json", packed):
        data = InstructionDataModule(
            str(path), str(packed), tokenizer=decoder_tokenizer, limit_train=3, limit_validation=1, max_length=99
        )
        data.setup("fit")
        assert [row["labels"][-2] for row in data.examples("train")] == [3, 4, 5]
        assert [row["labels"][-2] for row in data.examples("validation")] == [3]


def test_columns_and_styles_are_checked(decoder_tokenizer: str, write: Write) -> None:
    path = write("t.jsonl", [{"instruction": "name", "response": "good"}] * 30)
    settings = {"tokenizer": decoder_tokenizer, "max_length": 99}
    with pytest.raises(
        ValueError, match="no column 'input'. Its columns: 'instruction', 'response'. .*or to null if there is none"
    ):
        InstructionDataModule(path, **settings).setup("fit")
    with pytest.raises(ValueError, match="no column 'output'. Its columns: 'instruction', 'response'"):
        InstructionDataModule(path, **settings, input=None).setup("fit")
    with pytest.raises(ValueError, match="Column 'instruction' of .* is empty in row 1"):
        InstructionDataModule(
            write("e.jsonl", [{"instruction": "", "input": "a", "output": "b"}] * 2), **settings
        ).setup("validate")
    with pytest.raises(ValueError, match="prompt_style='chat', expected 'alpaca' or 'plain'"):
        InstructionDataModule(path, **settings, prompt_style="chat")


@pytest.mark.skipif(not (ALPACA.is_dir() and STORIES.is_dir()), reason="the shared data and models are not here")
def test_real_alpaca_rows_read_back_as_prompt_and_response() -> None:
    files = {"train": str(ALPACA / "train.jsonl.gz"), "validation": str(ALPACA / "dev.jsonl.gz")}
    data = InstructionDataModule(**files, model=str(STORIES), limit_validation=5, long_rows="cut")
    with pytest.warns(UserWarning, match="of 4500 rows") as caught:
        data.setup("fit")
    left_out, cut = (str(warning.message).split(" rows ")[0] for warning in caught)
    assert (left_out, cut) == ("5 of 4500", "The responses of 530 of 4500")
    assert len(data.examples("train")) == 4495
    assert all(row["labels"][-1] == 2 for row in data.examples("train"))  # the end token, also of cut ones
    tokenizer = build_tokenizer(str(STORIES))
    text = tokenizer.decode([token for token in data.examples("train")[0]["labels"] if token != -100])
    assert text.endswith("complete the project ahead of schedule.</s>")
