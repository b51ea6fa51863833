"""``check_extra``: the error for an optional dependency that is not installed, which names the extra to install."""

from __future__ import annotations

import importlib.util


def check_extra(package: str, need: str, extra: str) -> None:
    """Raise where an optional package is not installed.

    Args:
        package: Name to import it by.
        need: Beginning of the message, such as "Pictures need matplotlib".
        extra: Extra of lightning-peft that installs it.

    Raises:
        ImportError: The package is not installed; the message says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f'{need}, which is not installed. Install it with: pip install "lightning-peft[{extra}]"')
