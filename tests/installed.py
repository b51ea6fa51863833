"""Tests of optional packages, which are looked for and not imported when tests are collected."""

from importlib.util import find_spec

import pytest


def needs(*packages):
    """Return a mark that skips a test where one of the packages is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
