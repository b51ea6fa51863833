"""``task_of``: what HF PEFT calls the task of a model."""

from __future__ import annotations

import inspect
from typing import Any

from ..structure.transformers_api import is_encoder_decoder
from .peft_format import Base

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_of(base: Base) -> str | None:
    """Return the task's name, by the class of the network; None where HF PEFT has no name for it."""
    kind: Any = type(base.network)
    task = next((task for end, task in _TASKS.items() if kind.__name__.endswith(end)), None)
    if task != "SEQ_2_SEQ_LM":
        return task
    # HF PEFT calls a model of a task with input_ids, which models of speech (Whisper) do not take.
    takes_tokens = "input_ids" in inspect.signature(kind.forward).parameters
    return (task if is_encoder_decoder(base.network) else "CAUSAL_LM") if takes_tokens else None
