import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import tempfile
from pathlib import Path

import evaluated
import pytest
import torch

_cache = tempfile.TemporaryDirectory(prefix="datasets-")  # removed when the interpreter ends
os.environ.setdefault("HF_DATASETS_CACHE", _cache.name)  # which child processes share
evaluated.install()
if not torch.accelerator.is_available():  # for each kind of device that is absent, seeding notes down the whole stack
    torch.cuda.manual_seed_all = torch.mtia.manual_seed_all = torch.xpu.manual_seed_all = lambda seed: None
gc.disable()  # until tests are collected: what they import stays, so that to look for garbage only takes time


def pytest_collection_finish():
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 100)  # compiling makes many objects and little garbage


def pytest_assertion_pass():
    evaluated.add()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    before = evaluated.count
    result = yield
    if evaluated.count == before:
        advice = "leave it out where it does not apply (if all tests say so: `make clean`, for modules compiled before)"
        pytest.fail(f"{pyfuncitem.name} evaluated no assertion, so that it could not fail: {advice}", pytrace=False)
    return result


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def ordinary_path():
    """In eval mode torch's encoder runs kernels with other last bits, unless something inside is adapted."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def shared() -> Path:
    """Real models and data beside the checkout."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder of real models and data is not beside this checkout")
    return folder
