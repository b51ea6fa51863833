"""The weights of one model in files, by the names that the model has for them."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..checkpoints.key_prefix import differing_prefixes
from ..core.fingerprint import digest
from ..core.injection_record import require_record, trained_or_replaced_names
from ..structure.base_model import base_parameters
from ..structure.quantized import sample
from .safetensors_files import TensorFiles


class WeightFiles:
    """The base parameters of a model in files; a shared one may be there under any of its names, or all.

    Args:
        model: A model without adapters.
        files: Where they are.

    Raises:
        ValueError: A parameter is not in the files, or has another shape there.
    """

    def __init__(self, model: nn.Module, files: TensorFiles) -> None:
        self.files, shared = files, defaultdict[nn.Parameter, list[str]](list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shared[parameter].append(name)
        self._ours, self._theirs = differing_prefixes((name for own in shared.values() for name in own), files.keys())
        self._known = set(files.keys())
        self._keys = {own[0]: [key for name in own for key in self._there(name)] for own in shared.values()}
        for parameter, (name, *_) in shared.items():
            self._check(name, tuple(parameter.shape))

    def has(self, name: str) -> bool:
        """Whether there are values of a parameter or buffer."""
        return bool(self._keys.get(name) or self._there(name))

    def read(self, name: str) -> Tensor:
        """Return the values of a parameter or buffer."""
        return self.files.read((self._keys.get(name) or self._there(name))[0])

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace the values of parameters and buffers, as far as the base has them."""
        for name, values in state.items():
            for key in self._keys.get(name) or self._there(name):
                self.files.write(key, values)

    def copied(self, folder: Path) -> WeightFiles:
        """Copy the files; return the weights in the copy."""
        other = copy.copy(self)
        other.files = self.files.copied(folder)
        return other

    def fingerprint(self, model: nn.Module) -> str:
        """Return that of the base."""
        found, beside = [], trained_or_replaced_names(model, require_record(model).methods)
        for name, parameter in base_parameters(model).items():
            if name not in beside:
                found.append((tuple(parameter.shape), sample(self.read(name)).clone()))  # a view would hold all of it
                trim_malloc()
        return digest(found)

    def _there(self, name: str) -> list[str]:
        key = self._theirs + name.removeprefix(self._ours)
        return [key] if name.startswith(self._ours) and key in self._known else []

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._keys[name]:
            raise ValueError(
                f"{self.files.path} lacks {name}; it has {', '.join(self.files.keys()[:3])}. Give the files of the "
                f"very model; where a new head was trained, merge into the loaded model, which is then written whole."
            )
        for key in self._keys[name]:
            if self.files.shape(key) != shape:
                raise ValueError(f"{key} has shape {self.files.shape(key)} in {self.files.path}, the model {shape}.")


def trim_malloc() -> None:
    """Return freed memory to the system; glibc would keep it, in pieces that the next layer does not fit into."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
