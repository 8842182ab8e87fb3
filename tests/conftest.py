"""What all tests share: no network, quiet libraries, one thread for tiny tensors or OMP_NUM_THREADS of them."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="records-")  # not the person's own
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

from tests.remembered_plans import remembered_plans
from tests.undrawn import undrawn_charts

transformers.utils.logging.disable_progress_bar()
# How long an example takes says something about the machine, and what else it does, not about what is tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """Leave what was imported out of all collections to come: the Trainer asks for one at each start, and going through
    half a million objects takes longer than a tiny run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _imported_since() -> None:
    """Leave out what earlier tests have imported, too: libraries import much only when it is first used."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _threads_and_a_fixed_seed() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _charts() -> Iterator[None]:
    """The reports of runs come without charts; where tests look at them, a fixture of this name lets them be drawn."""
    with undrawn_charts():
        yield


@pytest.fixture(scope="module", autouse=True)
def _plans() -> Iterator[None]:
    """Runs of networks that were counted for others are planned from these counts; not where plans are tested."""
    with remembered_plans():
        yield


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files cannot grow beyond 2,000 bytes, as on a disk that is full there."""
    import resource  # not everywhere

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)
