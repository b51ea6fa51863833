"""``assistant_spans`` finds the assistant's turns in a conversation that a chat template has written, by measuring it.

Most templates do not mark them. So the turns before one are written with the header of the assistant's next turn, as
for generation; what the whole conversation has after that text is what the assistant writes. It ends where the
template ends the conversation up to this turn. Templates that write a turn otherwise once more turns follow, such as
those that leave out what a model thought, are measured by what stands in the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from lightning_peft.tasks.chat_template import ChatError
from lightning_peft.tasks.data.chat.chat_turns import Turn

Write = Callable[[Sequence[Turn], bool], str]  # turns, and whether the assistant's next one begins -> text


@dataclass(frozen=True)
class Span:
    """What the assistant writes in one turn: the text from ``start`` to ``stop``, its end token included."""

    turn: int
    start: int
    stop: int


def assistant_spans(write: Write, turns: Sequence[Turn], first: int, ends: Sequence[str]) -> tuple[str, list[Span]]:
    """The text of a conversation, and where the assistant writes it.

    Args:
        write: The template.
        turns: The conversation.
        first: The first turn that matters.
        ends: What the template writes after an assistant's turn: first what it writes after the last one, empty if
            that is nothing, then what it may write after others.

    Raises:
        ChatError: If the template writes a turn in a way in which its place cannot be told.
    """
    text = write(turns, False)
    chosen = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= first]
    spans: list[Span] = []
    for turn in chosen:
        start = _start(write, turns, turn, text)
        if start is None:
            start = _found_start(turns, turn, text)
        spans.append(Span(turn, start, _stop(write, turns, turn, text, start, ends)))
    _check_written(turns, text, spans)
    if any(before.stop > after.start for before, after in zip(spans, spans[1:], strict=False)):
        raise ChatError("the chat template writes turns into one another, so the assistant's cannot be told")
    return text, spans


def _start(write: Write, turns: Sequence[Turn], turn: int, text: str) -> int | None:
    """Return where the assistant begins to write; None where what comes before is written otherwise in the end."""
    if turn == 0:  # nothing comes before it but its header
        return len(commonprefix([text, *(write([{"role": "assistant", "content": x}], False) for x in "AB")]))
    try:
        prompt = write(turns[:turn], True)
        if text.startswith(prompt):
            return len(prompt)
        before = write(turns[:turn], False)
    except ChatError:  # it refuses to end here
        return None
    return _after_header(text, before, prompt) if text.startswith(before) else None


def _after_header(text: str, before: str, prompt: str) -> int:
    """Return where a text goes on after the header of a turn, as far as it is what generation begins with."""
    header, rest = prompt.removeprefix(before), text[len(before) :].lstrip()
    if prompt.startswith(before) and header.strip() and rest.startswith(header.strip()):  # after other spaces
        rest = rest.removeprefix(header.strip())
        return len(text) - len(rest.removeprefix(header[len(header.rstrip()) :]))
    shared = len(commonprefix([prompt, text]))  # generation may begin a thought that finished turns do not show
    return max(len(before), *(text.rfind(mark, 0, shared) + 1 for mark in ">]\n"))


def _found_start(turns: Sequence[Turn], turn: int, text: str) -> int:
    """Return where a turn begins by what all turns up to it say, one after the other."""
    position = 0
    for number, said in enumerate(turns[: turn + 1]):
        lines = said["content"].strip().splitlines()
        sought = "\n".join(lines) if number < turn else lines[0] if lines else None
        found = -1 if sought is None else text.find(sought, position)
        if found < 0 and (number == turn or said["role"] != "assistant"):
            raise ChatError(
                f"the chat template writes what comes before turn {turn + 1} in another way once this turn follows, "
                "and its place cannot be told; split the conversation, or give another template"
            )
        position = found if number == turn else max(position, found + len(sought or ""))
    return position


def _stop(write: Write, turns: Sequence[Turn], turn: int, text: str, start: int, ends: Sequence[str]) -> int:
    """Return where a turn ends: before the line break that may follow its end token."""
    try:
        until = text if turn + 1 == len(turns) else write(turns[: turn + 1], False)
    except ChatError:  # it refuses to end here
        until = ""
    written = until[start:].rstrip()
    if text.startswith(until) and written.endswith(ends[0]) and len(until) > start:
        return start + len(written)
    return _found_stop(turns[turn], text, start, ends)


def _found_stop(turn: Turn, text: str, start: int, ends: Sequence[str]) -> int:
    """Return where a turn ends by its last line, which an end token follows."""
    lines = turn["content"].strip().splitlines()
    last = lines[-1].strip() if lines else ""
    position = text.find(last or ends[0], start)
    while position >= 0:
        after = position + len(last)
        spaces = len(text[after:]) - len(text[after:].lstrip())
        for end in ends:
            if text.startswith(end, after + spaces):
                return after + (spaces + len(end) if end else 0)
        position = text.find(last or ends[0], position + 1)
    raise ChatError(
        f"the chat template writes the assistant's {last[:40]!r} in another way once turns follow, and no end token "
        "after it, so its end cannot be told; set loss=last, or give another template"
    )


def _check_written(turns: Sequence[Turn], text: str, spans: Sequence[Span]) -> None:
    """Raise where a template leaves out what a turn says, or which tools it calls."""
    for turn in turns:
        words = re.findall(r"\w+", turn["content"]) if turn["role"] != "assistant" else []
        if words and words[-1] not in text:
            raise ChatError(
                f"the chat template leaves out what {turn['role']!r} says ({words[-1]!r} is missing); remove such "
                "turns, or give a template that writes them"
            )
    for span in spans:
        names = [str(call["function"].get("name")) for call in turns[span.turn].get("tool_calls", [])]
        if missing := [name for name in names if name not in text[span.start : span.stop]]:
            raise ChatError(
                f"the chat template does not write the calls of tools ({missing[0]!r}); give a template that does"
            )
