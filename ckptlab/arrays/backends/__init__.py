"""Backends: the array libraries that views and operations run on. Read base.py first.

Each is imported when it is asked for; `resolve` is the only place that knows them by name.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from ckptlab.arrays.backends.base import Backend
from ckptlab.errors import BackendError

__all__ = ["Backend", "names", "of", "resolve"]

_OWN = {"numpy": "NumpyBackend", "torch": "TorchBackend", "jax": "JaxBackend"}
_LIBRARIES = {"torch": "torch", "jax": "jax", "jaxlib": "jax"}
_GROUP = "ckptlab.backends"


def names() -> tuple[str, ...]:
    """What `resolve` knows: our own, and those of installed packages (entry point group `ckptlab.backends`)."""
    return (*_OWN, *sorted(e.name for e in entry_points(group=_GROUP)))


def resolve(backend: Backend | str | None = None, device: Any = None) -> Backend:
    """A backend by its name (None: numpy) on a device (None: the library's default; for torch the cpu).

    BackendError for a name that is not known, a library that is not installed, a device that is not there.
    """
    if isinstance(backend, Backend):
        if device is not None and str(device) != backend.device:
            raise BackendError(f"{backend!r} was given together with device {device!r}: give its name instead")
        return backend
    return _resolve(backend or "numpy", device if device is None else str(device))


@lru_cache(maxsize=64)
def _resolve(name: str, device: str | None) -> Backend:
    made: Backend = _class(name)(device)
    return made if made.device == device else _resolve(name, made.device)  # one of each, however it was asked for


def _class(name: str) -> Any:
    if name in _OWN:
        try:
            module = import_module(f"ckptlab.arrays.backends.{name}")
        except ModuleNotFoundError as e:
            raise BackendError(
                f"backend {name!r} needs {e.name}, which is not installed: pip install 'ckptlab[{name}]'"
            ) from None
        return getattr(module, _OWN[name])
    for entry in entry_points(group=_GROUP, name=name):
        return entry.load()
    raise BackendError(f"no backend is called {name!r}: expected one of {', '.join(names())}")


def of(array: Any) -> Backend:
    """The backend that an array belongs to, found by the name of its type's package: numpy's for all that are strange.

    Nothing is imported for an array that is not the library's own.
    """
    if isinstance(known := getattr(array, "backend", None), Backend):
        return known
    name = _LIBRARIES.get(type(array).__module__.partition(".")[0], "numpy")
    return _resolve(name, _class(name).device_of(array))
