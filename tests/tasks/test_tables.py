from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lightning_peft.tasks.data.reading.read_table import read_table

ROWS = [{"text": "one, two", "label": "a"}, {"text": 'say "yes"', "label": "b"}]
PLAIN = {
    "t.csv": 'text,label\n"one, two",a\n"say ""yes""",b\n',
    "t.tsv": 'text\tlabel\none, two\ta\nsay "yes"\tb\n',
    "t.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "t.json": json.dumps(ROWS, indent=1),
}


def save(folder: Path, name: str, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    return str(folder / name)


@pytest.mark.parametrize("name", PLAIN)
def test_every_format_reads_the_same_plain_and_gzipped(tmp_path: Path, name: str) -> None:
    plain = read_table(save(tmp_path, name, PLAIN[name]))
    packed = read_table(save(tmp_path, f"{name}.gz", gzip.compress(PLAIN[name].encode())))
    assert plain.rows == packed.rows == ROWS
    assert plain.numbers == packed.numbers == ([1, 2] if "json" in name else [2, 3])


@pytest.mark.parametrize("name", PLAIN)
def test_a_byte_order_mark_windows_line_ends_and_blank_lines_at_the_end_do_not_matter(
    tmp_path: Path, name: str
) -> None:
    content = b"\xef\xbb\xbf" + PLAIN[name].replace("\n", "\r\n").encode() + b"\r\n\r\n"
    assert read_table(save(tmp_path, name, content)).rows == ROWS


def test_a_line_separator_inside_a_json_string_does_not_split_the_row(tmp_path: Path) -> None:
    path = save(tmp_path, "t.jsonl", '{"text": "one\u2028two\x85three"}\n')
    assert read_table(path).texts("text") == ["one\u2028two\x85three"]


def test_rows_of_csv_are_numbered_by_the_line_they_start_on(tmp_path: Path) -> None:
    table = read_table(save(tmp_path, "t.csv", 'text\n"one\ntwo"\nthree\n'))
    assert table.numbers == [2, 4]
    assert table.texts("text") == ["one\ntwo", "three"]


def test_taken_rows_keep_their_numbers(tmp_path: Path) -> None:
    table = read_table(save(tmp_path, "t.csv", "text\na\nb\nc\n")).take([2, 0])
    assert (table.texts("text"), table.numbers) == (["c", "a"], [4, 2])


def test_a_missing_file_names_close_ones(tmp_path: Path) -> None:
    save(tmp_path, "train.csv", "text\na\n")
    with pytest.raises(FileNotFoundError, match=r"trian.csv' does not exist. Close names: 'train.csv'."):
        read_table(str(tmp_path / "trian.csv"))
    with pytest.raises(FileNotFoundError, match="Its folder .*nowhere' does not exist either"):
        read_table(str(tmp_path / "nowhere" / "train.csv"))


BROKEN = [
    ("t.doc", "text\n", r"suffix '.doc', expected .csv, .tsv, .json, .jsonl, .txt, .conll, .parquet, .arrow, or .gz"),
    ("t.csv", "", "holds no rows"),
    ("t.csv", "text,label\n", "holds no rows"),
    ("t.jsonl", "", "holds no rows"),
    ("t.json", "[]", "holds no rows"),
    ("t.csv", "text,label\na,b\nc,d,e\n", "has 3 values in row 3, expected 2 .* 'text', 'label'"),
    ("t.csv", "text,label\na\n", "has 1 values in row 2, expected 2"),
    ("t.csv", 'text,label\na,b\n"c,d\ne,f\n', "cannot be read from row 3 on: unexpected end of data"),
    ("t.csv", "text,text\na,b\n", "has the column 'text' twice"),
    ("t.jsonl", '{"text": "a"}\n{"text": \n', "is not valid JSON in line 2, column 10"),
    ("t.jsonl", '{"a": 1}\n["a"]\n', "holds a list in row 2, expected an object .* named .json"),
    ("t.json", '[{"text": "a"},\n{"text" "b"}]', "is not valid JSON in line 2, column 9"),
    ("t.csv", "text\ngood\ncaf\xe9\n".encode("latin1"), "is not UTF-8: line 3 has the byte 0xe9"),
    ("t.csv.gz", "text\ngood\n", "is not a whole gzip file"),
    ("t.csv.gz", gzip.compress(b"text\n" + b"good\n" * 99, mtime=0)[:-12], "is not a whole gzip file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_broken_file_is_refused_with_the_row(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_table(save(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_a_missing_column_names_what_there_is(tmp_path: Path) -> None:
    table = read_table(save(tmp_path, "t.csv", "sentence,label\na,b\n"))
    with pytest.raises(
        ValueError, match="no column 'sentnce'. Its columns: 'sentence', 'label'. Did you mean 'sentence'"
    ):
        table.texts("sentnce")


def test_texts_refuse_what_is_empty_or_no_text(tmp_path: Path) -> None:
    table = read_table(save(tmp_path, "t.jsonl", '{"a": "x", "b": 1}\n{"a": " ", "b": 2}\n{"b": 3}\n'))
    with pytest.raises(ValueError, match="Column 'a' of .* is empty in rows 2, 3. Fill or remove"):
        table.texts("a")
    with pytest.raises(ValueError, match="Column 'b' of .* something else than text in rows 1, 2, 3"):
        table.texts("b")
    assert table.texts("a", blank=True) == ["x", " ", ""]
