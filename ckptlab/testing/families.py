"""The laws of families, as a suite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ckptlab.arguments import explained
from ckptlab.errors import LayoutError
from ckptlab.layout.notation import Name, Node, Product, Sum, parse
from ckptlab.sharding.families.family import Family
from ckptlab.sharding.families.lines import SIDES, Line, Side, other
from ckptlab.sharding.families.registered import FAMILIES
from ckptlab.testing.suite import Law, hold

_SMALL = (2, 3, 4, 5, 6)  # lengths that names in a line get, where nobody says them


@explained
def check_family(
    family: Family | str,
    left: Mapping[str, Any] | None = None,
    right: Mapping[str, Any] | None = None,
    **numbers: Any,
) -> tuple[str, ...]:
    """Try the laws on a family, by its name or itself: each line puts every element where its notation says, and there
    and back is the identity; no tensor is lost and none has two names.

    left, right: whole tensors (name → array) of one model under the names of both sides, as both programs have them:
    each side then must become the other, bit for bit. Only that can tell a line that is wrong from one that is right.
    numbers: heads, kv_heads, … of that model. Returns the laws that hold; LawError, an AssertionError with all that was
    found, if any is broken.
    """
    one = FAMILIES.get(family) if isinstance(family, str) else family
    laws: dict[str, Law] = {
        "placement": lambda: (text for line in one.lines for text in placement(line)),
        "identity": lambda: (text for line in one.lines for text in there_and_back(line)),
        "names": lambda: _names(one),
    }
    if left is not None and right is not None:
        laws["right"] = lambda: _same(one, left, right, "right", numbers)
        laws["left"] = lambda: _same(one, right, left, "left", numbers)
    return hold(f"family {one.name}", laws)


def example(line: Line, lengths: Mapping[str, int] | None = None) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Parts of a line with a number of its own in each element, by the names that they have (of a stack those of all
    indices), and the lengths: small ones that differ, where `lengths` does not say them."""
    free = iter(itertools.cycle(_SMALL))
    known = {name: (lengths or {}).get(name) or next(free) for name in sorted(line.known)} | dict(line.lengths)
    count, found, first = known["e"] if line.stacks else 1, dict[str, np.ndarray](), 0
    texts = ["out in"] * len(line.parts) if line.text is None else line.texts
    known = {"out": 3, "in": 2, **known}
    for index, (template, text) in itertools.product(
        range(count), zip(line.templates[other(line.joined)], texts, strict=True)
    ):
        shape = tuple(len(list(_labels(dim, known))) for dim in parse(text))
        numbered = np.arange(first, first + int(np.prod(shape)), dtype=np.int64).reshape(shape)
        found[template.name({"i": 1, "e": index, "*": "x.y"}, _NUMBERS)] = numbered
        first += numbered.size
    return found, known


_NUMBERS = {"first": 2, "layers": 4, "embed": 1, "final": 9, "head": 10}


def placement(line: Line, lengths: Mapping[str, int] | None = None) -> Iterator[str]:
    """What of a line lies elsewhere than its notation says, read name by name: no arithmetic of the line's is used."""
    parts, known = example(line, lengths)
    alone = Family("line", "", (line,))
    whole = alone.arrays(parts, line.joined, **known, **_NUMBERS)
    if line.text is None:
        return
    (name, joined), *rest = whole.items()
    if rest:
        yield f"{line.whole}: {len(whole)} tensors are joined to, expected one: {', '.join(whole)}"
        return
    expected = _spelled(line, list(parts.values()), known)
    if joined.shape != expected.shape or not np.array_equal(joined, expected):
        yield f"{name}: joined otherwise than {line.text!r} says, with {known}"


