"""Prompts before input embeddings: ``prompt_embeddings`` is P (length, features), computed by any encoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..core.adapter import Adapter
from ..core.method import Method
from ..methods import MultitaskPromptTuning, PromptTuning, PTuning
from ..ops.sharded_tensors import full_tensor
from ..structure.transformers_api import attention_heads, from_config
from .peft_format import Base, PeftFile, PeftFormat, StateDict, check_supported

_PROMPT, _COLUMNS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
VIRTUAL = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")


class PromptFormat(PeftFormat):
    """Both put the tokens in front of an encoder's or a decoder's input; of two halves, into the encoder alone."""

    tensors: tuple[str, ...] = (_PROMPT,)
    settings: tuple[str, ...] = (*VIRTUAL, "modules_to_save")
    prefix, by_task = "base_model.", True
    halves_differ = False  # whether a decoder, where there is one, gets virtual tokens of its own

    @abstractmethod
    def method_for(self, name: str, length: int, state: StateDict) -> Method:
        """Return the method that a file describes."""

    def check_method(self, method: Any) -> None:
        """Raise where settings ask for what HF PEFT does not compute."""

    def to_peft(
        self, base: Base, method: Any, hosts: Mapping[str, Sequence[Adapter]]
    ) -> tuple[dict[str, Any], StateDict]:
        self.check_method(method)
        _check_not_first_position(base)
        check_supported(
            bool(method.targets), f"targets={method.targets!r}", "it puts prompts in front of transformers models"
        )
        (name, adapter), *others = [(n, adapters[0]) for n, adapters in hosts.items() if adapters[0].export_state()]
        check_supported(bool(others), f"Prompts at {name} and other backbones", "it has one for a model")
        packed = {key: full_tensor(value).detach() for key, value in adapter.export_state().items()}
        length, width = packed["prompt"].shape
        sizes = {"num_virtual_tokens": length, "token_dim": width, "num_transformer_submodules": 1}
        sizes |= {"num_attention_heads": attention_heads(base.network) or 1}  # it asks for some, and does not use them
        sizes |= {"num_layers": from_config(base.network, "num_hidden_layers") or 1}
        return sizes | self.more_settings(packed), self.their_state(packed)

    def from_peft(self, base: Base, file: PeftFile, name: str) -> Iterator[tuple[Method, Mapping[str, StateDict]]]:
        _check_not_first_position(base)
        tensors = dict(file.state[""])
        if _PROMPT not in tensors:
            raise ValueError(f"The file has {sorted(tensors)}, but no {_PROMPT}.")
        length, rows = file.get("num_virtual_tokens", len(tensors[_PROMPT])), len(tensors[_PROMPT])
        check_supported(self.halves_differ and rows != length, "A prompt for the decoder",
               "prompts here enter the encoder; set num_transformer_submodules=1")  # fmt: skip
        tensors[_PROMPT] = tensors[_PROMPT][:length]  # the rest is for a decoder, and never used
        state = self.our_state(tensors)
        method = self.method_for(name, length, state)
        yield method, dict.fromkeys(_holders(base.model, method), state)

    def more_settings(self, packed: StateDict) -> dict[str, Any]:
        """Return settings besides sizes."""
        return {}

    def their_state(self, packed: StateDict) -> StateDict:
        """Return tensors as HF PEFT calls them."""
        return {_PROMPT: packed["prompt"]}

    def our_state(self, tensors: StateDict) -> StateDict:
        """Return tensors as they are called here."""
        return {"prompt": tensors[_PROMPT]}


class PromptTuningFormat(PromptFormat):
    """Prompt tuning."""

    kind, method = "PROMPT_TUNING", PromptTuning
    ignored_settings = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")

    def check_method(self, method: PromptTuning) -> None:
        check_supported(method.tasks > 1, f"PromptTuning with {method.tasks} tasks", "it has one prompt for all rows")

    def method_for(self, name: str, length: int, state: StateDict) -> PromptTuning:
        return PromptTuning(name=name, length=length)


class PTuningFormat(PromptFormat):
    """P-tuning: files hold what the encoder computed, which stays behind."""

    kind, method = "P_TUNING", PTuning
    ignored_settings = (
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
    )

    def check_method(self, method: PTuning) -> None:
        check_supported(
            method.template is not None, f"template={method.template!r}", "it puts all tokens in front of a row"
        )

    def method_for(self, name: str, length: int, state: StateDict) -> PTuning:
        return PTuning(name=name, length=length, encoder="none")

    def more_settings(self, packed: StateDict) -> dict[str, Any]:
        return {"encoder_hidden_size": packed["prompt"].shape[1]}


class MultitaskPromptFormat(PromptFormat):
    """``prefix_task_cols`` is u (tasks, length, 1), ``prefix_task_rows`` is v (tasks, 1, features)."""

    kind, method, tensors = "MULTITASK_PROMPT_TUNING", MultitaskPromptTuning, (_PROMPT, _COLUMNS, _ROWS)
    settings = (*PromptFormat.settings, "num_ranks", "num_tasks")
    ignored_settings = (
        *PromptTuningFormat.ignored_settings,
        *("prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"),
    )
    halves_differ = True

    def method_for(self, name: str, length: int, state: StateDict) -> MultitaskPromptTuning:
        return MultitaskPromptTuning(name=name, length=length, tasks=len(state["u"]))

    def more_settings(self, packed: StateDict) -> dict[str, Any]:
        return {"num_tasks": len(packed["u"]), "num_ranks": 1}

    def their_state(self, packed: StateDict) -> StateDict:
        return {_PROMPT: packed["prompt"], _COLUMNS: packed["u"][..., None], _ROWS: packed["v"][:, None]}

    def our_state(self, own: StateDict) -> StateDict:
        if missing := {_COLUMNS, _ROWS} - own.keys():
            raise ValueError(f"The file lacks {sorted(missing)}.")
        ranks = own[_ROWS].shape[1]
        check_supported(ranks != 1, f"num_ranks={ranks}", "matrices of tasks have rank one here, as in the paper")
        return {"prompt": own[_PROMPT], "u": own[_COLUMNS].squeeze(-1), "v": own[_ROWS].squeeze(1)}


def _check_not_first_position(base: Base) -> None:
    """Raise where a classifier reads the first position: of the tokens here, of the virtual ones there."""
    class_name = type(base.network).__name__
    reads_first = class_name.endswith("ForSequenceClassification") and hasattr(base.network, "classifier")
    check_supported(
        reads_first,
        f"A prompt for {class_name}",
        "there, the classifier reads a virtual token in place of the first one",
    )


def _holders(model: nn.Module, method: Method) -> list[str]:
    """Return the names of hosts whose adapters hold tensors."""
    return [name for name, adapter in method.adapters(model) if adapter.state_dict()]
