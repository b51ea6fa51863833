"""Counts the assertions that a test evaluates: one that evaluates none, in an empty loop say, shows nothing."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

count = 0


def add():
    global count
    count += 1


def _counted(function, counts=lambda *args: True):
    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        if counts(*args):
            add()
        return result

    return call


def _compares_something(actual, *_):
    if isinstance(actual, Mapping):
        actual = list(actual.values())
    if isinstance(actual, Sequence):
        return any(map(_compares_something, actual))
    return not isinstance(actual, torch.Tensor | np.ndarray) or 0 not in actual.shape


def install():
    """Count also what fails without the word ``assert``: a block that must raise or warn, a comparison of tensors."""
    pytest.raises, pytest.warns = _counted(pytest.raises), _counted(pytest.warns)
    torch.testing.assert_close = _counted(torch.testing.assert_close, _compares_something)
    np.testing.assert_allclose = _counted(np.testing.assert_allclose, _compares_something)
