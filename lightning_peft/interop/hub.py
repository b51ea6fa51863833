"""``push_adapter`` uploads an adapter folder to the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from ..checkpoints.companion_files import COMPANIONS
from ..core.adapter_folder import CONFIG, WEIGHTS
from ..core.optional_imports import check_extra
from ..files.storage import Location, check_local
from .model_card import CARD


def push_adapter(folder: Location, repo_id: str, private: bool | None = None, api: Any | None = None) -> str:
    """Upload an adapter's tensors, settings, card, tokenizer and names of classes, and nothing else of its folder.

    Who may write there is huggingface_hub's matter: log in with its own command, ``hf auth login``.

    Args:
        folder: What ``export_peft`` or ``save_adapter`` wrote.
        repo_id: Where to: ``user/name``. It is made if it is not there.
        private: Whether a new repository is private; by default what the owner has chosen.
        api: Who uploads, with ``create_repo`` and ``upload_folder``; huggingface_hub's ``HfApi`` if not given.

    Returns:
        The repository's address.

    Raises:
        FileNotFoundError: The folder is no adapter.
        ImportError: huggingface_hub is not installed.
        ValueError: No repository can have this name.
        RuntimeError: The hub is out of reach, or refuses.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 8)), lp.LoRA(targets=["0"]))
        >>> lp.push_adapter(lp.save_adapter(model, "my-adapter"), "me/my/adapter")
        Traceback (most recent call last):
        ValueError: 'me/my/adapter' names no repository; expected user/name...
    """
    folder = check_local(folder, "huggingface_hub uploads files of this machine")
    if missing := [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is no adapter folder: {missing[0]} is missing.")
    check_hub(repo_id)
    from huggingface_hub import HfApi

    api = HfApi() if api is None else api
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[WEIGHTS, CONFIG, CARD, *COMPANIONS],
            commit_message="Upload an adapter",
        )
    except OSError as error:  # of huggingface_hub: no network, offline mode, not logged in, not allowed
        raise RuntimeError(
            f"{repo_id!r} could not be written ({type(error).__name__}: {error}). {folder} is complete; push it again "
            f"where the hub is in reach (HF_HUB_OFFLINE not set) and you are logged in (hf auth login)."
        ) from error
    return str(address)


def check_hub(repo_id: str) -> None:
    """Raise where nothing can be pushed to a repository of this name.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: No repository can have this name.
    """
    check_extra("huggingface_hub", "Pushing an adapter needs huggingface_hub", "hub")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} names no repository; expected user/name. {error}") from error
