"""``ChatColumns`` reads conversations from the columns that people have them in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_peft.tasks.chat_template import ChatError
from lightning_peft.tasks.data.chat.chat_turns import Turn, parse_json, read_turns, turns_or_text
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.messages import quoted

Kind = Literal["messages", "prompt", "text"]

_MESSAGES = ("messages", "conversations")


@dataclass(frozen=True)
class Conversation:
    """The turns of one row.

    Args:
        turns: Each with ``role`` and ``content``.
        first: Number of turns before the first that may be labelled.
        tools: JSON schemas of functions, if there are any.
    """

    turns: list[Turn]
    first: int = 0
    tools: list[Any] | None = None


@dataclass(frozen=True)
class ChatColumns:
    """Which columns hold conversations; None where the names of the columns tell.

    Args:
        messages: Column of lists of turns.
        prompt: Column of what comes before the completion: a text, or a list of turns.
        completion: Column of the completion: a text, or a list of turns.
        text: Column of plain text.
        tools: Column of the tools, where there is one.
    """

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    tools: str = "tools"

    def __post_init__(self) -> None:
        named = [kind for kind, column in self._named().items() if column is not None]
        if len(named) > 1:
            raise ValueError(
                f"Got names for {' and '.join(named)}, expected one: messages for lists of turns, prompt and "
                "completion, or text."
            )

    def kind(self, table: Table) -> Kind:
        """What the rows of a table are.

        Args:
            table: The rows.

        Raises:
            ValueError: If no column tells, or several do.
        """
        found = [kind for kind, column in self._named().items() if column is not None] or self._candidates(table)
        kinds = list(dict.fromkeys(found))
        if len(found) == 1:
            return kinds[0]
        expected = "messages or conversations (lists of turns), prompt and completion, or text"
        if not found:
            raise ValueError(
                f"{table.source!r} has the columns {quoted(table.columns)}, expected {expected}. Name the column: "
                "messages=NAME, prompt=NAME with completion=NAME, or text=NAME."
            )
        raise ValueError(
            f"{table.source!r} has the columns {quoted(table.columns)}, of which several may be meant: {expected}. "
            f"Name the one, such as messages={self._messages(table)!r}."
        )

    def conversations(self, table: Table, with_completion: bool) -> list[Conversation]:
        """The conversation of each row.

        Args:
            table: The rows.
            with_completion: Whether prompts need completions.
        """
        tools = table.values(self.tools) if self.tools in table.columns else [None] * len(table)
        kind, result = self.kind(table), []
        for index, values in enumerate(self._values(table, with_completion)):
            try:
                result.append(_conversation(values, kind, tools[index]))
            except ChatError as error:
                refuse(table, index, f"{error}.")
        return result

    def _values(self, table: Table, with_completion: bool) -> Iterator[tuple[Any, ...]]:
        """Yield the list of each row, or its prompt and its completion."""
        if self.kind(table) == "messages":
            columns = [self.messages or self._messages(table)]
        else:
            columns = [self.prompt or "prompt", *([self.completion or "completion"] if with_completion else [])]
        yield from zip(*map(table.values, columns), strict=True)

    def _named(self) -> dict[Kind, str | None]:
        return {"messages": self.messages, "prompt": self.prompt or self.completion, "text": self.text}

    def _candidates(self, table: Table) -> list[Kind]:
        found: list[Kind] = ["messages" for name in _MESSAGES if name in table.columns]
        found += ["text"] if "text" in table.columns else []
        alone = not found  # rows to predict have no completion; those of messages may have a prompt for show
        return [*found, "prompt"] if "prompt" in table.columns and (alone or "completion" in table.columns) else found

    def _messages(self, table: Table) -> str:
        return next((name for name in _MESSAGES if name in table.columns), table.columns[0])


def refuse(table: Table, index: int, reason: str) -> None:
    """Raise an error that names a row.

    Args:
        table: The rows.
        index: Of the row in the table.
        reason: Why it is refused.
    """
    table.refuse([index], f"{table.source!r}, {{rows}}: {reason}")


def _conversation(values: Sequence[Any], kind: Kind, tools: Any) -> Conversation:
    tools = parse_json(tools)
    tools = tools if isinstance(tools, list) and tools else None
    if kind == "messages":
        return Conversation(read_turns(values[0]), 0, tools)
    prompt, *completion = (
        turns_or_text(value, role) for value, role in zip(values, ("user", "assistant"), strict=False)
    )
    return Conversation(prompt + [turn for turns in completion for turn in turns], len(prompt), tools)
