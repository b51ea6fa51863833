"""Words and tags from CoNLL files and lists: what is labelled, cut and refused."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lightning_peft.tasks import TokenDataModule

Write = Callable[..., str]
ROWS = [
    {"tokens": ["the", "film", "was", "good"], "tags": ["O", "B-x", "O", "O"]},
    {"tokens": ["red", "blue"], "tags": ["B-x", "I-x"]},
]
CONLL = "-DOCSTART- -X- O\n\nthe DT O\nfilm NN B-x\nwas VB O\ngood JJ O\n\n\nred JJ B-x\nblue JJ I-x\n"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer that writes words in pieces: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, g 4, ##oo 5, ##d 6, a 7."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "g", "##oo", "##d", "a"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    folder = tmp_path_factory.mktemp("pieces")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)
    fast.save_pretrained(folder)
    return str(folder)


def data_of(path: str, tokenizer: str, **settings: Any) -> TokenDataModule:
    data = TokenDataModule(path, path, predict=path, tokenizer=tokenizer, **settings)
    data.setup("fit")
    return data


def test_conll_files_and_lists_are_read_alike(encoder_tokenizer: str, write: Write, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text(CONLL)
    (tmp_path / "b.conll.gz").write_bytes(gzip.compress(CONLL.replace(" ", "\t").replace("\n", "\r\n").encode()))
    found = []
    for path in (write("t.jsonl", ROWS), str(tmp_path / "a.conll"), str(tmp_path / "b.conll.gz")):
        data = data_of(path, encoder_tokenizer)
        assert data.classes == ["B-x", "I-x", "O"]
        (batch,) = data.val_dataloader()
        found.append({name: value.tolist() for name, value in batch.items()})
    assert found[0] == found[1] == found[2]
    assert found[0]["input_ids"] == [[2, 11, 8, 13, 4, 3], [2, 17, 18, 3, 0, 0]]
    assert found[0]["labels"] == [[-100, 2, 0, 2, 2, -100], [-100, 0, 1, -100, -100, -100]]


def test_the_first_piece_of_a_word_is_labelled(pieces: str, write: Write) -> None:
    rows = [{"tokens": ["good", "a", "goodd"], "tags": ["X", "O", "X"]}]
    (batch,) = data_of(write("t.jsonl", rows), pieces, max_length=16).val_dataloader()
    assert batch["input_ids"].tolist() == [[2, 4, 5, 6, 7, 4, 5, 6, 6, 3]]
    assert batch["labels"].tolist() == [[-100, 1, -100, -100, 0, 1, -100, -100, -100, -100]]


def test_words_that_are_lost_are_counted(pieces: str, write: Write) -> None:
    rows = [{"tokens": ["good", "a", "good", "a"], "tags": list("XOXO")}, {"tokens": ["a", " "], "tags": list("OX")}]
    data = TokenDataModule(*[write("t.jsonl", rows)] * 2, tokenizer=pieces, max_length=6)
    with pytest.warns(UserWarning, match="3 words in 2 rows of .* have no label, since they lie beyond max_length=6"):
        data.setup("fit")
    assert [row["labels"] for row in data.examples("train")] == [[-100, 1, -100, -100, 0, -100], [-100, 0, -100]]


@pytest.mark.filterwarnings("ignore:.*words in 1 rows")
def test_batches_to_predict_say_where_words_begin(pieces: str, write: Write) -> None:
    data = TokenDataModule(
        predict=write("p.jsonl", [{"tokens": ["good", "a", "good"]}]), tokenizer=pieces, max_length=6
    )
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert "labels" not in batch
    assert batch["words"].tolist() == [[-100, 0, -100, -100, 1, -100]]
    assert batch["word_counts"].tolist() == [3]


def test_words_inside_of_a_text_are_tokenised_as_such(tmp_path: Path, write: Write) -> None:
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "a": 1, "b": 2, "\u0120": 3, "\u0120a": 4, "\u0120b": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u0120", "a"), ("\u0120", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=8)  # noqa: S106
    fast.save_pretrained(tmp_path)
    path = write("t.jsonl", [{"tokens": ["a", "b"], "tags": ["X", "O"]}])
    (batch,) = data_of(path, str(tmp_path), max_length=8).val_dataloader()
    assert batch["input_ids"].tolist() == [[4, 5]]
    assert batch["labels"].tolist() == [[1, 0]]


def test_numbers_get_the_names_that_are_set_or_declared(encoder_tokenizer: str, write: Write, tmp_path: Path) -> None:
    import datasets

    rows = [{"tokens": ["red", "film"], "tags": [1, 0]}]
    data = data_of(write("t.jsonl", rows), encoder_tokenizer, names=["O", "B-x", "I-x"])
    assert data.classes == ["O", "B-x", "I-x"]
    assert data.examples("train")[0]["labels"] == [-100, 1, 0, -100]
    names = datasets.Sequence(datasets.ClassLabel(names=["O", "B-x", "I-x"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": names})
    columns = {"tokens": [["red", "film"]], "ner_tags": [[1, 0]]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "t.parquet"))
    data = data_of(str(tmp_path / "t.parquet"), encoder_tokenizer, tags="ner_tags")
    assert data.classes == ["O", "B-x", "I-x"]
    assert data.examples("train")[0]["labels"] == [-100, 1, 0, -100]
    with pytest.raises(ValueError, match="holds numbers, whose names are not known. Set names in the data to all tags"):
        data_of(write("n.jsonl", rows), encoder_tokenizer)
    with pytest.raises(ValueError, match="names='O', 'O', expected two tags or more, each once"):
        TokenDataModule(names=["O", "O"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "film"], "tags": ["O"]}, "more or fewer tags than words in row 2. Give each word one tag"),
        (
            {"tokens": "a film", "tags": ["O", "O"]},
            "'tokens' of .* holds no list of words in row 2. Give lists of texts",
        ),
        ({"tokens": [], "tags": []}, "holds no list of words in row 2"),
        ({"tokens": ["a"], "tags": [None]}, "'tags' of .* holds no list of tags in row 2"),
        ({"tokens": ["a"], "tags": "O"}, "'tags' of .* holds no list of tags in row 2"),
    ],
)
def test_rows_that_are_no_words_with_tags_are_named(
    encoder_tokenizer: str, write: Write, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        data_of(write("t.jsonl", [ROWS[0], row]), encoder_tokenizer)


def test_tags_must_be_those_of_the_train_file(encoder_tokenizer: str, write: Write) -> None:
    other = write("v.jsonl", [{"tokens": ["a"], "tags": ["B-y"]}])
    data = TokenDataModule(write("t.jsonl", ROWS), other, tokenizer=encoder_tokenizer)
    with pytest.raises(ValueError, match="Row 1 of .*v.jsonl' has the label 'B-y', which the train file does not have"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a O\nb\n", "has 1 columns in row 2, expected 2 as in its first line: a token, a tab or spaces, and its tag"),
        ("a\tO\n\tO\n", "has 2 columns in row 2, 1 of them empty, expected 2"),
        ("\n\n", "holds no rows"),
    ],
)
def test_lines_of_conll_files_that_cannot_be_read_are_named(
    encoder_tokenizer: str, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "t.conll").write_text(text)
    with pytest.raises(ValueError, match=message):
        data_of(str(tmp_path / "t.conll"), encoder_tokenizer)


def test_rows_of_conll_files_have_the_number_of_their_first_line(encoder_tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "t.conll").write_text("a O\n\nb O\n")
    (tmp_path / "v.conll").write_text("a O\nb O\n\n\nb X\n")
    data = TokenDataModule(str(tmp_path / "t.conll"), str(tmp_path / "v.conll"), tokenizer=encoder_tokenizer)
    with pytest.raises(ValueError, match="Row 5 of .*v.conll' has the label 'X'"):
        data.setup("fit")


def test_tokenizers_that_do_not_know_words_are_refused(encoder_tokenizer: str, write: Write) -> None:
    from transformers import AutoTokenizer

    data = TokenDataModule(write("t.jsonl", ROWS), validation_fraction=0, tokenizer=encoder_tokenizer)
    data.tokenizer = type("SlowTokenizer", (), {"is_fast": False, "model_max_length": 128})()
    data.learn("train")
    assert AutoTokenizer.from_pretrained(encoder_tokenizer).is_fast
    with pytest.raises(
        ValueError, match="SlowTokenizer cannot tell which word a token belongs to. Give a tokenizer that"
    ):
        data.encode("train", data.splits.rows("train"))
