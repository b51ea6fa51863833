"""``DeviceWaits`` records for what a host would wait for a device, and where devices are mixed; no GPU is needed."""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What returns a value to the host, or a shape that depends on values.
READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}
READS |= {"unique_consecutive", "repeat_interleave", "_linalg_check_errors"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Functions of torch that read values and, on a CPU, are no operator.
BY_NAME = {"tolist", "numpy", "__array__", "cpu", "__contains__"}
FROM_HOST = {"tensor", "as_tensor", "asarray", "new_tensor"}  # make a tensor of what the host has
_ROOT = Path(__file__).parents[1]


class DeviceWaits(TorchDispatchMode):
    """Context that records (what, "file:function") of each wait in ``found``.

    Args:
        device: Type of the device that the step is on. Of ``cpu``, tensors count as if they were on another device, so
            what would read them is seen, and copies between devices are not; of ``meta``, both are, and reading raises.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.found, self.without_wait, self._functions = device, Counter(), Counter(), _Functions(self)

    def __enter__(self):
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self._functions.__exit__(*error)

    def outside_of(self, library: str) -> Counter:
        """Return the waits that are not of a library such as transformers, whose models wait without adapters, too."""
        return Counter({key: count for key, count in self.found.items() if not key[1].startswith(f"{library}/")})

    def is_on(self, x) -> bool:
        return isinstance(x, Tensor) and x.device.type == self.device

    def note(self, what: str, waits: bool = True) -> None:
        (self.found if waits else self.without_wait)[what, _place()] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in READS and any(map(self.is_on, tensors)):
            self.note(name)
        if name in INDEXING and self.is_on(args[0]):
            self._index(name, [i for i in args[1] if i is not None])
        elif name in ("_to_copy", "copy_"):
            self._copy(name, args, kwargs)
        elif len({x.device.type for x in tensors if x.dim()}) > 1:  # numbers of the host go along
            self.note(f"{name} mixes devices")
        return func(*args, **kwargs)

    def _index(self, name, indices):
        for index in indices:
            if index.dtype in (torch.bool, torch.uint8):
                self.note(f"{name} by mask")
            elif not self.is_on(index):
                self.note(f"{name} by an index of the host")

    def _copy(self, name, args, kwargs):
        (to, source) = args[:2] if name == "copy_" else (kwargs.get("device") or args[0].device, args[0])
        to = to.device if isinstance(to, Tensor) else torch.device(to)
        if to.type != source.device.type and source.numel():
            without_wait = source.device.type == "cpu" and (kwargs.get("non_blocking") or args[2:3] == (True,))
            self.note(f"copy from {source.device.type} to {to.type}", not without_wait)


class _Functions(TorchFunctionMode):
    """Sees what is no operator, or an operator of the host alone."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in BY_NAME and args and self.waits.is_on(args[0]):
            self.waits.note(name)
        if name in FROM_HOST and self.waits.device != "cpu":
            device = kwargs.get("device") or (args[0].device if name == "new_tensor" else "cpu")
            values = args[-1] if args else kwargs.get("data")
            if torch.device(device).type == self.waits.device and not isinstance(values, Tensor) and values != []:
                self.waits.note("values of the host")
        return func(*args, **kwargs)


def _place() -> str:
    """Return file and function of the innermost call outside of torch and of this file: "library/file.py:function"."""
    frame = sys._getframe(1)
    while frame.f_back and (_is_torch(frame.f_code.co_filename) or frame.f_code.co_name.startswith("<")):
        frame = frame.f_back
    path = frame.f_code.co_filename.removeprefix(f"{_ROOT}/").rpartition("site-packages/")[2]
    return f"{path}:{frame.f_code.co_name}"


def _is_torch(file: str) -> bool:
    return file == __file__ or "torch" in Path(file).parts
