"""What goes by a name: formats, backends, strategies, families, ours and those of other people's packages."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Generic, TypeVar

from ckptlab.errors import CkptlabError

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one kind by name; what is needed for one is imported when it is asked for.

    kind: what one is called ("backend"). group: the entry point group in which installed packages name theirs. error:
    what is raised for a name that there is not; hint: how its text ends. own: ours, those to be imported as
    "module:attribute". Of one name ours goes first. wrong: (name, what a package registers under it) → why that is none
    of this kind, "" where it is one.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        error: type[CkptlabError],
        own: Mapping[str, str | T],
        hint: str = "",
        wrong: Callable[[str, Any], str] = lambda name, value: "",
    ) -> None:
        self.kind, self.group, self.error, self.hint = kind, group, error, hint
        self._own: dict[str, Any] = dict(own)
        self._wrong = wrong
        self._known: dict[importlib.metadata.EntryPoint, T] = {}  # what was loaded of installed packages

    def register(self, name: str, value: T) -> None:
        """Add one for as long as the process lives, or put it in the place of another."""
        self._own[name] = value

    def is_own(self, name: str) -> bool:
        """Whether it is not an installed package that brings it."""
        return name in self._own

    @cached_property
    def _installed(self) -> importlib.metadata.EntryPoints:
        return importlib.metadata.entry_points(group=self.group)  # looks through all that is installed

    def names(self) -> tuple[str, ...]:
        """Ours in their order, then those of installed packages in alphabetical order."""
        return tuple(dict.fromkeys([*self._own, *sorted(self._installed.names)]))

    def every(self) -> list[T]:
        """All of them; one of an installed package that cannot be loaded is left out, with a warning."""
        found = []
        for name in self.names():
            try:
                found.append(self.get(name))
            except self.error as broken:
                warnings.warn(str(broken), stacklevel=3)
        return found

    def get(self, name: str) -> T:
        """What goes by that name; where nothing does, an error with the names that there are, the nearest first."""
        if name in self._own:
            value = self._own[name]
            if isinstance(value, str):
                module, _, attribute = value.partition(":")
                value = self._own[name] = getattr(importlib.import_module(module), attribute)
            return value
        if entries := list(self._installed.select(name=name)):
            return self._loaded(entries)
        known = self.names()
        near = difflib.get_close_matches(name, known)
        expected = ", ".join([*near, *(n for n in known if n not in near)])
        raise self.error(f"no {self.kind} is called {name!r}: expected one of {expected}{self.hint}")

    def _loaded(self, entries: list[importlib.metadata.EntryPoint]) -> T:
        """What installed packages register under a name: one thing, or an error."""
        first, *others = entries
        if first in self._known and not others:
            return self._known[first]
        packages = ", ".join(sorted({entry.dist.name if entry.dist else entry.value for entry in entries}))
        whose = f"{self.kind} {first.name!r} of the package {packages}"
        if any(entry.value != first.value for entry in others):
            raise self.error(
                f"{self.kind} {first.name!r} is registered by the packages {packages}: uninstall all but one"
            )
        try:
            value: T = first.load()
        except Exception as broken:  # another package's code may raise anything
            raise self.error(
                f"{whose} cannot be loaded ({type(broken).__name__}: {broken}): update or uninstall that package"
            ) from broken
        if why := self._wrong(first.name, value):
            raise self.error(f"{whose} cannot be used: {why}: update or uninstall that package")
        self._known[first] = value
        return value
