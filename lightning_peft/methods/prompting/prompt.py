"""``Prompt``: adapters that insert virtual tokens into the call of a module, and remove them from its output."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...core.adapter import Adapter, Call
from ...core.per_row import BatchableAdapter, BatchableModuleAdapter
from .row_tasks import TaskAdapter
from .strip_outputs import strip_virtual_tokens
from .virtual_tokens import Insertion, names_of

Virtual = Callable[[], Tensor]  # computes (length, features), or (rows, length, features) with a prompt for each row
Insert = Callable[..., Any]


@dataclass(frozen=True)
class PromptSite:
    """Module of a model that virtual tokens enter."""

    host: nn.Module
    weight: Tensor  # (any, features), for width, device and type
    table: nn.Module | None  # input embeddings of the model, if they are known
    insert: Insert  # (host, inner, arguments by name, Virtual, length) -> output, with virtual tokens inserted
    stand_in: int | None = None  # id of virtual tokens for a host that needs ids, see ``probe_backbone``


class Prompt(BatchableModuleAdapter, TaskAdapter):
    """Adapter that inserts virtual tokens before the input of its host.

    Args:
        site: Host of the prompt.
        tasks: Number of tasks.
    """

    tensor_parallel_dims, unmergeable = {}, "virtual tokens are no weight"
    plot_tensors = {"tokens": "prompt"}
    prompt: nn.Parameter  # (..., length, features)

    def __init__(self, site: PromptSite, tasks: int) -> None:
        super().__init__(tasks)
        self.insert, self.names = site.insert, names_of(site.host)

    @abstractmethod
    def virtual(self, rows: int) -> Tensor:
        """Return the virtual tokens (length, features), or (rows, length, features) where each row has a task."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        return self._call_with(self.virtual, host, inner, *args, **kwargs)

    def per_example_tensors(self) -> tuple[Any, ...]:
        if self.tasks > 1:
            return ()
        virtual = self.virtual(1)
        return (Prompt, len(virtual)), virtual

    def for_rows(self, host: Any, inner: Call, values: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        prompts: Tensor = values[0]

        def virtual(rows: int) -> Tensor:
            if rows % len(prompts):
                raise ValueError(f"row_adapters was given {len(prompts)} names; {rows} rows are no multiple of that.")
            return prompts.repeat_interleave(rows // len(prompts), 0)

        return self._call_with(virtual, host, inner, *args, **kwargs)

    def _call_with(self, virtual: Callable[[int], Tensor], host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        inputs = call.get("inputs_embeds")
        inputs = call.get(self.names[0]) if inputs is None else inputs
        if inputs is None:
            return inner(**call)  # the host raises for the missing argument
        # Calls that go on from a cache need the number of virtual tokens alone, so these are computed where they enter.
        return self.insert(host, inner, call, partial(virtual, inputs.shape[0]), self.prompt.shape[-2])


class ExtendEncoderMask(BatchableAdapter, Adapter):
    """Lets a decoder's cross-attention see the virtual tokens in the encoder's output; has no parameters."""

    tensor_parallel_dims = {}

    def __init__(self, host: nn.Module, length: int) -> None:
        super().__init__()
        self.length, self.names = length, names_of(host)

    def reset_parameters(self) -> None:
        """Nothing to fill."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self.names, args, strict=False)) | kwargs
        mask = call.get("encoder_attention_mask")
        if mask is not None:
            call["encoder_attention_mask"] = Insertion(self.length, mask).mask(mask)
        return inner(**call)

    def per_example_tensors(self) -> tuple[Any, ...]:
        return ((ExtendEncoderMask, self.length),)


class StripPrompt(BatchableAdapter, Adapter):
    """Removes the virtual tokens from the output of the last of several blocks; has no parameters."""

    tensor_parallel_dims, part = {}, "end"  # with a single block, the prompt is on the same host

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def reset_parameters(self) -> None:
        """Nothing to fill."""

    def forward(self, host: Any, inner: Call, *args: Any, **kwargs: Any) -> Any:
        return strip_virtual_tokens(inner(*args, **kwargs), Insertion(self.length, None).remove)

    def per_example_tensors(self) -> tuple[Any, ...]:
        return ((StripPrompt, self.length),)
