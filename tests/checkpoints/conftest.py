import os
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: on a disk, most of the time is spent waiting for it."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path  # noqa: S108
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)
