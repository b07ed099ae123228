"""A suite: laws by name, each of which says what breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ckptlab.errors import LawError

Law = Callable[[], Iterable[str]]


def hold(what: str, laws: Mapping[str, Law]) -> tuple[str, ...]:
    """Try every law. Returns their names; LawError with all that was found if any is broken. A law that raises is."""
    broken: list[str] = []
    raised: Exception | None = None
    for name, law in laws.items():
        try:
            broken += [f"{name}: {found}" for found in law()]
        except Exception as error:
            broken.append(f"{name}: {type(error).__name__}: {error}")
            raised = raised or error
    if broken:
        raise LawError(what, broken) from raised
    return tuple(laws)
