"""``refuse_saving``: an adapted model of transformers is not written by its own ``save_pretrained``.

It would write adapters among the weights by names that no other program reads, and loading gives the base, silently.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from .adapted_module import adapters
from .detach_hooks import call_on_detach

REFUSED = ("save_pretrained", "push_to_hub")  # attributes of adapted models of transformers


def refuse_saving(model: nn.Module) -> None:
    """Have the models of transformers in an adapted module say what to call in place of it, until they are detached."""
    if next(adapters(model), None) is None:  # what trains without adapters is saved as it is
        return
    parts = list(model.modules())
    names = {cls: [name for name in REFUSED if callable(getattr(cls, name, None))] for cls in set(map(type, parts))}
    for part in parts:
        for name in names[type(part)]:
            part.__dict__[name] = _refuse  # a function of this module, which copies and pickles keep
            call_on_detach(part, _allow_saving)


def _allow_saving(part: nn.Module) -> None:
    for name in REFUSED:
        if part.__dict__.get(name) is _refuse:
            del part.__dict__[name]


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "This model has adapters, which save_pretrained would write among the weights under names that nothing reads. "
        "Write the adapter alone by lightning_peft.save_adapter(model, folder), or by export_peft for HF PEFT; or call "
        "lightning_peft.merge(model), and then save_pretrained for a plain model."
    )
