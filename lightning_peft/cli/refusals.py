"""``find_refusal`` tells errors that this package raises on purpose from bugs."""

from __future__ import annotations

import traceback
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

_PACKAGE = Path(__file__).parents[1]


def find_refusal(error: BaseException) -> BaseException | None:
    """Return the error or, of those that it was raised from, the first that was raised for the user to read.

    That is what a ``raise`` of this package made, and what Lightning says of settings that do not fit the machine.

    Its message says what to do, and a traceback says no more. An error that the interpreter or another library raises,
    even in a call from here, is unforeseen; None is returned, and its traceback is worth showing. Errors that wrap
    another are followed, since jsonargparse wraps what a class says of its arguments.
    """
    cause: BaseException | None = error
    while cause is not None and not _is_refusal(cause):
        cause = cause.__cause__
    return cause


def _is_refusal(error: BaseException) -> bool:
    if isinstance(error, MisconfigurationException):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    expected = isinstance(error, (ValueError, TypeError, FileNotFoundError, FileExistsError, ImportError, RuntimeError))
    if not frames or not expected:
        return False
    return (frames[-1].line or "").startswith("raise") and Path(frames[-1].filename).is_relative_to(_PACKAGE)