def _spelled(line: Line, parts: list[np.ndarray], known: Mapping[str, int]) -> np.ndarray:
    """The whole of a line, element by element, from the notation alone: every index of it is a term of each dim, and an
    index of each name in there; the same names lead to the element of the part."""
    assert line.text is not None
    dims = [list(_labels(dim, known)) for dim in parse(line.text)]
    places = [
        [{frozenset(at.items()): k for k, (_, at) in enumerate(_labels(dim, known))} for dim in parse(t)]
        for t in line.texts
    ]
    number = {terms: k for k, terms in enumerate(itertools.product(*(sorted({t for t, _ in dim}) for dim in dims)))}
    found = np.empty([len(dim) for dim in dims], np.int64)
    for index in np.ndindex(*found.shape):
        labels = [dim[k] for dim, k in zip(dims, index, strict=True)]
        part = number[tuple(term for term, _ in labels)]
        at = {name: k for _, names in labels for name, k in names.items()}
        stack = at.pop("e") if line.stacks else 0
        array = parts[stack * len(line.parts) + part]
        there = tuple(next(k for names, k in dim.items() if names <= set(at.items())) for dim in places[part])
        found[index] = array[there]
    return found


def _labels(
    node: Node, known: Mapping[str, int], term: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], dict[str, int]]]:
    """(which terms of the sums in a dim, the index of each name) of its elements, in their order."""
    if isinstance(node, Name):
        yield from ((term, {node.text: k}) for k in range(known[node.text]))
    elif isinstance(node, Sum):
        for number, inner in enumerate(node.terms):
            yield from _labels(inner, known, (*term, number))
    elif isinstance(node, Product):
        outer, *rest = node.factors
        for first, names in _labels(outer, known, term):
            if not rest:
                yield first, names
                continue
            for last, more in _labels(Product(tuple(rest)), known, first):
                yield last, {**names, **more}


def there_and_back(line: Line, lengths: Mapping[str, int] | None = None) -> Iterator[str]:
    """What of a line's parts is not the same when they are joined and taken apart again, and of the whole the other way
    round."""
    parts, known = example(line, lengths)
    alone = Family("line", "", (line,))
    whole = alone.arrays(parts, line.joined, **known, **_NUMBERS)
    back = alone.arrays(whole, other(line.joined), **known, **_NUMBERS)
    again = alone.arrays(back, line.joined, **known, **_NUMBERS)
    for one, two, what in ((parts, back, "parts"), (whole, again, "whole")):
        if one.keys() != two.keys():
            yield f"{line.whole}: there and back its {what} are called {', '.join(two)}, not {', '.join(one)}"
        else:
            yield from (
                f"{name}: there and back it is another" for name in one if not np.array_equal(one[name], two[name])
            )


def _names(family: Family) -> Iterator[str]:
    """Lines that cannot be reached, since one before them takes the same name."""
    for side in SIDES:
        taken: dict[str, Line] = {}
        for line in family.lines:
            for name in line.names(side):
                first = taken.setdefault(name, line)
                if first is not line and set(first.names(other(side))) == set(line.names(other(side))):
                    yield f"{name}: two lines make it {', '.join(line.names(other(side)))}"
                elif first is not line and side == "left":
                    yield f"{name}: the line to {', '.join(line.names('right'))} is never reached"


def _same(
    family: Family, given: Mapping[str, Any], expected: Mapping[str, Any], towards: Side, numbers: Mapping[str, Any]
) -> Iterator[str]:
    try:
        made = family.arrays(given, towards, **numbers)
    except LayoutError as error:
        yield str(error)
        return
    for name in expected.keys() - made.keys():
        yield f"{name}: nothing becomes it"
    for name in made.keys() - expected.keys():
        yield f"{name}: the other program has no such tensor"
    for name, array in made.items():
        if name not in expected:
            continue
        there = np.asarray(expected[name])
        if there.shape != array.shape:
            yield f"{name}: shape {array.shape}, expected {there.shape}"
        elif there.tobytes() != array.tobytes():
            same = np.array_equal(np.sort(there, axis=None), np.sort(array, axis=None))
            yield f"{name}: " + ("the same elements in another order" if same else "other elements")
