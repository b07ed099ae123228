"""Placeholders: what a pickle names, and what it makes of that, without importing or calling any of it.

A `Global` is a name, a `Foreign` is a record of how an object was made. Two ways to make one are kept apart,
since they call different things: REDUCE calls `callee(*args)`, NEWOBJ `callee.__new__(callee, *args)`.
"""

import copyreg
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from reprlib import recursive_repr
from types import MappingProxyType
from typing import Any, NoReturn

from ckptlab.errors import CheckpointError, UnsafeFileError
from ckptlab.words import brief, shorten

Build = Callable[..., Any]
_DEEPEST_SHOWN, _MOST_SHOWN, _MOST_HASHED = 3, 20, 8
_depth: ContextVar[int] = ContextVar("depth", default=0)
_comparisons_left: ContextVar[list[int] | None] = ContextVar("comparisons_left", default=None)
_GETATTR = {("builtins", "getattr"), ("__builtin__", "getattr")}


class Foreign:
    """An object of a class that was not imported: what it was made from, as found in the pickle.

    callee: the class or function that made it. args, kwargs: what that was given. new: made by `__new__`
    (NEWOBJ) and not by a call (REDUCE). state: what its `__setstate__` would be given (None: nothing).
    elements: what was appended to it. items: the (key, value) pairs that were set on it.

    The keys of its state read as attributes too (`args.hidden_size`), unless they are private or one of
    the names above; `attributes` has all of them.
    """

    __slots__ = ("args", "callee", "elements", "items", "kwargs", "new", "state")

    def __init__(
        self,
        callee: "Global | Foreign",
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
        new: bool = False,
        state: Any = None,
    ) -> None:
        self.callee = callee
        self.args = args
        self.kwargs = dict(kwargs)
        self.new = new
        self.state = state
        self.elements: list[Any] = []
        self.items: list[tuple[Any, Any]] = []

    @property
    def module(self) -> str:
        """The module of the class or function that made it; empty where that was itself made by a call."""
        return self.callee.module

    @property
    def name(self) -> str:
        """The name of the class or function that made it."""
        return self.callee.name

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes that its state holds (of `__dict__` and of slots), by name."""
        return {key: value for part in self._states for key, value in part.items()}

    @property
    def _states(self) -> list[dict[str, Any]]:
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        return [part for part in parts if isinstance(part, dict)]

    def with_attributes(self, **changes: Any) -> "Foreign":
        """A copy whose state, which must be a dict, has these attributes changed or added."""
        if not isinstance(self.state, dict):
            raise CheckpointError(
                f"{self.module}.{self.name} keeps no dict of attributes: cannot set {sorted(changes)}"
            )
        made = Foreign(self.callee, self.args, self.kwargs, self.new, self.state | changes)
        made.elements, made.items = list(self.elements), list(self.items)
        return made

    def __getattr__(self, name: str) -> Any:
        # Never a private name: numpy, IPython and others look for hooks such as __array_interface__.
        if not name.startswith("_"):
            for part in reversed(self._states):
                if name in part:
                    return part[name]
        raise AttributeError(f"the placeholder of {self.callee!r} has no attribute {name!r}")

    # What the unpickler does to an object: it is called, filled and given its state.
    def __call__(self, *args: Any) -> "Foreign":
        return Foreign(self, args)

    def append(self, element: Any) -> None:
        self.elements.append(element)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        made_from = (self.callee, self.args, self.kwargs, self.new)
        return Foreign, made_from, self.state, iter(self.elements), iter(self.items)

    def _parts(self) -> tuple[Any, ...]:
        return self.callee, self.new, self.args, self.kwargs, self.state, self.elements, self.items

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Foreign):
            return NotImplemented
        left = _comparisons_left.get()
        if left is not None:
            left[0] -= 1
            if left[0] < 0:
                raise UnsafeFileError(
                    "its pickle uses more objects of unknown classes as keys, alike on their surface, than any "
                    "checkpoint does; do not use it"
                )
        return self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash((Foreign, self.callee, self.new, _surface(self.args), _surface(self.state)))

    @recursive_repr("…")
    def __repr__(self) -> str:
        inside, depth = _depth.get() + 1, _depth.set(_depth.get() + 1)
        try:
            if inside > _DEEPEST_SHOWN:
                return f"<{self.callee!r}(…), not imported>"
            shown = [brief(value) for value in self.args[:_MOST_SHOWN]]
            named = [*(self.kwargs | self.attributes).items()][:_MOST_SHOWN]
            shown += [f"{shorten(str(key), 80)}={brief(value)}" for key, value in named]
            return f"<{self.callee!r}({', '.join(shown)}), not imported>"
        finally:
            _depth.reset(depth)


def _surface(value: Any, depth: int = 2) -> Any:
    """What tells values apart at little cost: the first plain values in it, the same of those that are equal."""
    if isinstance(value, str | int | float | bytes | type(None)):
        return value
    if not depth:
        return None
    if isinstance(value, tuple | list):
        return len(value), *(_surface(part, depth - 1) for part in value[:_MOST_HASHED])
    if isinstance(value, dict) and len(value) <= _MOST_HASHED:
        return frozenset((key, _surface(part, depth - 1)) for key, part in value.items() if isinstance(key, str))
    return None


@contextmanager
def comparisons_at_most(count: int) -> Iterator[None]:
    """Placeholders may be compared so often, as keys of one hash are, and no more: UnsafeFileError."""
    before = _comparisons_left.set([count])
    try:
        yield
    finally:
        _comparisons_left.reset(before)


class _Made:
    """The base of every `Global`: the unpickler makes an object by `__new__` only of what is a type."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Foreign:  # type: ignore[misc]
        return Foreign(cls, args, kwargs, new=True)  # type: ignore[arg-type]


