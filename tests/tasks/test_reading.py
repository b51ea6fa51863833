"""What the formats, patterns, saved folders and hub names hold is read as it stands there, or refused by its row."""

import datetime
import errno
import functools
import gzip
import json

import datasets
import pyarrow as pa
import pytest

from lightning_peft.tasks.data.reading import row_cache
from lightning_peft.tasks.data.reading.read_table import read_table
from lightning_peft.tasks.data.reading.splits import Splits
from lightning_peft.tasks.data.reading.table_stream import TableStream

ROWS = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}, {"text": "three", "label": "a"}]


def save(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def saved(kind, folder):
    """Save the rows in a format of typed columns."""
    dataset, path = datasets.Dataset.from_list(ROWS), folder / f"t.{kind}"
    if kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, dataset.data.schema) as writer:
            writer.write_table(dataset.data.table)
    elif kind == "feather":
        path = path.with_suffix(".arrow")
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, dataset.data.schema) as writer:
            writer.write_table(dataset.data.table)
    elif kind == "folder":
        dataset.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather", "folder", "folder of splits"])
def test_formats_with_types_are_read_whole_and_as_a_stream(kind, tmp_path):
    path = saved(kind, tmp_path)
    table = read_table(path)
    assert table.rows == ROWS
    assert table.numbers == [1, 2, 3]
    assert [row.row for row in TableStream(path)] == ROWS
    if kind == "folder of splits":
        assert read_table(path, "test").rows == read_table(f"{path}:test").rows == ROWS[2:]
        with pytest.raises(ValueError, match="no split 'tset'. Its splits: 'train', 'test'. Did you mean 'test'"):
            read_table(f"{path}:tset")


def test_text_is_a_row_a_line_without_blank_ones(tmp_path):
    path = save(tmp_path / "t.txt", "one \n\n \u2028two\u2029\r\n\rthree")
    table = read_table(path)
    assert table.texts("text") == ["one ", " \u2028two\u2029", "three"]
    assert table.numbers == [1, 3, 5]


VALUES = [
    ["2020-01-01", "2021-02-03"],
    ["12:30:00", None],
    ["1", 1],
    ["true", True, None],
    [1, 2.5],
    [2**70, -(2**63), 1e300, 0.1 + 0.2, 123456789.123456789],
    [None, None, "x"],
    [[], [1], ["a", {"b": None}]],
    [[{"role": "assistant", "content": None, "tool_calls": [{"f": {"x": 1}}]}], [{"role": "user", "content": "hi"}]],
    [{"a": 1}, {"b": {"c": []}}, {}],
    ["NA", "null", "", "nan"],
    ["\x00", "a\u2028b\x85c", "\U0001f600", "\ufeff"],
    [True, False],
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", "lines.json"])
def test_values_of_json_are_as_they_stand_there(suffix, tmp_path):
    longest = max(map(len, VALUES))
    rows = [{f"c{i}": v[j] for i, v in enumerate(VALUES) if j < len(v)} for j in range(longest)]
    path = save(tmp_path / f"t{suffix}", json.dumps(rows) if suffix == ".json" else lines(rows))
    for _ in range(2):  # from the file, and from the cache
        table = read_table(path)
        for i, values in enumerate(VALUES):
            expected = values + [None] * (longest - len(values))
            assert [(type(x), x) for x in table.values(f"c{i}")] == [(type(x), x) for x in expected]
    assert [row.row for row in TableStream(path)] == rows


def test_types_that_change_far_into_a_file_do_not_matter(tmp_path):
    rows = [{"x": None, "pad": "-" * 900}] * 12_000 + [{"x": "a", "y": 1}, {"x": 3, "y": [None]}]
    table = read_table(save(tmp_path / "t.jsonl", lines(rows)))
    assert (tmp_path / "t.jsonl").stat().st_size > 10_000_000
    assert table.values("x")[-3:] == [None, "a", 3]
    assert table.values("y")[-3:] == [None, 1, [None]]


def test_csv_values_stay_text(tmp_path):
    values = ["NA", "", "007", "1.0", "2020-01-01", "TRUE", "None", "x" * 200_000]
    path = save(tmp_path / "t.csv", "a,b\n" + "".join(f"{value},-\n" for value in values))
    assert read_table(path).values("a") == values


def test_columns_that_a_frame_of_pandas_left_in_a_file_are_kept(tmp_path):
    import pandas as pd

    pd.DataFrame(ROWS).to_csv(tmp_path / "t.csv")
    pd.DataFrame(ROWS, index=[5, 6, 7]).to_parquet(tmp_path / "t.parquet")
    assert read_table(str(tmp_path / "t.csv")).columns == ["", "text", "label"]
    assert read_table(str(tmp_path / "t.parquet")).values("text") == ["one", "two", "three"]


def test_a_pattern_means_all_files_in_order_and_errors_name_the_one_at_fault(tmp_path):
    for number, row in enumerate(ROWS):
        save(tmp_path / f"{number}.jsonl", lines([row, {"text": None, "label": number}]))
    table = read_table(f"{tmp_path}/*.jsonl")
    assert table.values("label") == ["a", 0, "b", 1, "a", 2]
    assert table.numbers == [1, 2] * 3
    with pytest.raises(ValueError, match=r"is empty in row 2 of '.*/1.jsonl' and 1 of other files\. Fill"):
        table.take([2, 3, 4, 5]).texts("text")
    stream = TableStream(f"{tmp_path}/*.jsonl", limit=5)
    with pytest.raises(ValueError, match=r"is empty in row 2 of '.*/1.jsonl'\. Fill"):
        stream.table(list(stream)[2:], ()).texts("text")
    with pytest.raises(FileNotFoundError, match=r"No file matches '.*/\*.csv'"):
        read_table(f"{tmp_path}/*.csv")
    save(tmp_path / "3.csv", "a\n1\n")
    with pytest.raises(ValueError, match="matches files of several kinds: '.csv', '.jsonl'"):
        read_table(f"{tmp_path}/?.*")


def test_files_of_a_pattern_with_other_types_are_refused(tmp_path):
    datasets.Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "0.parquet")
    datasets.Dataset.from_dict({"a": ["x"]}).to_parquet(tmp_path / "1.parquet")
    with pytest.raises(
        ValueError, match="columns of other types than rows before them: 'a' of string, expected 'a' of"
    ):
        read_table(f"{tmp_path}/*.parquet")


