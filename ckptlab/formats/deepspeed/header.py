"""A dictionary in a file of DeepSpeed's, its values taken out by the form that they have in whatever version: odd ones
are refused, with the file and the keys that lead there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptlab.aliases import Shape
from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.formats.torch.torchfile import is_unread
from ckptlab.stored import Stored
from ckptlab.words import brief

Shapes = Mapping[str, Shape]
Content = Mapping[str, Any]

BIG = 1 << 62  # beyond any number of elements
ODD = "not as DeepSpeed writes it. Put back this run's own file"


@dataclass(frozen=True)
class Header:
    """A dictionary in a file, its values taken out by the form that DeepSpeed gives them.

    `path` is the file's, `at` the keys that lead to the dictionary. Each method raises a CheckpointError that names
    both where a value has another form.
    """

    path: str
    values: Content
    at: str = ""

    @classmethod
    def of(cls, path: str, value: Any, at: str = "") -> Header:
        if not isinstance(value, Mapping):
            raise CheckpointError(
                f"{path}: {at + ': ' if at else ''}expected a dictionary, found {shown(value)}: {ODD}"
            )
        return cls(path, value, at)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def odd(self, key: str, expected: str) -> CheckpointError:
        """The error on a value of another form."""
        where = f"{self.at}.{key}" if self.at else key
        return CheckpointError(f"{self.path}: {where}: expected {expected}, found {shown(self.values.get(key))}: {ODD}")

    def integer(self, key: str, least: int = 0) -> int:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value < BIG:
            raise self.odd(key, f"an integer of at least {least}")
        return int(value)

    def refuse_newer(self, known: int) -> None:
        """UnsupportedError where `version` is a later one than is known."""
        if (version := self.integer("version")) > known:
            raise UnsupportedError(
                f"{self.path}: {self.at} is of version {version}, ckptlab knows version {known}: a newer ckptlab may "
                "read it"
            )

    def inside(self, key: str) -> Header:
        """The dictionary of a key; an empty one where there is none."""
        value = self.values.get(key)
        return Header.of(self.path, {} if value is None else value, f"{self.at}.{key}" if self.at else key)

    def several(self, key: str) -> list[Any]:
        """The list of a key; an empty one where there is none."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, (list, tuple)):
            raise self.odd(key, "a list")
        return list(value)

    def dictionaries(self, key: str) -> list[Header]:
        return [Header.of(self.path, v, f"{self.at}.{key}" if self.at else key) for v in self.several(key)]

    def integers(self, key: str, least: int = 0) -> list[int]:
        return [Header(self.path, {key: v}, self.at).integer(key, least) for v in self.several(key)]

    def names(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key)
        found = sorted(value) if isinstance(value, (set, frozenset)) else self.several(key)
        if not all(isinstance(v, str) for v in found):
            raise self.odd(key, "a list of names")
        return tuple(found)

    def aliases(self, key: str) -> dict[str, str]:
        inside = self.inside(key).values
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in inside.items()):
            raise self.odd(key, "names of names")
        return dict(inside)

    def stored(self, key: str) -> dict[str, Stored]:
        """The tensors of a dictionary by name; what is no tensor is left out."""
        return tensors_of(self.inside(key))

    def groups(self) -> list[tuple[dict[str, Any], list[int]]]:
        """(hyperparameters, parameters by number) of each of torch's `param_groups`."""
        groups = self.dictionaries("param_groups")
        return [({k: v for k, v in g.values.items() if k != "params"}, g.integers("params")) for g in groups]

    def states(self) -> dict[Any, Content]:
        """What torch's `state` keeps of each parameter, by its number."""
        state = self.inside("state")
        return {i: Header.of(self.path, v, f"{state.at}.{i}").values for i, v in state.values.items()}

    def shapes(self, key: str) -> dict[str, Shape]:
        return _shapes(self, key, self.inside(key).values)

    def param_shapes(self) -> tuple[Shapes, ...] | None:
        """Shapes, one mapping a group (DeepSpeed before 0.6 wrote one group as a bare mapping); None if there are
        none."""
        key = "param_shapes"
        value = self.values.get(key)
        groups = [value] if isinstance(value, Mapping) else value
        if groups is None:
            return None
        if not isinstance(groups, (list, tuple)) or not all(isinstance(g, Mapping) for g in groups):
            raise self.odd(key, "shapes by name, one dictionary a group")
        return tuple(_shapes(self, key, g) for g in groups)


def shown(value: Any) -> str:
    """A value in a message: its type, and what it is if that is short."""
    plain = isinstance(value, (int, float, str, type(None))) and len(repr(value)) <= 40
    return repr(value) if plain else f"a {type(value).__name__}"


def _shapes(header: Header, key: str, group: Mapping[Any, Any]) -> dict[str, Shape]:
    found = {}
    for name, shape in group.items():
        whole = isinstance(shape, (list, tuple)) and all(
            isinstance(n, (int, np.integer)) and 0 <= n < BIG for n in shape
        )
        if not isinstance(name, str) or not whole or math.prod(shape) >= BIG:
            raise header.odd(key, f"the shape of {name}" if isinstance(name, str) else "names")
        found[name] = tuple(map(int, shape))
    return found


def refuse_unread(path: str, values: Iterable[tuple[Any, Any]]) -> None:
    for name, value in values:
        if is_unread(value):
            raise UnsupportedError(
                f"{path}: {brief(name)} is made by {value.callee}: a sparse or quantised tensor, or one of a class of "
                "its own, which ckptlab does not read: save it again as a plain one"
            )


def tensors_of(header: Header) -> dict[str, Stored]:
    refuse_unread(header.path, header.values.items())
    found = {k: v for k, v in header.values.items() if isinstance(v, Stored)}
    if not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{header.path}: {header.at}: a tensor without a name: {ODD}")
    return found
