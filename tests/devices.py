"""The backends that tests run on: each on the CPU, and torch and jax on a GPU where there is one."""

from __future__ import annotations

import pytest

from ckptlab import Backend
from ckptlab.arrays.backends import resolve

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

NAMES = ("numpy", "torch", "jax")
ON_GPU = [("torch", "cuda")] * torch.cuda.is_available() + [("jax", "gpu")] * (jax.default_backend() == "gpu")
BACKENDS: list[Backend] = [resolve(name, "cpu") for name in NAMES] + [resolve(*found) for found in ON_GPU]


def spoken(backend: Backend) -> str:
    """What a test on it is called."""
    return f"{backend.name}-{backend.device.partition(':')[0]}"
