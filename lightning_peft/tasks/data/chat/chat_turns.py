"""``read_turns`` reads the turns of a conversation as people write them: OpenAI's messages, ShareGPT's, or a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning_peft.tasks.chat_template import ChatError
from lightning_peft.tasks.messages import quoted

Turn = dict[str, Any]

# What ShareGPT and its kin call the roles of chat templates.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
_KNOWN = ("system", "developer", "user", "assistant", "tool", "ipython")


def turns_or_text(value: Any, role: str) -> list[Turn]:
    """The turns of a list; a text is one turn.

    Args:
        value: The list or the text.
        role: Whose turn a text is.
    """
    is_text = isinstance(value, str) and not _is_turns(parse_json(value))
    return [{"role": role, "content": value}] if is_text else read_turns(value)


def read_turns(value: Any) -> list[Turn]:
    """The turns of a list, or of its JSON text.

    Args:
        value: The list or the text.

    Raises:
        ChatError: If it holds something else.
    """
    turns = parse_json(value)
    if not _is_turns(turns):
        raise ChatError(f"expected a list of turns such as {{'role': 'user', 'content': 'Hi'}}, got {_shown(value)}")
    return [_turn(_without_none(turn)) for turn in turns]


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(turn, Mapping) for turn in value)


def _turn(turn: Turn) -> Turn:
    role = turn.pop("role", None) or turn.pop("from", None)
    content = turn.pop("content", None)
    content = turn.pop("value", "") if content is None else content
    role = _ROLES.get(str(role), role)
    if role == "function_call":
        role, content, turn["tool_calls"] = "assistant", "", [{"type": "function", "function": parse_json(content)}]
    if role not in _KNOWN:
        raise ChatError(f"a turn has the role {role!r}, expected one of {quoted((*_KNOWN, *_ROLES))}")
    if isinstance(content, list):
        content = "".join(map(_part, content))
    if not isinstance(content, str):
        raise ChatError(f"the content of a turn is {_shown(content)}, expected text")
    calls = parse_json(turn.pop("tool_calls", None))
    return {"role": role, "content": content, **turn, **({"tool_calls": list(map(_call, calls))} if calls else {})}


def _part(part: Any) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        raise ChatError(f"a turn has the part {_shown(part)}, expected parts with text alone")
    text: str = part["text"]
    return text


def _call(call: Any) -> Any:
    """Return a call of a function whose arguments are a mapping, as templates want them."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ChatError(
            f"a call of a tool is {_shown(call)}, expected {{'function': {{'name': ..., 'arguments': ...}}}}"
        )
    return {**call, "function": {**function, "arguments": parse_json(function.get("arguments", {}))}}


def parse_json(value: Any) -> Any:
    """What a text of JSON holds, if that is a list or a mapping; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _without_none(value: Any) -> Any:
    """Return a value without the keys that a table filled with nothing."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
