"""``BaseWeightFiles``: the weights of one base model in safetensors files, by the model's names for them."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..core.fingerprint import digest, sample, trained_or_replaced_names
from ..core.injection_record import require_record
from ..structure.base_model import adapter_host, base_parameters
from .key_prefix import align_keys
from .safetensors_files import TensorFiles


class BaseWeightFiles:
    """The weights of a base model in files, whose keys are the model's names but for one prefix.

    A shared parameter may be in the files under any of its names, or under all of them.

    Args:
        model: A model without values (meta device), adapted or not.
        files: The files.

    Raises:
        ValueError: A parameter has another shape in the files.
    """

    def __init__(self, model: nn.Module, files: TensorFiles) -> None:
        names, host_of = defaultdict[nn.Parameter, list[str]](list), adapter_host(model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.is_meta and host_of(name) is None:
                names[parameter].append(name)
        self._aliases = {name: aliases for aliases in names.values() for name in aliases}
        self._key_of = {name: key for key, name in align_keys(files.keys(), self._aliases).items()}
        self.files = files
        self.missing = [aliases[0] for aliases in names.values() if not self.has(aliases[0])]
        for parameter, (name, *_) in names.items():
            self._check_shape(name, tuple(parameter.shape))

    def has(self, name: str) -> bool:
        """Whether there are values of a parameter or buffer."""
        return bool(self._keys(name))

    def read(self, name: str) -> Tensor:
        """Return the values of a parameter or buffer."""
        return self.files.read(self._keys(name)[0])

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace the values of parameters and buffers, as far as the files have them."""
        for name, values in state.items():
            for key in self._keys(name):
                self.files.write(key, values)

    def copied(self, folder: Path) -> BaseWeightFiles:
        """Copy the files; return the weights in the copy."""
        weights = copy.copy(self)
        weights.files = self.files.copied(folder)
        return weights

    def fingerprint(self, model: nn.Module) -> str:
        """Return the base's fingerprint (see ``core.fingerprint``), with the values of the files."""
        samples, left_out = [], trained_or_replaced_names(model, require_record(model).methods)
        for name, parameter in base_parameters(model).items():
            if name not in left_out:
                samples.append((tuple(parameter.shape), sample(self.read(name)).clone()))  # a view would hold all of it
                trim_malloc()
        return digest(samples)

    def _keys(self, name: str) -> list[str]:
        return [self._key_of[alias] for alias in self._aliases.get(name, [name]) if alias in self._key_of]

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        for key in self._keys(name):
            if self.files.shape(key) != shape:
                raise ValueError(f"{key} has shape {self.files.shape(key)} in {self.files.path}, the model {shape}.")


def trim_malloc() -> None:
    """Return freed memory to the system; glibc would keep it, in pieces that the next layer does not fit into."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
