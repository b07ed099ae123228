"""Arguments of a wrong kind, said in one line: what a public function takes there, and what it was given.

Types are not checked beforehand. Where a call fails with one of Python's errors, its arguments are held against its
annotations, and the first that does not fit is named; where all fit, the error is the one that it was.
"""

from __future__ import annotations

import builtins
import collections.abc
import difflib
import inspect
import io
import itertools
import math
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from ckptlab.errors import CkptlabError, InputError

C = TypeVar("C")
T = TypeVar("T", bound=Callable[..., Any])
ELEMENTS = 100  # of a sequence or mapping that are looked at
_WIDER: dict[type, tuple[type, ...]] = {
    int: (int, np.integer),
    float: (int, float, np.number),
    bool: (bool, np.bool_),
}


def explained(function: T) -> T:
    """A public function (or all public methods of a class) that says which argument was of a wrong kind: InputError."""
    if isinstance(function, type):
        for name, method in list(vars(function).items()):
            if name.startswith("_") and name not in ("__init__", "__getitem__"):
                continue
            if isinstance(method, types.FunctionType):
                setattr(function, name, explained(method))
            elif isinstance(method, staticmethod | classmethod):
                setattr(function, name, type(method)(explained(method.__func__)))
        return function

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if isinstance(error, CkptlabError) and not isinstance(error, InputError):
                raise
            said = _wrong(function, args, kwargs)
            if said is None:
                raise
            raise InputError(said) from error

    return typing.cast(T, call)


def constructed(kind: type[C]) -> type[C]:
    """A class of which there are many: it says so when it is made, and its methods are left as they are."""
    setattr(kind, "__init__", explained(kind.__init__))  # noqa: B010
    return kind


def _wrong(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """What is to be said of the first argument that does not fit, or that there is not; None where all do, or where
    some are missing."""
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return _unknown(function, signature, kwargs)
    for name, value in given.items():
        hint = _hint(function, name)
        if not fits(value, hint):
            owner = function.__qualname__.removesuffix(".__init__").replace(".__getitem__", "[…]")
            return f"{owner} takes {name}={described(hint)}, not {kind_of(value)}{_advice(hint, value)}"
    return None


def check_fields(owner: str, kind: type, given: Mapping[str, Any]) -> None:
    """InputError for the first of the named values that a dataclass has no field for, or not one of that kind."""
    if unknown := _unknown(kind, inspect.signature(kind), given):
        raise InputError(unknown)
    for name, value in given.items():
        hint = _hint(kind.__init__, name)  # type: ignore[misc]
        if not fits(value, hint):
            raise InputError(f"{owner} takes {name}={described(hint)}, not {kind_of(value)}")


def _unknown(function: Callable[..., Any], signature: inspect.Signature, kwargs: Mapping[str, Any]) -> str | None:
    """What is to be said of the first keyword that a function does not take, the nearest first; None if it takes
    all."""
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            taken = ", ".join([*near, *(k for k in known if k not in near)])
            owner = function.__qualname__.removesuffix(".__init__")
            return f"{owner} takes no {name}=: it takes {taken or 'nothing by name'}"
    return None


def _hint(function: Callable[..., Any], name: str) -> Any:
    """The annotation of a parameter; Any where it cannot be known without importing more."""
    parameter = inspect.signature(function).parameters[name]
    text = parameter.annotation
    if text is inspect.Parameter.empty or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return Any
    if not isinstance(text, str):
        return text
    names = {"xr": sys.modules.get("xarray"), **vars(builtins), **getattr(function, "__globals__", {})}
    try:
        return eval(text, names)  # our own source, as typing.get_type_hints does
    except (NameError, AttributeError, TypeError):
        return Any


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind that an annotation says, as far as that can be told."""
    if hint is Any or isinstance(hint, TypeVar | str):
        return True
    if hint is None or hint is type(None):
        return value is None
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        return isinstance(value, Hashable) and value in inner
    if origin in (collections.abc.Mapping, dict):
        items = list(value.items())[:ELEMENTS] if isinstance(value, Mapping) else None
        return items is not None and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in items)
    if origin in (collections.abc.Sequence, collections.abc.Iterable, list):
        if isinstance(value, Iterator):  # a generator is not looked into; a file is none of anything
            return origin is collections.abc.Iterable and not isinstance(value, io.IOBase)
        kind = Iterable if origin is collections.abc.Iterable else Sized
        plain = isinstance(value, Iterable) and isinstance(value, kind) and not isinstance(value, bytes | Mapping)
        plain = plain and not (isinstance(value, np.ndarray) and not value.ndim)
        plain = plain and not (isinstance(value, str) and not fits(value, inner[0]))
        return plain and all(fits(one, inner[0]) for one in itertools.islice(value, ELEMENTS))
    if origin is tuple:
        every = inner[0] if inner[-1:] == (Ellipsis,) else None
        return isinstance(value, tuple) and (every is None or all(fits(one, every) for one in value[:ELEMENTS]))
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if kind in (int, float) and (isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))):
        return False
    if getattr(kind, "_is_protocol", False):
        return behaves(value, kind)
    return isinstance(value, _WIDER.get(kind, (kind,)))


def only_said(**options: Any) -> dict[str, Any]:
    """Those of the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def behaves(value: Any, protocol: type) -> bool:
    """Whether a value has a protocol's methods, and not other things of their names (a tensor's `layout`)."""
    methods = [name for name, method in vars(protocol).items() if isinstance(method, types.FunctionType)]
    wanted = [name for name in methods if not name.startswith("_")]
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in wanted)


def whole_number(value: Any) -> int:
    """A count, an index or a length as Python's int. InputError for what is none: a float, a text, True."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise InputError(f"expected a whole number, not {kind_of(value)}")


def positive(name: str, value: Any) -> int:
    """A size or number of at least 1, as Python's int. InputError, with what it is of, for anything else."""
    try:
        if (found := whole_number(value)) > 0:
            return found
    except InputError:
        pass
    raise InputError(f"{name}={kind_of(value)}: expected a whole number, 1 at least")


def described(hint: Any) -> str:
    """An annotation in words."""
    inner = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        words = list(dict.fromkeys(described(one) for one in inner if one is not type(None)))
        words += ["None"] if type(None) in inner else []
        return " or ".join([", ".join(words[:-1]), words[-1]] if words[:-1] else words)
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if inner and isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
        return f"{origin.__name__} of {' to '.join(described(one) for one in inner if one is not Ellipsis)}"
    if origin is os.PathLike:
        return "path"
    return str(getattr(hint, "__name__", hint))


def kind_of(value: Any) -> str:
    """What an argument is, for a message: itself where it is short, else its type."""
    plain = isinstance(value, str | int | float | bytes | type(None))
    few = isinstance(value, list | tuple | dict) and len(value) <= 8
    text = repr(value) if plain or few else ""
    if 0 < len(text) < 60:
        return text
    home = type(value).__module__.split(".")[0]
    return f"a {type(value).__name__}" if home == "builtins" else f"a {home}.{type(value).__name__}"


def _advice(hint: Any, value: Any) -> str:
    arrays = described(hint) == "DataArray" and isinstance(value, np.ndarray | list)
    names = [kind.__name__ for kind in type(value).__mro__] if described(hint) == "DataArray" else []
    if arrays:
        return ": name its dims, xarray.DataArray(x, dims=…)"
    each = {"Dataset": "x.map(…)", "DataTree": "x.map_over_datasets(lambda node: node.map(…))"}
    way = next((each[name] for name in names if name in each), None)
    return f": take one of its variables, or map over them, {way}" if way else ""
