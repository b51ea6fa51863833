"""Which tokens of a conversation have labels, measured on templates of many kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_peft.tasks.chat_template import (
    ChatError,
    chat_ids,
    check_template,
    end_of_turn,
    read_template,
    render_chat,
)
from lightning_peft.tasks.data.chat.chat_encoder import ChatEncoder, Loss
from lightning_peft.tasks.data.chat.chat_rows import Conversation

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As Qwen3's: what the model thought is written in the last turn alone.
THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1].strip() }}\
{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As DeepSeek-R1's: generation begins a thought.
BEGUN = "{% for m in messages %}<|im_start|>{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant><think>\n{% endif %}"
# As gpt-oss's: the last turn has another end.
TWO_ENDS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
{% if loop.last and m.role == 'assistant' %}</s>{% else %}<|im_end|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As Llama 2's: without headers, with a start token, and roles must alternate.
LLAMA = """{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}\
{% endif %}\
{% endfor %}"""
# As Mistral's: tools stand before the last turn of a user.
TOOLS_LAST = """{% for m in messages %}{% if m.role == 'user' %}{% if tools and m == (messages | selectattr('role', \
'equalto', 'user') | list)[-1] %}[TOOLS]{{ tools | tojson }}{% endif %}[INST]{{ m.content }}[/INST]\
{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""
PLAIN = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
MARKED = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{{ m.content[:3] }}{% generation %}{{ m.content[3:] }}{% endgeneration %}<|im_end|>
{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
USER_ONLY = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}</s>{% endif %}{% endfor %}"


def letters(template: str, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each letter, so that texts say which tokens are meant."""
    words = ["<unk>", "<s>", "</s>", *map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.add_tokens(["<|im_start|>", "<|im_end|>", "<think>"], special_tokens=True)
    fast.chat_template = template
    return fast


def turns(*said: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in said]


TWO = turns(("user", "hi"), ("assistant", "yes\nno"), ("user", "bye"), ("assistant", "so long"))
THOUGHT = turns(
    ("user", "hi"), ("assistant", "<think>a</think>\nyes"), ("user", "x"), ("assistant", "<think>b</think>\nno")
)


def labelled(template: str, messages: list[dict[str, Any]], loss: Loss = "assistant", **settings: Any) -> list[str]:
    tokenizer = letters(template, settings.pop("normalizer", None))
    row = Conversation(messages, settings.pop("first", 0), settings.pop("tools", None))
    example = ChatEncoder(tokenizer, loss, 10_000, "cut")(row)
    assert example is not None
    parts: list[list[int]] = [[]]
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        if label == -100:
            parts.append([])
        else:
            assert label == token
            parts[-1].append(token)
    return [tokenizer.decode(part) for part in parts if part]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        pytest.param(CHATML, TWO, ["yes\nno<|im_end|>", "so long<|im_end|>"], id="chatml"),
        pytest.param(THINKING, THOUGHT, ["yes<|im_end|>", "<think>b</think>\nno<|im_end|>"], id="thinking"),
        pytest.param(BEGUN, TWO, ["yes\nno<|im_end|>", "so long<|im_end|>"], id="generation-begins-a-thought"),
        pytest.param(BEGUN, THOUGHT, ["a</think>\nyes<|im_end|>", "b</think>\nno<|im_end|>"], id="thought-begun"),
        pytest.param(TWO_ENDS, TWO, ["yes\nno<|im_end|>", "so long</s>"], id="two-ends"),
        pytest.param(LLAMA, TWO, [" yes\nno </s>", " so long </s>"], id="llama"),
        pytest.param(PLAIN, TWO, ["yes\nno", "so long", "</s>"], id="no-end-token"),
        pytest.param(MARKED, TWO, ["\nno<|im_end|>", "long<|im_end|>"], id="marked-by-the-template"),
        pytest.param(CHATML, TWO[1:], ["yes\nno<|im_end|>", "so long<|im_end|>"], id="assistant-first"),
    ],
)
def test_labels_are_on_what_the_assistant_writes(
    template: str, messages: list[dict[str, Any]], expected: list[str]
) -> None:
    assert labelled(template, messages) == expected
    assert labelled(template, messages, "last") == expected[-1 if template != PLAIN else -2 :]


def test_all_tokens_have_labels_if_asked() -> None:
    (text,) = labelled(CHATML, TWO, "all")
    assert text == render_chat(letters(CHATML), TWO)


def test_turns_of_a_prompt_have_none() -> None:
    assert labelled(CHATML, TWO, first=3) == ["so long<|im_end|>"]


def test_tools_before_the_last_user_leave_earlier_turns_labelled() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert labelled(TOOLS_LAST, TWO, tools=tools) == ["yes\nno</s>", "so long</s>"]


def test_a_tokenizer_that_loses_characters_is_measured_by_its_tokens() -> None:
    lossy = normalizers.Replace("q", "")
    messages = turns(("user", "hiqqqq"), ("assistant", "yes"))
    assert labelled(CHATML, messages, normalizer=lossy) == ["yes<|im_end|>"]


def test_a_token_that_reaches_from_a_header_into_an_answer_is_cut_there() -> None:
    tokenizer = letters(CHATML)
    tokenizer.add_tokens(["\ny", "\n\n"])  # as merges of a tokenizer
    example = ChatEncoder(tokenizer, "assistant", 10_000, "cut")(Conversation(TWO))
    assert example is not None
    assert tokenizer.decode([label for label in example["labels"] if label != -100]) == (
        "yes\nno<|im_end|>so long<|im_end|>"
    )
    prompt = chat_ids(tokenizer, render_chat(tokenizer, TWO[:1], prompt=True))
    assert example["input_ids"][: len(prompt)] == prompt


@pytest.mark.parametrize("template", [CHATML, THINKING, TWO_ENDS, LLAMA])
def test_what_stands_before_an_answer_is_what_generation_reads(template: str) -> None:
    tokenizer = letters(template)
    encoder = ChatEncoder(tokenizer, "last", 10_000, "cut")
    example = encoder(Conversation(TWO))
    assert example is not None
    before = [id for id, label in zip(example["input_ids"], example["labels"], strict=True) if label == -100]
    prompt = encoder.prompt(Conversation(TWO))
    assert prompt == before[: len(prompt)]
    assert before[len(prompt) :] in ([], chat_ids(tokenizer, "\n"))  # the line break after the end token


def test_a_start_token_is_not_written_twice() -> None:
    example = ChatEncoder(letters(LLAMA), "assistant", 10_000, "cut")(Conversation(TWO))
    assert example is not None
    assert example["input_ids"].count(1) == 1


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            LLAMA,
            turns(("user", "a"), ("user", "b"), ("assistant", "c")),
            "refuses turns of 'user', 'user', 'assistant'",
        ),
        (USER_ONLY, turns(("system", "be brief"), ("user", "a"), ("assistant", "c")), "leaves out what 'system' says"),
        (CHATML, turns(("user", "a")), "no turn of the role 'assistant' to learn from"),
        (
            CHATML,
            [*turns(("user", "a")), {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}],
            r"does not write the calls of tools \('f'\)",
        ),
    ],
)
def test_conversations_that_would_be_learned_wrongly_are_refused(
    template: str, messages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ChatError, match=message):
        labelled(template, messages)


def test_ends_of_turns_are_measured() -> None:
    found = {template: end_of_turn(letters(template)) for template in (CHATML, LLAMA, PLAIN, TWO_ENDS)}
    assert found == {CHATML: "<|im_end|>", LLAMA: "</s>", PLAIN: "", TWO_ENDS: "</s>"}


def test_tokens_that_the_template_needs_are_asked_for() -> None:
    tokenizer = letters(CHATML.replace("<|im_end|>", "<|eot|>"))
    with pytest.raises(
        ValueError, match=r"writes '<\|eot\|>', .* new_tokens=\['<\|eot\|>'\] .* resize_embeddings=true"
    ):
        check_template(tokenizer)
    tokenizer.add_tokens(["<|eot|>"], special_tokens=True)
    check_template(tokenizer)
    assert end_of_turn(tokenizer) == "<|eot|>"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template, .* chat_template=FILE.jinja"):
        check_template(tokenizer)


def test_a_template_is_a_file_or_its_text(tmp_path: Path) -> None:
    (tmp_path / "chatml.jinja").write_text(CHATML)
    assert read_template(str(tmp_path / "chatml.jinja")) == read_template(CHATML) == CHATML
    with pytest.raises(FileNotFoundError, match=r"no file, and no template either.*Close names: 'chatml.jinja'"):
        read_template(str(tmp_path / "chatm.jinja"))