class Global(type):
    """A class, function or constant that a pickle names, such as `torch.bfloat16`. Calling it runs nothing.

    module, name: as they stand in the pickle. build: makes a plain value of the arguments of a REDUCE, or
    returns NotImplemented; only for what ckptlab knows. args: where not None, this is what
    `module.name(*args)` gave, name being `getattr`: how protocol 2 names a class inside a class.
    """

    module: str
    name: str
    args: tuple[Any, ...] | None
    _build: Build | None

    def __new__(
        mcls, module: str, name: str, build: Build | None = None, args: tuple[Any, ...] | None = None
    ) -> "Global":
        # Written out again, a name with a line break in it would become other opcodes than were read.
        if not (module.isprintable() and name.isprintable() and module and name):
            raise UnsafeFileError(
                f"its pickle names {name!r} of module {module!r}, which no writer does; do not use it"
            )
        held = None if build is None else staticmethod(build)
        fields = {"__slots__": (), "module": module, "name": name, "args": args, "_build": held}
        return super().__new__(mcls, "Global", (_Made,), fields)

    def __init__(cls, *_: Any, **__: Any) -> None:
        super().__init__("Global", (_Made,), {})

    def __call__(cls, *args: Any) -> Any:
        if cls._build is not None:
            value = cls._build(*args)
            if value is not NotImplemented:
                return value
        elif cls.args is None and (cls.module, cls.name) in _GETATTR:
            return Global(cls.module, cls.name, args=args)
        return Foreign(cls, args)

    def __setstate__(cls, state: object) -> NoReturn:
        raise UnsafeFileError(f"its pickle tries to change what {cls!r} is; do not use it")

    def __eq__(cls, other: object) -> bool:
        if not isinstance(other, Global):
            return NotImplemented
        return (cls.module, cls.name, cls.args) == (other.module, other.name, other.args)

    def __hash__(cls) -> int:
        return hash((cls.module, cls.name))

    def __repr__(cls) -> str:
        return f"{cls.module}.{cls.name}" if cls.args is None else ".".join(map(str, cls.args))


@lru_cache(maxsize=4096)
def named(module: str, name: str) -> Global:
    """A class, function or constant by name, to be written as a value: `named("torch", "bfloat16")`."""
    return Global(module, name)


def foreign(module: str, name: str, *args: Any, state: Any = None, new: bool = False) -> Foreign:
    """An object to be written: `module.name(*args)`, or made by `__new__` if `new`, then given its `state`.

    `foreign("deepspeed.utils.tensor_fragment", "fragment_address", state={"numel": 4, "start": 0}, new=True)`
    """
    return Foreign(named(module, name), args, new=new, state=state)


def _global_again(module: str, name: str, args: tuple[Any, ...] | None) -> Global:
    return named(module, name) if args is None else Global(module, name, args=args)


# So that placeholders travel between processes (by Python's own pickle, which asks for classes by name).
copyreg.pickle(Global, lambda cls: (_global_again, (cls.module, cls.name, cls.args)))