BROKEN = [
    ("t.jsonl", '{"a": 1, "b": 2, "a": 3}\n', "has the key 'a' twice in row 1"),
    ("t.jsonl", '{"a": "x"}\n{"a": "\\ud83d"}\n', "Column 'a' of .* has half of a surrogate pair in row 2"),
    ("t.jsonl", '{"a": 1}\r{"a": 2}\r{"a"}\r', "is not valid JSON in line 3"),
    ("t.jsonl", gzip.compress(b'{"a": 1}\n', mtime=0), "is compressed by gzip. Name it 't.jsonl.gz'"),
    ("t.parquet", b"PAR1 no", "is no whole .parquet file"),
    ("t.arrow", b"no", "is no whole .arrow file"),
    ("t.parquet.gz", b"", "has the suffix '.gz', expected .csv"),
    ("t.txt", "\n \n", "holds no rows"),
    ("t.json", '{"data": [\n1]}', "is not valid JSON in line 1, column 11"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_what_cannot_be_read_is_refused(name, content, message, tmp_path):
    path = save(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_table(path)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_neither_a_file_nor_on_the_hub_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    save(tmp_path / "data" / "reviews", "")
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'data/revews', and no data set .* Close .*reviews"):
        read_table("data/revews")
    with pytest.raises(ValueError, match=r"'data' is a folder, and not one that save_to_disk .*\*.jsonl"):
        read_table("data")
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder 'no/such/file'. Its folder"):
        read_table("no/such/file")


def test_a_hub_name_has_a_configuration_and_a_split(monkeypatch):
    asked = []

    def load_dataset(*args, **settings):
        asked.append((*args, settings["split"]))
        if settings["split"] == "predict":
            raise ValueError("Unknown split 'predict'. Should be one of ['train'].")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    files = dict.fromkeys(("train", "validation", "test", "predict"), "owner/name")
    assert Splits(files, {}, 0).rows("validation").rows == ROWS
    assert read_table("owner/name:dev").rows == read_table("owner/name:en:dev[:10%]").rows == ROWS
    splits = ["validation", "dev", "dev[:10%]"]
    assert asked == list(zip(["owner/name"] * 3, [None, None, "en"], splits, strict=True))
    with pytest.raises(ValueError, match="has no split 'predict' that could be loaded .*one of .'train'"):
        Splits(files, {}, 0).rows("predict")


def test_the_file_is_read_once_and_its_cache_forgets_nothing(tmp_path, monkeypatch):
    path = save(tmp_path / "t.jsonl", lines(ROWS))
    assert read_table(path).rows == ROWS
    monkeypatch.setattr("lightning_peft.tasks.data.reading.write_rows.parse_rows", None)
    assert read_table(path).rows == ROWS


@pytest.fixture
def other_cache(monkeypatch):
    """A cache that cannot be written: there is a file in place of the folder."""

    def use(folder):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
        monkeypatch.setattr(row_cache, "_is_writable", functools.cache(row_cache._is_writable.__wrapped__))

    return use


def test_a_cache_that_cannot_be_written_is_said_and_done_without(tmp_path, other_cache):
    other_cache(save(tmp_path / "taken", ""))
    path = save(tmp_path / "t.jsonl", lines(ROWS))
    with pytest.warns(UserWarning, match="cannot be written .*Set the environment variable HF_DATASETS_CACHE"):
        assert read_table(path).rows == ROWS
    assert read_table(path).rows == ROWS


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, other_cache, monkeypatch):
    other_cache(tmp_path / "cache")

    def full(paths, folder):
        save(folder / "rows.arrow", "part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lightning_peft.tasks.data.reading.read_table.write_rows", full)
    with pytest.raises(OSError, match="The disk of .*cache.* is full, where rows are kept. Free some space"):
        read_table(save(tmp_path / "t.jsonl", lines(ROWS)))
    assert [path.suffix for path in (tmp_path / "cache" / "lightning_peft").iterdir()] == [".lock"]


def test_the_librarys_settings_are_left_as_they_are(tmp_path):
    before = (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity(), datasets.is_caching_enabled())
    read_table(save(tmp_path / "t.csv", "a\n1\n"))
    after = (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity(), datasets.is_caching_enabled())
    assert after == before


def test_what_columns_mean_stays_with_them_in_parquet(tmp_path):
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"]), "x": datasets.Value("float32")})
    rows = {"label": [1, 0], "x": [0.5, 2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    assert read_table(str(tmp_path / "t.parquet")).dataset.features == features


def test_dates_of_typed_columns_stay_dates(tmp_path):
    day = datetime.date(2020, 1, 1)
    datasets.Dataset.from_dict({"day": [day]}).to_parquet(tmp_path / "t.parquet")
    assert read_table(str(tmp_path / "t.parquet")).values("day") == [day]
