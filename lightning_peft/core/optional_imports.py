"""Optional dependencies: imported on first use, with one error that names the extra."""

from __future__ import annotations

import importlib.util


def check_extra(package: str, need: str, extra: str) -> None:
    """Raise where an optional package is not installed.

    Args:
        package: Name to import it by.
        need: Who needs what, such as "Pictures need matplotlib".
        extra: Of lightning-peft, which brings it.

    Raises:
        ImportError: It is not installed; says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f'{need}, which is not installed. Install it with: pip install "lightning-peft[{extra}]"')
