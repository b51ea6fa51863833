"""``render_chat`` writes a conversation by the tokenizer's chat template; ``end_of_turn`` measures how turns end."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.tasks.messages import close_paths, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

_PROBE = "zqxj"  # a text that no template writes by itself
_MARKER = re.compile(r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>")  # DeepSeek writes wide bars


class ChatError(ValueError):
    """A conversation that a chat template cannot write, or that cannot be labelled; says why."""


def read_template(source: str) -> str:
    """The text of a chat template.

    Args:
        source: The text itself, or the path of a file that holds it.

    Raises:
        FileNotFoundError: If it is neither.
    """
    if "{%" in source or "{{" in source:
        return source
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"The chat template {source!r} is no file, and no template either, which would have {{% ... %}} or "
            f"{{{{ ... }}}} in it. {close_paths(path, path.parent.glob('*.jinja'))}"
        )
    return path.read_text(encoding="utf-8")


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise where a tokenizer cannot write conversations, or lacks tokens that its template writes.

    Args:
        tokenizer: With its template.

    Raises:
        ValueError: It has no template, cannot say where its tokens stand in a text, or lacks tokens.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "The tokenizer has no chat template, which says how turns are written. Take the tokenizer of a chat "
            "model, or give the data a template: chat_template=FILE.jinja, or its text."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which tokens a part of a text has, so turns cannot be labelled. "
            "Take a tokenizer with a tokenizer.json."
        )
    markers = dict.fromkeys(_MARKER.findall(_probe(tokenizer)))
    lacking = [marker for marker in markers if not _is_token(tokenizer, marker)]
    if lacking:
        raise ValueError(
            f"The chat template writes {quoted(lacking)}, which the tokenizer does not have as tokens: a model would "
            f"read and write them letter by letter. Set new_tokens={lacking!r} of the data and resize_embeddings=true "
            "of the model, take a tokenizer that has them, or a template without them."
        )


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    *,
    prompt: bool = False,
) -> str:
    """The text of a conversation.

    Args:
        tokenizer: With a chat template.
        messages: Turns with ``role`` and ``content``.
        tools: JSON schemas of the functions that the assistant may call.
        prompt: Whether the assistant's next turn begins at the end.

    Raises:
        ChatError: If the template refuses it.
    """
    from jinja2 import TemplateError

    refusals: list[Exception] = []
    for turns in ([dict(message) for message in messages], _with_json_arguments(messages)):
        try:
            text: Any = tokenizer.apply_chat_template(
                turns, tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=prompt
            )
            return str(text)
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            refusals.append(error)
    roles = quoted(message.get("role") for message in messages)
    raise ChatError(f"the chat template refuses turns of {roles}: {refusals[0]}") from refusals[0]


def _with_json_arguments(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages whose calls of tools have arguments as JSON text, which templates such as DeepSeek's ask for."""

    def written(call: Mapping[str, Any]) -> dict[str, Any]:
        arguments = json.dumps(call["function"].get("arguments", {}), ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return [
        {**message, "tool_calls": list(map(written, message["tool_calls"]))} if "tool_calls" in message else {**message}
        for message in messages
    ]


def chat_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a rendered text, to which a tokenizer adds none: the template has written all."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes after an assistant's last turn, such as ``<|im_end|>``; empty if it writes no token."""
    text = _probe(tokenizer)
    after = text.rpartition(_PROBE)[2].strip() if _PROBE in text else ""
    end, known = "", own_tokens(tokenizer)
    while token := next((token for token in known if after.startswith(token, len(end))), ""):
        end += token
    return end


def own_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that a tokenizer knows as such, the start token left out; the longest come first."""
    return sorted(set(tokenizer.get_added_vocab()) - {tokenizer.bos_token}, key=len, reverse=True)


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that ends an assistant's turn; None if no template is there that writes one."""
    try:
        end = end_of_turn(tokenizer) if getattr(tokenizer, "chat_template", None) else ""
    except ChatError:
        end = ""
    return chat_ids(tokenizer, end)[-1] if end else None


def _probe(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a short conversation, in which the template shows what it writes around turns."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    return render_chat(tokenizer, turns)


def _is_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    ids = chat_ids(tokenizer, text)
    return text in tokenizer.get_added_vocab() or (len(ids) == 1 and ids[0] != tokenizer.unk_token_id)
