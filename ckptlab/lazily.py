"""Faces of packages: names that come from their modules when they are first asked for (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def loader(
    package: str, homes: Mapping[str, str], modules: Collection[str] = ()
) -> tuple[list[str], Callable[[str], Any]]:
    """A package's `__all__` and `__getattr__`. homes: module of ckptlab → the names that come from it; modules: those
    of the package itself. What was asked for once is the package's own from then on."""
    home_of = {name: home for home, names in homes.items() for name in names.split()}

    def load(name: str) -> Any:
        if name in modules:
            value: Any = import_module(f"{package}.{name}")
        elif name in home_of:
            value = getattr(import_module(f"ckptlab.{home_of[name]}"), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return sorted([*home_of, *modules]), load
