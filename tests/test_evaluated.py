"""A test that evaluates no assertion fails."""

import subprocess
import sys

import pytest
from configurations import ROOT

TESTS = """
import pytest, torch

def test_right(): assert len([1])
def test_raising():
    with pytest.raises(KeyError): {}[1]
def test_close(): torch.testing.assert_close(torch.ones(2), torch.ones(2))
def test_of_an_empty_loop():
    for x in []: assert x
def test_of_nothing(): print(1)
def test_close_to_nothing(): torch.testing.assert_close([], [])
@pytest.mark.skip
def test_skipped(): pass
"""


@pytest.mark.slow
def test_a_test_that_evaluates_no_assertion_fails(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", ROOT / "pyproject.toml", "-rA", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    ends = [line.split(" - ")[0].split("::") for line in done.stdout.splitlines() if "::test_" in line]
    found = {name: end.split()[0] for end, name in ends}
    passed, failed = (sorted(name for name, end in found.items() if end == kind) for kind in ("PASSED", "FAILED"))
    assert passed == ["test_close", "test_raising", "test_right"]
    assert failed == ["test_close_to_nothing", "test_of_an_empty_loop", "test_of_nothing"]
    assert "test_of_nothing evaluated no assertion" in done.stdout
