"""Rows of conversations and of text, as people have them, become the same tokens and labels."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.tasks import ChatDataModule
from lightning_peft.tasks.pretrained import build_tokenizer

Write = Callable[..., str]
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)
START, END, UNKNOWN = 1, 2, 0  # roles are no words of the tokenizer
MESSAGES = [
    {"role": "user", "content": "name a film"},
    {"role": "assistant", "content": "good plot"},
    {"role": "user", "content": "the ending"},
    {"role": "assistant", "content": "bad"},
]
IDS = [1, 0, 13, 11, 7, 2, 1, 0, 3, 8, 2, 1, 0, 10, 9, 2, 1, 0, 4, 2]
FIRST, LAST = [-100] * 8 + [3, 8, 2], [-100] * 7 + [4, 2]
SHAREGPT = [
    {"from": "human", "value": "name a film"},
    {"from": "gpt", "value": "good plot"},
    {"from": "human", "value": "the ending"},
    {"from": "gpt", "value": "bad"},
]


@pytest.fixture
def chat(decoder_tokenizer: str) -> Callable[..., ChatDataModule]:
    """Builds data with a template that writes <s> role content </s>."""

    def build(**settings: Any) -> ChatDataModule:
        defaults = {"chat_template": TEMPLATE, "max_length": 64, "validation_fraction": 0}
        return ChatDataModule(**({"tokenizer": decoder_tokenizer} | defaults | settings))

    return build


def rows(data: ChatDataModule, stage: str = "test") -> list[dict[str, Any]]:
    data.setup(stage)
    return [dict(row) for row in data.examples("train" if stage == "fit" else stage)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "labels"),
    [
        ({"messages": MESSAGES}, FIRST + LAST),
        ({"conversations": SHAREGPT}, FIRST + LAST),
        ({"conversations": MESSAGES, "id": 7}, FIRST + LAST),
        ({"prompt": "name a film", "messages": MESSAGES}, FIRST + LAST),
        ({"messages": json.dumps(MESSAGES)}, FIRST + LAST),
        ({"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]}, FIRST + LAST),
        ({"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}, [-100] * 11 + LAST),
        ({"prompt": MESSAGES[:3], "completion": "bad"}, [-100] * 11 + LAST),
    ],
)
def test_conversations_are_read_from_the_columns_that_people_have(
    chat: Callable[..., ChatDataModule], write: Write, row: dict[str, Any], labels: list[int]
) -> None:
    (example,) = rows(chat(test=write("t.jsonl", [row])))
    assert example["input_ids"] == IDS
    assert example["labels"] == labels
    assert example["attention_mask"] == [1] * len(IDS)


def test_columns_can_be_named(chat: Callable[..., ChatDataModule], write: Write) -> None:
    path = write("t.jsonl", [{"text": "the film", "dialog": MESSAGES, "q": "name", "a": "good"}])
    assert rows(chat(test=path, messages="dialog"))[0]["input_ids"] == IDS
    assert rows(chat(test=path, prompt="q", completion="a"))[0]["input_ids"] == [1, 0, 13, 2, 1, 0, 3, 2]
    assert rows(chat(test=path, text="text"))[0]["input_ids"] == [1, 10, 7, 2]
    with pytest.raises(ValueError, match="Got names for messages and text, expected one"):
        chat(test=path, text="text", messages="dialog")
    with pytest.raises(ValueError, match="no column 'completion'"):
        chat(test=path, prompt="q").setup("test")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "completion": "y", "messages": MESSAGES}, "several may be meant"),
        ({"messages": MESSAGES, "text": "x"}, r"several may be meant.*such as messages='messages'"),
        ({"question": "x", "answer": "y"}, r"has the columns 'question', 'answer', expected messages or conversations"),
    ],
)
def test_columns_that_tell_too_little_or_too_much_are_refused(
    chat: Callable[..., ChatDataModule], write: Write, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        chat(test=write("t.jsonl", [row])).setup("test")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("just text", "expected a list of turns such as"),
        ([], "expected a list of turns such as"),
        ([{"role": "asistant", "content": "x"}], "the role 'asistant', expected one of 'system', 'developer', 'user'"),
        ([{"role": "user", "content": 3}], "the content of a turn is 3, expected text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "expected parts with text alone"),
        ([{"role": "assistant", "content": "", "tool_calls": ["f"]}], "a call of a tool is 'f', expected"),
        (MESSAGES[:1], "no turn of the role 'assistant' to learn from"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_by_its_number(
    chat: Callable[..., ChatDataModule], write: Write, messages: Any, message: str
) -> None:
    path = write("t.jsonl", [{"messages": MESSAGES}, {"messages": messages}])
    with pytest.raises(ValueError, match=f"t.jsonl', row 2: .*{message}"):
        chat(test=path).setup("test")


def test_tools_reach_the_template_and_what_a_table_filled_with_nothing_does_not(
    chat: Callable[..., ChatDataModule], write: Write
) -> None:
    template = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | length }} {% endfor %}"
        "{{ m | length }} {{ m.content }} </s>{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "film", "arguments": '{"one": "two"}'}}
    messages = [
        {"role": "user", "content": "name"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "red"},
        {"role": "assistant", "content": "good", "tool_calls": None},
    ]
    tool = {"type": "function", "function": {"name": "plot", "parameters": {}}}
    path = write(
        "t.jsonl", [{"messages": messages, "tools": [tool]}, {"messages": messages, "tools": json.dumps([tool])}]
    )
    data = chat(test=path, chat_template=template)
    written = []
    apply = data.tokenizer.apply_chat_template
    data.tokenizer.apply_chat_template = lambda *a, **k: written.append(apply(*a, **k)) or written[-1]
    first, second = rows(data)
    assert first == second
    # two keys in each turn, three where there are calls; the arguments are a mapping of one
    assert "[plot]2 name </s>film 1 3  </s>2 red </s>2 good </s>" in written


def test_the_loss_is_on_what_was_asked(chat: Callable[..., ChatDataModule], write: Write) -> None:
    path = write("t.jsonl", [{"messages": MESSAGES}])
    assert rows(chat(test=path, loss="all"))[0]["labels"] == IDS
    assert rows(chat(test=path, loss="last"))[0]["labels"] == [-100] * 11 + LAST
    with pytest.raises(ValueError, match="Got loss='first', expected one of assistant, all, last"):
        chat(test=path, loss="first")


def test_long_rows_end_with_an_answer_and_its_end_or_are_left_out_with_the_count(
    chat: Callable[..., ChatDataModule], write: Write
) -> None:
    long = [{"role": "user", "content": "one " * 12}, *MESSAGES[1:]]
    path = write("t.jsonl", [{"messages": MESSAGES}] * 3 + [{"messages": long}, {"messages": MESSAGES[2:]}])
    with pytest.warns(UserWarning, match="rows of") as caught:
        found = rows(chat(test=path, max_length=15))
    said = [str(warning.message) for warning in caught]
    assert any(
        "1 of 5 rows of" in text and "left out: max_length=15 has no room for the first answer" in text for text in said
    )
    assert any("3 of 5 rows of" in text and "lose their last turns" in text for text in said)
    assert [row["input_ids"] for row in found] == [IDS[:11]] * 3 + [IDS[11:]]
    assert [row["labels"] for row in found] == [FIRST] * 3 + [LAST]
    for settings in ({"long_rows": "drop"}, {"loss": "last"}):
        with pytest.warns(UserWarning, match="4 of 5 rows of .* has no room for the whole row"):
            assert [row["input_ids"] for row in rows(chat(test=path, max_length=15, **settings))] == [IDS[11:]]


def test_text_is_cut_into_pieces_that_predict_each_token_once(
    chat: Callable[..., ChatDataModule], write: Write
) -> None:
    text = "good bad fine awful film plot ending the a was"
    ids = [START, *range(3, 13), END]
    for length in (4, 5, 11, 12, 64):
        found = rows(
            chat(test=write("t.jsonl", [{"text": text}, {"text": "red"}]), max_length=length, chat_template=None)
        )
        *pieces, last = [row["input_ids"] for row in found]
        assert last == [START, 0 + 16, END]
        assert [START, *(token for piece in pieces for token in piece[1:])] == ids
        assert max(map(len, pieces)) <= length
        assert all(row["labels"] == row["input_ids"] for row in found)


def test_lines_of_a_text_file_are_rows_and_blank_ones_are_left_out(
    chat: Callable[..., ChatDataModule], tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text("the film\n\ngood\n")
    found = rows(chat(test=str(tmp_path / "t.txt")))
    assert [row["input_ids"] for row in found] == [[1, 10, 7, 2], [1, 3, 2]]


def test_rows_to_predict_end_where_the_assistant_begins(chat: Callable[..., ChatDataModule], write: Write) -> None:
    path = write("t.jsonl", [{"messages": MESSAGES}, {"messages": MESSAGES[:3]}])
    assert [row["input_ids"] for row in rows(chat(predict=path), "predict")] == [[*IDS[:16], 1, 0]] * 2
    asked = write("q.jsonl", [{"prompt": "name a film"}])
    assert [row["input_ids"] for row in rows(chat(predict=asked), "predict")] == [[1, 0, 13, 11, 7, 2, 1, 0]]
    with pytest.raises(ValueError, match="2 of 2 rows of .* fill max_length=9 before the answer: rows 1, 2"):
        chat(predict=path, max_length=9).setup("predict")


def test_one_row_is_printed_with_marks_on_what_the_loss_counts(
    chat: Callable[..., ChatDataModule], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("t.jsonl", [{"messages": MESSAGES[:2]}, {"messages": MESSAGES}])
    chat(train=path, validation=path, show_row=True).setup("fit")
    first, *parts = [line for line in capsys.readouterr().out.splitlines() if "Generating" not in line]
    assert first == "first row to learn from (train): 11 tokens, the loss counts 3 (marked +)"
    assert parts == ["        8  '<s> <unk> name a film </s> <s> <unk>'", "  +     3  'good plot </s>'"]


def test_without_an_end_token_in_the_template_the_tokenizers_is_put_and_that_is_said(
    chat: Callable[..., ChatDataModule], write: Write
) -> None:
    plain = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant {% endif %}"
    with pytest.warns(UserWarning, match="writes no end token after the assistant's turns: the tokenizer's '</s>'"):
        (row,) = rows(chat(test=write("t.jsonl", [{"messages": MESSAGES}]), chat_template=plain))
    assert row["input_ids"] == [0, 13, 11, 7, 0, 3, 8, 0, 10, 9, 0, 4, END]
    assert row["labels"] == [-100] * 5 + [3, 8] + [-100] * 4 + [4, END]


def test_new_tokens_are_special_tokens_of_the_tokenizer(chat: Callable[..., ChatDataModule], write: Write) -> None:
    template = TEMPLATE.replace("</s>", "<|im_end|>")
    path = write("t.jsonl", [{"messages": MESSAGES[:2]}])
    with pytest.raises(ValueError, match=r"writes '<\|im_end\|>', which the tokenizer does not have"):
        chat(test=path, chat_template=template).setup("test")
    data = chat(test=path, chat_template=template, new_tokens=["<|im_end|>"])
    assert rows(data)[0]["labels"][-3:] == [3, 8, 18]
    assert data.tokenizer.decode([3, 18], skip_special_tokens=True).split() == ["good"]


def test_rows_of_the_example_fit_without_a_word(decoder_tokenizer: str) -> None:
    folder = Path(__file__).parents[2] / "examples" / "chat"
    data = ChatDataModule(
        train=str(folder / "train.jsonl"), tokenizer=decoder_tokenizer, chat_template=TEMPLATE, max_length=128
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("fit")
    assert [len(data.examples(split)) for split in ("train", "validation")] == [57, 3]
    batch = next(iter(data.train_dataloader()))
    assert (batch["labels"] != -100).any(1).all()


def test_the_tokenizer_travels_with_its_template(
    chat: Callable[..., ChatDataModule], write: Write, tmp_path: Path
) -> None:
    data = chat(test=write("t.jsonl", [{"messages": MESSAGES}]))
    data.tokenizer.save_pretrained(tmp_path / "saved")
    assert build_tokenizer(str(tmp_path / "saved")).chat_template == TEMPLATE
