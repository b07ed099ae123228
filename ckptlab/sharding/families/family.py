"""Families: a model under one program's names and shapes, seen under another's.

A family is a list of lines, read both ways: from its `left` side (a training program's) to its `right` one (as a rule
that of transformers), and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np

from ckptlab.arguments import explained, kind_of
from ckptlab.catalog import Catalog
from ckptlab.catalog.seen import identity
from ckptlab.errors import InputError, LayoutError
from ckptlab.findings import Finding, Where
from ckptlab.layout.rows import elements, intervals
from ckptlab.sharding.families.lines import SIDES, Line, Side, other
from ckptlab.sharding.families.names import Places, Template, by_form, form_of
from ckptlab.sharding.families.numbers import numbers as numbers_of
from ckptlab.sharding.families.seen import View, seen_as
from ckptlab.sharding.families.tables import Shape
from ckptlab.words import number_of, some

T = TypeVar("T")


@dataclass(frozen=True)
class Bound:
    """A line with what stands at its places, and the tensors that it takes: `names[k]` are those of the k-th name of
    the line on the side that they are from (several for a stack, in the order of their indices)."""

    line: Line
    places: Places
    names: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Taken:
    """What a family makes of names: `bound` lines, the names that no line takes (`left`), and those of which a line
    needs others that are not there (`partial`: name → a name that is missing). `numbers`: with those found in names."""

    bound: tuple[Bound, ...]
    left: tuple[str, ...]
    partial: Mapping[str, str]
    numbers: Mapping[str, int]


@explained
@dataclass(frozen=True)
class Family:
    """A model under the names and shapes of two programs: a list of lines, read both ways. Of several lines that take a
    name the first does; of several that give one, going back, the first that can.

    `title`: what its sides are. `defaults`: numbers in names of the left side that nobody gives, as sums of others:
    {"final": "layers+first"}. `model_types`: transformers' own words for the right side. `strategy`: how tensors of the
    left side are cut (a registered strategy's name). `told`: what the program's args say where it is this family
    (what they do not say is False).
    """

    name: str
    title: str
    lines: tuple[Line, ...]
    defaults: Mapping[str, str] = field(default_factory=dict, hash=False)
    model_types: tuple[str, ...] = ()
    strategy: str | None = None
    told: tuple[tuple[str, bool], ...] = ()

    def take(self, names: Iterable[str], side: Side, given: Mapping[str, int]) -> Taken:
        """What lines make of the names of tensors on one side."""
        names = list(names)
        given = self._first(names, side, given)
        groups: dict[tuple[int, tuple[tuple[str, int | str], ...]], dict[int, dict[int, str]]] = {}
        left: list[str] = []
        for name in names:
            match = self.match(name, side, given)
            if match is None:
                left.append(name)
                continue
            number, part, places, index = match
            groups.setdefault((number, tuple(sorted(places.items()))), {}).setdefault(part, {})[index] = name
        bound, partial = [], dict[str, str]()
        for (number, found), parts in groups.items():
            line = self.lines[number]
            places = dict(found)
            missing = _missing(line, side, places, parts, given)
            if missing is None:
                ordered = tuple(tuple(parts[k][e] for e in sorted(parts[k])) for k in sorted(parts))
                bound.append(Bound(line, places, ordered))
            else:
                partial.update((name, missing) for of in parts.values() for name in of.values())
        layers = [int(b.places["i"]) + 1 for b in bound if "i" in b.places]
        told = {k: int(n) for b in bound for k, n in b.places.items() if k not in ("i", "e", "*")}
        return Taken(tuple(bound), tuple(left), partial, {**told, **given, "layers": max(layers, default=0)})

    def _first(self, names: Iterable[str], side: Side, given: Mapping[str, int]) -> Mapping[str, int]:
        """The numbers, with the number from which layers are counted in names, if it stands in them."""
        if "first" in given:
            return given
        counted = [
            int(places["i"])
            for name in names
            for _, _, template in self._takers(form_of(name), side)
            if any("first" in place and place.startswith("i") for place in template.places)
            and (places := template.match(name, given)) is not None
        ]
        return {**given, "first": min(counted)} if counted else given

    def match(
        self, name: str, side: Side, given: Mapping[str, int]
    ) -> tuple[int, int, dict[str, int | str], int] | None:
        """The number of the line that takes a name, which of its names it is, its places, and its index in a stack."""
        for number, part, template in self._takers(form_of(name), side):
            places = template.match(name, given)
            if places is not None:
                line = self.lines[number]
                index = int(places.pop("e")) if line.stacks and side != line.joined else 0
                return number, part, places, index
        return None

    def _takers(self, form: str, side: Side) -> list[tuple[int, int, Template]]:
        """The lines, by number and in their order, that may take names of a form, and which of their names it is."""
        known = self._known.get((form, side))
        if known is None:
            known = self._known[form, side] = [
                (number, part, template)
                for number, line in enumerate(self.lines)
                for part, template in enumerate(line.templates[side])
                if template.form in (None, form)
            ]
        return known

    @cached_property
    def _known(self) -> dict[tuple[str, Side], list[tuple[int, int, Template]]]:
        return {}

    def fits(self, names: Iterable[str], side: Side) -> tuple[int, int]:
        """How many of the names are taken on that side, and how many are not: none, where all of them keep their name
        and shape, since any program may have those. Of many of one form the last is looked at, which has the largest
        numbers."""
        return fits_forms(self, by_form(names), side)

    def side_of(self, names: Iterable[str]) -> Side:
        """The side that most of the names are of; "left" where as many are of both. LayoutError if none are of any."""
        names = list(names)
        left, right = (self.fits(names, side)[0] for side in SIDES)
        if not left and not right:
            raise LayoutError(
                f"no line of the family {self.name} takes any of {number_of(len(names), 'tensor')}: {some(names, 4)}"
            )
        return "right" if right > left else "left"

    def onto(self, ckpt: T, side: Side | None = None, **numbers: Any) -> T:
        """A checkpoint (or a catalog) with the names and shapes of one side, over the same extents: nothing is read.

        side: "right", "left"; None: the one that its names are not of. numbers: heads, kv_heads and other lengths,
        where the checkpoint does not say them; and numbers in names (`first`). What no line takes keeps its name and
        shape, and is listed in a finding. States of a joined tensor are joined states. LayoutError where shapes do not
        fit a line, a number is unknown, or two tensors would have one name.
        """
        given: Any = ckpt
        if isinstance(given, Catalog):
            return cast(T, self._onto(given, side, numbers))
        if not isinstance(getattr(given, "catalog", None), Catalog):
            raise InputError(f"Family.onto takes ckpt=Checkpoint or Catalog, not {kind_of(given)}")
        return cast(T, type(given)(self._onto(given.catalog, side, numbers)))

    def arrays(self, tensors: Mapping[str, Any], side: Side | None = None, **numbers: Any) -> dict[str, np.ndarray]:
        """The same of arrays in memory, name → array: whole tensors under the names of the other side (or of `side`),
        those that no line takes as they are. Errors as `onto`."""
        held = {name: _array(name, tensor) for name, tensor in tensors.items()}
        shapes = {name: array.shape for name, array in held.items()}
        towards = other(self.side_of(held)) if side is None else side
        views, _ = self.views(shapes, towards, numbers_of(None, numbers))
        return {view.name: _assembled(view, held) for view in views}

    def views(self, shapes: Mapping[str, Shape], towards: Side, numbers: Mapping[str, int]) -> tuple[list[View], Taken]:
        """What tensors of these shapes are on the side `towards`: each with the pieces that it is made of. What no line
        takes is there as it is."""
        taken = self.take(shapes, other(towards), numbers)
        known = self._with_defaults(taken.numbers)
        found: list[View] = []
        agreed: dict[tuple[object, str], tuple[int, str]] = {}
        for bound in taken.bound:
            made = list(_views(bound, towards, shapes, known))
            _agree(agreed, bound, made[0].lengths)
            found += made
        found += [View(n, shapes[n], (identity(n, shapes[n]),)) for n in (*taken.left, *taken.partial)]
        names: dict[str, View] = {}
        for view in found:
            if (first := names.setdefault(view.name, view)) is not view:
                both = ", ".join(piece.name for piece in (*first.pieces, *view.pieces))
                raise LayoutError(f"{both} would all be {view.name}")
        return found, taken

    def _onto(self, base: Catalog, side: Side | None, given: Mapping[str, Any]) -> Catalog:
        towards = other(self.side_of(base.tensors)) if side is None else side
        shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
        try:
            views, taken = self.views(shapes, towards, numbers_of(base, given))
        except LayoutError as error:
            raise LayoutError(f"{base.path}: {error}{_hint(error)}") from None
        known = self._with_defaults(taken.numbers)
        left = [n for n in (*taken.left, *taken.partial) if self.match(n, towards, known) is None]
        aliases = [alias for tensor in base.tensors.values() for alias in tensor.aliases]
        called = {alias: self._called(alias, towards, known) for alias in aliases}
        return seen_as(base, views, (*base.findings, *_findings(self, left, taken.partial, towards)), called)

    def _called(self, alias: str, towards: Side, known: Mapping[str, int]) -> str:
        """A further name of a tensor on the other side: the same where no line renames it."""
        match = self.match(alias, other(towards), known)
        if match is None or self.lines[match[0]].text is not None:
            return alias
        return self.lines[match[0]].templates[towards][0].name(match[2], known)

    def _with_defaults(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """The numbers, and those that follow from them."""
        found = dict(numbers)
        for name, text in self.defaults.items():
            if name not in found:
                terms = [t.strip() for t in text.split("+")]
                if all(t.isdecimal() or t in found for t in terms):
                    found[name] = sum(int(t) if t.isdecimal() else found[t] for t in terms)
        return found

    def __str__(self) -> str:
        return self.name


def fits_forms(family: Family, forms: Mapping[str, Sequence[str]], side: Side) -> tuple[int, int]:
    """What `Family.fits` says of the names of these forms, which are the same for all families."""
    total = sum(map(len, forms.values()))
    found = [(len(of), taken[0]) for of in forms.values() if (taken := family.match(of[-1], side, {})) is not None]
    took = 0 if all(family.lines[number].keeps for _, number in found) else sum(count for count, _ in found)
    return took, total - took


def _missing(
    line: Line, side: Side, places: Places, parts: Mapping[int, Mapping[int, str]], given: Mapping[str, int]
) -> str | None:
    """The name of a tensor that a line needs beside those that are there; None if it has all."""
    templates = line.templates[side]
    indices = sorted({e for of in parts.values() for e in of})
    wanted = range(max(indices) + 1) if line.stacks and side != line.joined else indices
    for part, template in enumerate(templates):
        for e in wanted:
            if e not in parts.get(part, {}):
                return template.name({**places, "e": e} if line.stacks else places, given)
    return None


def _views(bound: Bound, towards: Side, shapes: Mapping[str, Shape], known: Mapping[str, int]) -> Iterator[View]:
    """The tensors that a line gives."""
    line = bound.line
    for names in bound.names:
        if odd := next((n for n in names if shapes[n] != shapes[names[0]]), None):
            raise LayoutError(f"{odd} has shape {shapes[odd]}, {names[0]} has {shapes[names[0]]}: they are no stack")
    given = [shapes[names[0]] for names in bound.names]
    made, lengths = line.shapes(towards, [names[0] for names in bound.names], given, known, len(bound.names[0]))
    templates = line.templates[towards]
    if towards == line.joined:
        pieces = line.pieces(bound.names, made[0], lengths)
        yield View(templates[0].name(bound.places, known), made[0], tuple(pieces), line.text, lengths)
        return
    for index in range(lengths["e"] if line.stacks else 1):
        places = {**bound.places, "e": index} if line.stacks else bound.places
        for part, template in enumerate(templates):
            piece = line.piece_of(part, bound.names[0][0], made[part], lengths, index)
            text = None if line.text is None else line.texts[part]
            yield View(template.name(places, known), made[part], (piece,), text, lengths)


def _agree(agreed: dict[tuple[object, str], tuple[int, str]], bound: Bound, lengths: Mapping[str, int]) -> None:
    """LayoutError where a length is another than in another line of the same layer."""
    name, layer = bound.names[0][0], (bound.places.get("i"), bound.places.get("e"))
    for length, value in lengths.items():
        if length in ("in", "out", "e"):
            continue
        there, first = agreed.setdefault((layer, length), (value, name))
        if there != value:
            raise LayoutError(f"{length} is {there} in {first} and {value} in {name}: another family, or other numbers")


def _assembled(view: View, held: Mapping[str, np.ndarray]) -> np.ndarray:
    """A tensor put together from arrays, element by element: the reference."""
    first = held[view.pieces[0].name]
    if len(view.pieces) == 1 and view.pieces[0].is_all(view.shape, first.shape):
        return first
    whole = np.empty(view.shape, np.result_type(*{held[piece.name].dtype for piece in view.pieces}))
    for piece in view.pieces:
        seen: list[np.ndarray] = [np.zeros(1, np.int64)] * len(view.shape)
        stored: list[np.ndarray] = []
        order: list[int] = []
        for dim, index in piece.at:
            seen[dim] = np.array([index])
        for of in piece.dims:
            if isinstance(of, int):
                stored.append(np.array([of]))
                continue
            plain = intervals(of[1])
            seen[of[0]] = elements(plain[:, 0], plain[:, 2])
            stored.append(elements(plain[:, 1], plain[:, 2]))
            order.append(of[0])
        taken = held[piece.name][np.ix_(*stored)] if stored else held[piece.name]
        taken = taken.reshape([len(seen[dim]) for dim in order])
        taken = taken.transpose(np.argsort(order, kind="stable")) if order else taken
        whole[np.ix_(*seen) if seen else ()] = taken.reshape([len(index) for index in seen])
    return whole


def _hint(error: LayoutError) -> str:
    return ": say heads= and kv_heads=" if "do not follow from the shape" in str(error) else ""


def _findings(family: Family, left: list[str], partial: Mapping[str, str], towards: Side) -> Iterable[Finding]:
    """What a user must hear of names that no line takes."""
    alone = [name for name in left if name not in partial]
    if alone:
        yield Finding(
            "family-left",
            "warning",
            Where(tensors=tuple(alone)),
            f"names of the {other(towards)} side of the family {family.name}",
            f"{number_of(len(alone), 'tensor')} that no line takes: {some(alone, 4)}",
            "they keep their names and shapes; another family may know them",
            "headers",
        )
    if lacking := {name: needs for name, needs in partial.items() if name in left}:
        names = tuple(lacking)
        yield Finding(
            "family-incomplete",
            "warning",
            Where(tensors=names),
            f"all parts of a joined tensor of the family {family.name}",
            f"{number_of(len(names), 'tensor')} without the others: {names[0]} needs {lacking[names[0]]}",
            "they keep their names and shapes",
            "headers",
        )


def _array(name: str, tensor: Any) -> np.ndarray:
    try:
        return np.asarray(tensor)
    except (TypeError, ValueError):
        raise InputError(
            f'{name}: {kind_of(tensor)} is no array: give whole tensors by name, ckpt.full("master", stack=False)'
        ) from None
