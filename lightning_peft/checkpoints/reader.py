"""``read_adapter_file`` reads an adapter from a folder of ``save_adapter`` or from a Lightning checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.adapter_folder import CONFIG, read_adapter
from ..files.checksums import content_digest
from ..files.storage import Location, is_file, is_folder, joined
from .adapter_state import adapter_state, check_state, strip_wrapper_names
from .key_prefix import align_keys
from .metadata import check_format
from .save_load import align_state
from .torch_files import read_torch_file

CHECKPOINT_KEY = "lightning_peft"  # of a Lightning checkpoint's entry
CHECKSUM = "sha256"  # in it, by key: of the entry itself with the tensors in each of these
_EXTRA = "_extra_state"  # of modules that keep more than tensors
_COVERED = ("state_dict", "optimizer_states")


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter folder or a checkpoint.

    Args:
        path: Of the file or folder.
        description: Plain data that ``adapter_metadata`` wrote.
        state: Tensors by key; those of a checkpoint may be more than an adapter's.
        packed: Whether ``Adapter.export_state`` made them.
    """

    path: str
    description: dict[str, Any]
    state: dict[str, Tensor]
    packed: bool

    def state_for(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state of the adapters and trained parameters of a model, by its own keys.

        Raises:
            ValueError: It does not fit; says how.
        """
        if self.packed:
            return align_state(model, self.state, self.path)
        names = {strip_wrapper_names(key) for key in adapter_state(model)}
        aligned = align_keys(self.state, names)
        state = {aligned.get(key, key): value for key, value in self.state.items()}
        check_state(model, state, self.path)
        return {name: state[name] for name in names}


def read_adapter_file(path: Location) -> AdapterFile:
    """Return the adapter in a folder or in a checkpoint.

    Raises:
        FileNotFoundError: There is neither.
        ValueError: A file is damaged, of another format, or holds no adapter of this package.
    """
    if is_file(path):
        return _read_checkpoint(path)
    if is_folder(path) and not is_file(joined(path, CONFIG)) and is_file(joined(path, "meta.pt")):
        raise ValueError(
            f"{path} is a checkpoint of which each process wrote a part; load it with its Trainer and save_adapter."
        )
    description, state = read_adapter(path)
    check_format(description, str(path))
    return AdapterFile(str(path), description, state, packed=True)


def read_checkpoint(path: Location) -> dict[str, Any]:
    """Return the content of a checkpoint that holds an adapter, with tensors left in the file until they are used.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, of another format, or holds no adapter of this package.
    """
    checkpoint = read_torch_file(path, mmap=True)
    if (
        not isinstance(checkpoint, Mapping)
        or "state_dict" not in checkpoint
        or not isinstance(checkpoint.get(CHECKPOINT_KEY), Mapping)
    ):
        raise ValueError(
            f"{path} holds no adapter of lightning_peft: it was written without PEFTStrategy, or with full_checkpoint."
        )
    check_entries(checkpoint, str(path))
    return dict(checkpoint)


def checksums(description: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """Return checksums of an adapter's description with the tensors of each entry; of parts there are none."""
    digests = {key: content_digest(description, checkpoint[key]) for key in _COVERED if key in checkpoint}
    return {key: digest for key, digest in digests.items() if digest is not None}


def check_entries(checkpoint: Mapping[str, Any], source: str) -> None:
    """Raise a ``ValueError`` where the entries of a checkpoint cannot be those of an adapter."""
    check_format(checkpoint[CHECKPOINT_KEY], source)
    state = checkpoint.get("state_dict", {})  # strategies that load in shards have taken it out
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{source} is damaged: its state_dict is a {type(state).__name__} without tensors by name.")


def check_checksums(checkpoint: Mapping[str, Any], source: str) -> None:
    """Raise a ``ValueError`` where a checkpoint was changed since it was saved."""
    description = dict(checkpoint[CHECKPOINT_KEY])
    expected = description.pop(CHECKSUM, None)  # checkpoints of earlier versions, and those in parts, have none
    found = checksums(description, checkpoint) if isinstance(expected, Mapping) else {}
    if changed := [key for key, digest in found.items() if digest != expected.get(key, digest)]:
        raise ValueError(
            f"{source} was changed since it was saved: {changed[0]} has another checksum. Copy it again; if it was "
            f"changed on purpose, delete checkpoint[{CHECKPOINT_KEY!r}][{CHECKSUM!r}] as well."
        )


def _read_checkpoint(path: Location) -> AdapterFile:
    checkpoint = read_checkpoint(path)
    tensors = {key: value for key, value in checkpoint["state_dict"].items() if not key.endswith(_EXTRA)}
    if wrong := [key for key, value in tensors.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path} is damaged: {wrong[0]} is no tensor.")
    check_checksums(checkpoint, str(path))
    state = {strip_wrapper_names(key): value for key, value in tensors.items()}
    return AdapterFile(str(path), dict(checkpoint[CHECKPOINT_KEY]), state, packed=False)
