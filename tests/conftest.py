"""What holds for the whole run: hypothesis without deadlines; one thread for each process, since there are as many as
cores; little time for compilers and the garbage collector."""

import gc
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context

import pytest
from hypothesis import settings

# The process that a session lasts as long as, xdist's workers being others: servers of tests end with it.
os.environ.setdefault("PYTEST_SESSION", str(os.getpid()))
# Read when torch and jax are imported, here and in processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
QUICK = ["--xla_backend_optimization_level=0"]
with suppress(PackageNotFoundError):
    if version("jaxlib").startswith("0.10."):  # later ones end a process that has a flag which they do not know
        QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))
# A grammar of IRIs that jsonschema would build for a second when nbformat imports it, and for which it can do without.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

# These machines are shared, and a slow example is no fault.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")


@pytest.fixture(scope="session")
def processes() -> Iterator[Executor]:
    """Two processes, not forked: what they are given was pickled."""
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        yield executor


def pytest_sessionstart(session: pytest.Session) -> None:
    """Test modules import some hundred megabytes, none of it garbage: searched once a generation, half of the time."""
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000)  # hypothesis and jax have callbacks for each search
